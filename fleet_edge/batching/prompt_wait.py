"""Estimate of the time until a prompt is computed, for admission, progress messages and `fleet edge advise`."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fleet_edge.batching.fairness import ExtraWork
from fleet_edge.batching.step_cost import StepCost


@dataclass(frozen=True, slots=True)
class PromptWait:
    """Work until the first token after a prompt, in tokens: `left` of its own, `ahead` of others that go first.

    `tokens_per_s` is the rate for all of them; None before any prompt was computed.
    """

    left: int
    ahead: int
    tokens_per_s: float | None

    @property
    def seconds(self) -> float:
        """Time until the first token; 0 while no rate is known."""
        return (self.ahead + self.left) / self.tokens_per_s if self.tokens_per_s else 0.0


@dataclass(frozen=True, slots=True)
class WaitingPrompt:
    """A prompt with tokens to compute, as of `arrived` (monotonic seconds)."""

    device: str
    arrived: float
    left: int


def estimate_waits(
    prompts: Sequence[WaitingPrompt], cost: StepCost, extra: ExtraWork, *, now: float
) -> list[PromptWait]:
    """Return what each prompt waits for, in the same order."""
    rate = _rate({each.device for each in prompts if each.left > 1}, cost, extra, now)
    order = sorted(range(len(prompts)), key=lambda place: cost.place(prompts[place].arrived, prompts[place].left))
    waits, ahead = dict[int, PromptWait](), 0
    for place in order:
        left = prompts[place].left
        waits[place] = PromptWait(left, ahead, rate)
        ahead += left - 1  # the last token is computed with what follows it
    return [waits[place] for place in range(len(prompts))]


def _rate(devices: Collection[str], cost: StepCost, extra: ExtraWork, now: float) -> float | None:
    """Return the tokens/s of prompts of these devices next to what else runs."""
    token_s = cost.prompt_token_s
    return None if token_s is None else extra.prompt_share(devices, now) / token_s

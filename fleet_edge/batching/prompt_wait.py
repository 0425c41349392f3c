"""Estimate of the time until a prompt is computed, for admission, progress messages and `fleet edge advise`."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

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
    """A prompt with tokens to compute; `arrived` (monotonic seconds) is infinite while nothing waits for it."""

    device: str
    arrived: float
    left: int


def estimate_waits(
    prompts: Sequence[WaitingPrompt], cost: StepCost, extra: ExtraWork, *, now: float
) -> Iterator[PromptWait]:
    """Estimate what each prompt waits for, in the same order.

    Half of the steps begin with the oldest prompt and half with the shortest (see `batch_builder`). So a prompt waits
    for those that are before it in either order, but no longer than twice for those before it in one of them.
    """
    rate = _rate({each.device for each in prompts if each.left > 1}, cost, extra, now)
    places = np.array([cost.place(each.arrived, each.left) for each in prompts])
    left = np.array([each.left for each in prompts], np.int64)
    for number, each in enumerate(prompts):
        older = places < places[number]
        older[:number] |= places[:number] == places[number]
        shorter = (left < each.left) | (older & (left == each.left))
        work = left - 1  # the last token is computed with what follows it
        once, twice = work[older | shorter].sum(), 2 * min(work[older].sum(), work[shorter].sum()) + each.left - 1
        yield PromptWait(each.left, int(min(once, twice)), rate)


def _rate(devices: Collection[str], cost: StepCost, extra: ExtraWork, now: float) -> float | None:
    """Return the tokens/s of prompts of these devices next to what else runs."""
    token_s = cost.prompt_token_s
    return None if token_s is None else extra.prompt_share(devices, now) / token_s

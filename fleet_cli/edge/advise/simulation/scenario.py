"""Scenario of a simulation: the edge, the line, the devices and what they ask for."""

from collections.abc import Callable
from dataclasses import dataclass, field

from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import STREAMED, FixedPacing, Pacing
from fleet_edge.step_time import StepCurve

Plan = Callable[[], Pacing]
"""Makes the pacing of one device."""


def auto() -> Pacing:
    """Return the pacing of a device that chooses, which is the default."""
    return AdaptivePacing(stream=None)


def streaming() -> Pacing:
    """Return the pacing of a device that has the edge write."""
    return FixedPacing(STREAMED, stream=True)


def drafting(tokens: int, *, ahead: bool = False) -> Plan:
    """Return what makes the pacing of a device that always drafts so many tokens."""
    return lambda: FixedPacing(tokens, ahead)


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeLimits:
    """What an edge's settings say; named as these are.

    Attributes:
        step_tokens: Most new tokens in a step.
        prefill_chunk: Most tokens of prompts in a step that also verifies.
        gather_share: Longest hold of a step for drafts that are about to come, as a fraction of a step.
        piece_s: Longest wait of what the edge writes by itself for what follows (seconds).
        max_draft: Most tokens of a draft.
        max_guess: Most tokens that are guessed in a step behind a text that the edge writes by itself.
        window: Most drafts of one session under way.
    """

    step_tokens: int = 512
    prefill_chunk: int = 128
    gather_share: float = 0.5
    piece_s: float = 0.1
    max_draft: int = 16
    max_guess: int = 1
    window: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What of a run is counted (seconds).

    Attributes:
        window_s: Length of the time that counts.
        settle_s: Between the moment at which every device has had a token and that time.
        patience_s: After which it begins at the latest.
    """

    window_s: float = 20.0
    settle_s: float = 5.0
    patience_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What is simulated.

    Attributes:
        curve: How long a step of the edge takes.
        devices: That write at the same time.
        plan: Makes the pacing of each.
        draft_s: Time of a draft token (seconds).
        acceptance: Chance of a draft token to be accepted, those before it taken as accepted.
        guess_rate: Chance of a token that the edge guesses, of what it writes by itself, to be right, those before it
            taken as right.
        round_trip_s: Between device and edge (seconds), half of it each way.
        text_tokens: Of each text.
        prompt_tokens: Of each prompt.
        pause_s: Mean pause of a device before a text, exponentially distributed as in a Poisson process; 0: all ask at
            once, and go on with the next text at once.
        texts: That each device writes; None: until the time is over.
        message_s: Edge's own time for a message that it takes or sends (seconds).
        limits: Of the edge.
        timing: What is counted.
        seed: Of all that is drawn.
    """

    curve: StepCurve
    devices: int
    plan: Plan = auto
    draft_s: float = 0.0
    acceptance: float = 0.0
    guess_rate: float = 0.0
    round_trip_s: float = 0.0
    text_tokens: int = 128
    prompt_tokens: int = 64
    pause_s: float = 0.0
    texts: int | None = None
    message_s: float = 0.0
    limits: EdgeLimits = field(default_factory=EdgeLimits)
    timing: Timing = field(default_factory=Timing)
    seed: int = 0

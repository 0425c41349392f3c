"""Scenario of a simulation, and the messages that edge and devices exchange in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fleet_admin.planning.service_level import TimedRequest
from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import STREAMED, FixedPacing, Pacing, ReportedLoad
from fleet_edge.step_time import StepCurve
from schemas.errors import FleetError


class PlanningError(FleetError):
    """The figures for a simulation are missing or unusable."""


Plan = Callable[[], Pacing]
"""Makes the pacing of one device."""


def auto() -> Pacing:
    """Return the pacing of a device that chooses, the default."""
    return AdaptivePacing(stream=None)


def streaming() -> Pacing:
    return FixedPacing(STREAMED, stream=True)


def drafting(tokens: int, *, ahead: bool = False) -> Plan:
    return lambda: FixedPacing(tokens, ahead)


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeLimits:
    step_tokens: int = 512
    prefill_chunk: int = 128  # most prompt tokens in a step that also verifies
    gather_share: float = 0.5  # longest delay of a step for drafts that are about to come, as a fraction of a step
    piece_s: float = 0.1  # longest wait of tokens of edge-only decoding for later ones
    max_draft: int = 16
    max_guess: int = 1  # most tokens of n-gram speculation in a step of edge-only decoding
    window: int = 4  # most drafts of one session in flight


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTiming:
    window_s: float = 20.0
    settle_s: float = 5.0  # from the moment at which every device has had a token to the window
    patience_s: float = 60.0  # after which the window begins at the latest


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    curve: StepCurve
    devices: int
    plan: Plan = auto  # makes the pacing of each device
    draft_s: float = 0.0  # of one draft token
    acceptance: float = 0.0  # probability that a draft token is accepted if those before it are
    guess_rate: float = 0.0  # probability that a token of n-gram speculation is right if those before it are
    round_trip_s: float = 0.0  # half of it each way
    text_tokens: int = 128
    prompt_tokens: int = 64
    # mean pause of a device before a request, exponentially distributed; 0: requests follow at once
    pause_s: float = 0.0
    texts: int | None = None  # requests of each device; None: until the time is over
    message_s: float = 0.0  # the edge's own time for a message
    limits: EdgeLimits = field(default_factory=EdgeLimits)
    timing: RunTiming = field(default_factory=RunTiming)
    seed: int = 0


@dataclass(slots=True, kw_only=True)
class SimulatedRequest(TimedRequest):
    stands: Sequence[bool]  # by position, whether a draft token there is the target's
    prompt: int  # tokens
    guessed: Sequence[bool] = ()  # by position, whether n-gram speculation on the edge is right; empty: nowhere

    @property
    def length(self) -> int:
        return len(self.stands)


@dataclass(frozen=True, slots=True)
class SimulatedOpen:
    session: int
    text: SimulatedRequest


@dataclass(frozen=True, slots=True)
class SimulatedOpened:
    session: int
    load: ReportedLoad


@dataclass(frozen=True, slots=True, eq=False)
class SimulatedDraft:
    session: int
    base: int  # position of the first token
    tokens: int
    more: bool  # whether another draft follows before the verdict
    sent_at: float
    draft_s: float
    first: bool  # of the session
    epoch: int  # number of rejections before it


@dataclass(frozen=True, slots=True)
class SimulatedWrite:
    """A request for `tokens` of edge-only decoding from `base` on; 0 stops it."""

    session: int
    base: int
    tokens: int


@dataclass(frozen=True, slots=True)
class SimulatedClose:
    session: int


@dataclass(frozen=True, slots=True)
class SimulatedVerdict:
    session: int
    draft: SimulatedDraft
    accepted: int
    drawn: int  # tokens that the target has drawn after them, 0 or 1
    compute_s: float  # of the step that verified it
    load: ReportedLoad
    queue_s: float = 0.0  # before that step
    chained: int = 0  # tokens of the session's other drafts in that step


@dataclass(frozen=True, slots=True)
class SimulatedTokens:
    session: int
    base: int  # position of the first token
    tokens: int
    request: SimulatedWrite
    compute_s: float  # of the step that made the last token
    load: ReportedLoad


@dataclass(frozen=True, slots=True)
class SimulatedClosed:
    session: int


ToEdge = SimulatedOpen | SimulatedDraft | SimulatedWrite | SimulatedClose
ToDevice = SimulatedOpened | SimulatedVerdict | SimulatedTokens | SimulatedClosed

"""Messages of a simulation: as much of the protocol's as takes time or decides something."""

from collections.abc import Sequence
from dataclasses import dataclass

from fleet_cli.edge.advise.service_level import Text
from fleet_device.pacing.contract import ReportedLoad


@dataclass(slots=True, kw_only=True)
class SimulatedText(Text):
    """A text, with what decides on its drafts.

    Attributes:
        stands: By position, whether a draft token there is the target's own.
        prompt: Tokens of its prompt.
        guessed: By position, whether the edge would guess the token right; nowhere if empty.
    """

    stands: Sequence[bool]
    prompt: int
    guessed: Sequence[bool] = ()

    @property
    def length(self) -> int:
        """How many tokens it is to have."""
        return len(self.stands)


@dataclass(frozen=True, slots=True)
class Open:
    """A device asks for a session over a text."""

    session: int
    text: SimulatedText


@dataclass(frozen=True, slots=True)
class Opened:
    """It is granted.

    Attributes:
        session: Which.
        load: Of the edge.
    """

    session: int
    load: ReportedLoad


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """Tokens that a device proposes.

    Attributes:
        session: Whose.
        base: Position of the first.
        tokens: How many.
        more: Whether another draft follows before the verdict.
        sent_at: When.
        draft_s: What it took to draft them.
        first: Whether it is the session's first.
        epoch: Number of rejections before it.
    """

    session: int
    base: int
    tokens: int
    more: bool
    sent_at: float
    draft_s: float
    first: bool
    epoch: int


@dataclass(frozen=True, slots=True)
class Write:
    """A device has the edge write from `base` on, up to so many tokens; 0 stops it."""

    session: int
    base: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Close:
    """A text has come to its end."""

    session: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a draft.

    Attributes:
        session: Whose.
        draft: Which.
        accepted: Of its tokens.
        drawn: Tokens that the target has drawn behind them, 0 or 1.
        compute_s: The step that verified it.
        load: Of the edge.
        queue_s: Before that step.
        chained: Tokens of the session's other drafts that the step verified.
    """

    session: int
    draft: Draft
    accepted: int
    drawn: int
    compute_s: float
    load: ReportedLoad
    queue_s: float = 0.0
    chained: int = 0


@dataclass(frozen=True, slots=True)
class Written:
    """What the edge has written by itself.

    Attributes:
        session: Whose.
        base: Position of the first token.
        tokens: How many.
        request: That it answers.
        compute_s: Of the step that has made the last of them.
        load: As in a verdict.
    """

    session: int
    base: int
    tokens: int
    request: Write
    compute_s: float
    load: ReportedLoad


@dataclass(frozen=True, slots=True)
class Closed:
    """The edge's last word."""

    session: int


ToEdge = Open | Draft | Write | Close
ToDevice = Opened | Verdict | Written | Closed

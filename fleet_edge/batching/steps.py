"""A step: its sessions and tokens, its times, and the report on it that the scheduler's policies receive."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from fleet_edge.errors import DraftFault
from fleet_edge.sessions.drafts import DraftResult, ReceivedDraft
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.verifiers.contract import Item
from schemas.messages import Draft
from schemas.policy import SamplingPolicy


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One session's part of a step; `chain` are the drafts to decide on, empty for prefill.

    `scored` are tokens of the prompt whose log-probabilities are requested; prefill has rows for them alone.
    `background` work had to wait (see `fairness`). After the step it has `results`, one of each draft that was decided
    on, or a `fault`.
    """

    session: EdgeSession
    item: Item
    chain: tuple[ReceivedDraft, ...] = ()
    background: bool = False
    scored: tuple[int, ...] = ()
    results: tuple[DraftResult, ...] = ()
    fault: DraftFault | None = None

    @property
    def prefilled(self) -> int:
        """Tokens of the prompt or sequence that are computed without logits."""
        return len(self.item.tokens) - self.verified

    @property
    def verified(self) -> int:
        """Number of tokens whose logits decide on drafts."""
        return self.item.rows - len(self.scored)

    @property
    def decodes(self) -> bool:
        return bool(self.chain) and self.chain[0].draft.write is not None

    @property
    def speculated(self) -> int:
        return self.item.rows - 1 if self.decodes else 0


@dataclass(frozen=True, slots=True)
class Batch:
    """A step: parts, the most urgent first, and drafts found void when their turn came."""

    works: list[WorkItem] = field(default_factory=list)
    faults: list[tuple[EdgeSession, Draft, DraftFault]] = field(default_factory=list)

    @property
    def verifications(self) -> list[WorkItem]:
        return [work for work in self.works if work.chain]

    @property
    def judged(self) -> list[WorkItem]:
        """The parts with rows: verifications, and prefill whose tokens are scored."""
        return [work for work in self.works if work.chain or work.scored]

    @property
    def items(self) -> list[Item]:
        return [work.item for work in self.works]

    @property
    def tokens(self) -> int:
        return sum(len(work.item.tokens) for work in self.works)

    @property
    def prefilled(self) -> int:
        return sum(work.prefilled for work in self.works)

    def __bool__(self) -> bool:
        return bool(self.works or self.faults)


@dataclass(frozen=True, slots=True)
class DraftOrder:
    """A session that is drafted for: tokens that the draft model has not computed, and the position of the next."""

    handle: int
    tokens: tuple[int, ...]
    policy: SamplingPolicy
    base: int
    most: int  # tokens to propose
    ends: frozenset[int]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """A forward pass with the decisions on its drafts.

    `started` and `ended` are monotonic seconds, `sessions` are those verified. Of that time the draft model at the edge
    took `drafting_s`.
    """

    started: float
    ended: float
    sessions: int
    drafting_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @property
    def compute_ms(self) -> float:
        return self.seconds * 1e3


@dataclass(frozen=True, slots=True)
class StepReport:
    """A step that was computed and decided on, before its sessions commit.

    `orders` are those of the draft model at the edge, `proposed` the tokens that it drafted, by session.
    """

    batch: Batch
    times: StepTimes
    orders: Sequence[DraftOrder] = ()
    proposed: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def of(self, handles: Collection[int]) -> "StepReport":
        """Return the report on the part of these sessions."""
        return replace(self, batch=Batch([work for work in self.batch.works if work.session.handle in handles]))


class StepPolicy(Protocol):
    """A policy of the scheduler that learns from steps."""

    def on_step(self, report: StepReport, /) -> None: ...

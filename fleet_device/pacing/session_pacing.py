"""Pace: pacing at work for one session; it is asked before each draft, and told what became of it."""

from collections.abc import Callable
from dataclasses import dataclass, field

from fleet_device.pacing.contract import DraftOutcome, Pacing, Plan
from fleet_device.session.machine import DeviceSession
from schemas.messages import Draft, Verdict

__all__ = ["RoundTrips", "SessionPacing"]


@dataclass(slots=True)
class RoundTrips:
    """Times from sending a draft to its verdict, of those drafts that got one.

    Attributes:
        count: Drafts.
        total_ms: Summed.
    """

    count: int = 0
    total_ms: float = 0.0

    @property
    def mean_ms(self) -> float | None:
        """Mean of a draft, or None before the first verdict."""
        return self.total_ms / self.count if self.count else None

    def add(self, took_ms: float) -> None:
        """Count one."""
        self.count += 1
        self.total_ms += took_ms


@dataclass(frozen=True, slots=True)
class _Sent:
    draft: Draft
    token_s: float
    at: float
    opening: bool


@dataclass(slots=True)
class SessionPacing:
    """How much a session drafts.

    Attributes:
        session: Whose drafts; has counted the time that they took.
        pacing: Decides, and learns.
        clock: Monotonic seconds.
        drafts: Sent, each counted once.
        round_trips: Of the drafts that got a verdict.
    """

    session: DeviceSession
    pacing: Pacing
    clock: Callable[[], float]
    drafts: int = 0
    round_trips: RoundTrips = field(default_factory=RoundTrips)
    _under_way: dict[tuple[int, int], _Sent] = field(default_factory=dict)
    _draft_ms: float = 0.0  # the session's count when the draft being built was begun
    _opening: bool = True

    def opened(self) -> None:
        """An edge has taken the session, first or again; it answers no earlier draft any more."""
        self._opening = True
        self._begin_anew()

    def plan(self) -> Plan:
        """Return the plan of the draft that is about to be begun."""
        opened = self.session.opened
        assert opened is not None
        self._draft_ms = self.session.counters.draft_ms
        return self.pacing.plan(longest=opened.max_draft, window=opened.window)

    def sent(self, draft: Draft) -> None:
        """A draft is sent."""
        self.drafts += 1
        spent_s = (self.session.counters.draft_ms - self._draft_ms) / 1e3
        token_s = spent_s / len(draft.tokens) if draft.tokens else 0.0
        self._under_way[draft.handle, draft.round] = _Sent(draft, token_s, self.clock(), self._opening)
        self._opening = False

    def heard(self, verdict: Verdict) -> None:
        """A verdict has come; one that is a repeat, or answers no draft of tokens, teaches nothing."""
        sent = self._under_way.pop((verdict.handle, verdict.round), None)
        if sent is None:
            return
        answer_s = self.clock() - sent.at
        self.round_trips.add(answer_s * 1e3)
        tokens = len(sent.draft.tokens)
        if verdict.accepted < tokens:
            self._begin_anew()
        self.pacing.learn(
            DraftOutcome(
                tokens=tokens,
                ahead=sent.draft.more,
                accepted=min(verdict.accepted, tokens),
                token_s=sent.token_s,
                answer_s=answer_s,
                compute_s=verdict.compute_ms / 1e3,
                opening=sent.opening,
            )
        )

    def _begin_anew(self) -> None:
        """What is under way and being built is void."""
        self._under_way.clear()
        self._draft_ms = self.session.counters.draft_ms

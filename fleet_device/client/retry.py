"""Retry policy of a request: how long to wait, when to ask another edge, and when to give up.

Whatever edges answer, a request asks a bounded number of times: only new tokens renew its budget of resumes and early
retries, and the time that it may spend without an answer is limited.

::

                   granted              sent
    ASKING ──┐ ─────────────▶ GRANTED ────────▶ AWAITING ──┐ sent, answered in part
      ▲  ◀───┘ sent              ▲                │  ◀─────┘
      │                          └────────────────┘ answered
      └── resumed, from any phase but LOCAL
          went local, from any phase but LOCAL ──▶ LOCAL

In each phase an edge may have asked to be sent nothing until a moment, so that this delay is no phase of its own.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from fleet_device.client.messaging import EdgePresences, Outbound
from fleet_device.errors import EdgeUnavailable, SessionFailed, SessionRefused
from fleet_device.session.machine import DeviceSession
from fleet_device.session.states import SessionState
from fleet_device.settings import INTERRUPTION_S, OfflinePolicy, Outages
from schemas.control import EdgeState
from schemas.messages import Fault, Progress, Refused
from schemas.reasons import FaultCode, RefusalCode

_log = logging.getLogger(__name__)

WAIT_LOG: Final = f"{__name__}.waits"
"""Logger that reports long waits, for programs that silence it because they show `on_wait` themselves."""

LEAST_WAIT_S: Final = 0.25
"""Minimum time between two messages that an edge has asked the device to delay, whatever time it named."""

REPORT_AFTER_S: Final = 10.0
"""Seconds without tokens after which the reason is reported."""

RECHECK_S: Final = 60.0
"""Longest time for which a refusal keeps a device from asking: an administrator may admit it earlier."""

# Resumes without a new token in between, after which the session has failed.
_MAX_FRUITLESS: Final = 20

# Of these, the ones without a delay; each further one waits twice as long as the one before.
_AT_ONCE: Final = 2
_FIRST_DELAY_S: Final = 0.1

# Retries before their time, because an edge is back, without a new token in between.
_MAX_EARLY: Final = 5

# Returns of the broker or an edge that restart the wait, without a new token in between.
_MAX_RETURNS: Final = 5

# Unanswered Opens after which the interval doubles, and the largest factor.
_UNHURRIED: Final = 4
_SLOWEST: Final = 8

# A longer prompt gives the edge proportionally more time for the first verdict.
_PROMPT_TOKENS: Final = 1024

# Refusals that pass, so that the device retries.
_PASSING: Final = frozenset({RefusalCode.BUSY, RefusalCode.DRAINING})

# Refusals of the device as such, which pass at a time that the edge names.
_TIMED: Final = frozenset({RefusalCode.QUOTA, RefusalCode.QUARANTINED})

# Refusals that another edge may not share.
_ELSEWHERE: Final = _TIMED | {RefusalCode.BUSY, RefusalCode.TOO_LATE}

_MOST_EDGES: Final = 8  # asked in turn for what one of them refuses
_TURNS: Final = 4  # of asking all for the one with the target: Opens of other devices disturb the rotation
_WAIT_WITH_ALL_S: Final = 1.0  # an edge repeats once a second that the device as a whole is over its quota


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Time limits of a request (seconds).

    `verdict_s` passes before a draft is repeated; `retry_s` is the first interval between two Opens while no edge
    answers.
    """

    open_s: float = INTERRUPTION_S
    resume_s: float = 120.0
    verdict_s: float = 10.0
    close_s: float = 5.0
    retry_s: float = 1.0


@dataclass(slots=True)
class EdgeAvailability:
    """Absence of edges and the last timed refusal, kept from one request to the next.

    An edge that was not online at the refusal may be asked. `absent_since` is infinity while an edge is reachable.
    """

    clock: Callable[[], float]
    edges: EdgePresences
    absent_since: float = field(init=False)
    _refused_until: float = -math.inf
    _code: RefusalCode = RefusalCode.OTHER
    _refused_by: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.absent_since = self.clock()

    def note_presence(self, *, absent: bool) -> None:
        """Record whether broker and edge are reachable; call it whenever that may have changed."""
        self.absent_since = min(self.absent_since, self.clock()) if absent else math.inf

    @property
    def absent_s(self) -> float:
        return max(0.0, self.clock() - self.absent_since)

    def note_refusal(self, refused: SessionRefused) -> None:
        if refused.code in _TIMED and refused.retry_s is not None:
            self._refused_until = self.clock() + min(refused.retry_s, RECHECK_S)
            self._code = refused.code
            self._refused_by = self._online()

    def clear_refusal(self) -> None:
        self._refused_until = -math.inf

    @property
    def refused_s(self) -> float:
        """Seconds until an edge may be asked again."""
        return max(0.0, self._refused_until - self.clock()) if self._online() <= self._refused_by else 0.0

    def check_refusal(self, patience_s: float) -> None:
        """Raise SessionRefused if no edge may be asked within a time."""
        if (left_s := self.refused_s) > patience_s:
            why = "quarantined by the edge" if self._code is RefusalCode.QUARANTINED else "over its quota at the edge"
            raise SessionRefused(self._code, f"The device is {why}; ask again in {left_s:.0f} s.", retry_s=left_s)

    def _online(self) -> frozenset[str]:
        return frozenset(state.edge for state in self.edges.online())


class RetryPhase(Enum):
    """What a request waits for."""

    ASKING = auto()  # a grant: no edge has the session
    GRANTED = auto()  # nothing: an edge has the session, and the device drafts
    AWAITING = auto()  # an answer of the edge that has the session
    LOCAL = auto()  # nothing: the draft model generates without an edge


class RetryEvent(Enum):
    SENT = auto()
    GRANTED = auto()
    ANSWERED = auto()  # everything that was sent
    ANSWERED_IN_PART = auto()
    RESUMED = auto()  # the session has lost its edge
    WENT_LOCAL = auto()


_AT_AN_EDGE: Final = (RetryPhase.GRANTED, RetryPhase.AWAITING)

TRANSITIONS: Final[dict[tuple[RetryPhase, RetryEvent], RetryPhase]] = {
    (RetryPhase.ASKING, RetryEvent.SENT): RetryPhase.ASKING,
    (RetryPhase.ASKING, RetryEvent.GRANTED): RetryPhase.GRANTED,
    **{(phase, RetryEvent.SENT): RetryPhase.AWAITING for phase in _AT_AN_EDGE},
    **{(phase, RetryEvent.ANSWERED): RetryPhase.GRANTED for phase in _AT_AN_EDGE},
    **{(phase, RetryEvent.ANSWERED_IN_PART): RetryPhase.AWAITING for phase in _AT_AN_EDGE},
    **{(phase, RetryEvent.RESUMED): RetryPhase.ASKING for phase in (RetryPhase.ASKING, *_AT_AN_EDGE)},
    **{(phase, RetryEvent.WENT_LOCAL): RetryPhase.LOCAL for phase in (RetryPhase.ASKING, *_AT_AN_EDGE)},
}


@dataclass(slots=True)
class RetryBudget:
    """Attempts since the last committed token, which starts the counts again.

    Attributes:
        resumes_left: Resumes that are left; each committed token adds one.
        moves: Resumes because an edge was silent.
        early: Opens before their time, because an edge is back.
        returns: Returns of the broker or an edge that have restarted the wait.
        refusals: Refusals since every edge was last asked.
    """

    resumes_left: int = _MAX_FRUITLESS
    resumes: int = 0
    moves: int = 0
    early: int = 0
    returns: int = 0
    refusals: int = 0

    def renewed(self, tokens: int) -> "RetryBudget":
        return RetryBudget(min(self.resumes_left + tokens, _MAX_FRUITLESS))


def progress_sentence(edge: str, progress: Progress) -> str:
    """Return how far an edge is with what a request waits for, such as "edge-1: prompt 640 of 1,000, about 4 s."."""
    parts = [f"prompt {progress.computed:,} of {progress.tokens:,}"]
    if progress.ahead:
        parts.append(f"{progress.ahead:,} tokens of other requests before it")
    if (left_s := progress.left_s) is not None:
        parts.append(f"about {max(1.0, left_s):.0f} s")
    return f"{edge}: {', '.join(parts)}."


@dataclass(slots=True)
class RetryState:
    """All waits, retries and refusals of one request, and what follows from them.

    A device keeps to the times that edges name, for all its requests, so that it is never quarantined for asking. One
    edge does not speak for the others: each edge that is online is asked once before a refusal counts, so that an edge
    that is wrong or hostile cannot keep a device from the rest.

    Attributes:
        outages: When the offline policy applies, and which.
        refusal: The last refusal, until an edge answers otherwise.
    """

    policy: RetryPolicy
    session: DeviceSession
    outbound: Outbound
    availability: EdgeAvailability
    outages: Outages = field(default_factory=Outages)
    on_wait: Callable[[str], None] = lambda _reason: None
    phase: RetryPhase = RetryPhase.ASKING
    resumes: int = 0
    refusal: SessionRefused | None = None
    budget: RetryBudget = field(default_factory=RetryBudget)
    _unanswered: int = 0  # messages since the last answer
    _sent_at: float = field(init=False)  # the last message
    _waiting_since: float = field(init=False)  # an answer is owed since
    _not_before: float = -math.inf  # nothing is sent until then
    _report_at: float = field(init=False)  # when to report why no tokens come
    _absent_since: float = math.inf  # this request has had no edge since then
    _progress: Progress | None = None  # the latest that the edge has sent
    _next_edge_at: float = math.inf  # when the first of the edges that refused may be asked again

    def __post_init__(self) -> None:
        self._sent_at = self._waiting_since = self.clock()
        self.note_progress()

    @property
    def clock(self) -> Callable[[], float]:
        return self.availability.clock

    # What has happened

    def note_sent(self) -> None:
        self._sent_at = self.clock()
        if not self._owed:
            self._waiting_since = self._sent_at
        self._move(RetryEvent.SENT)
        self._unanswered += 1

    def note_open(self) -> None:
        self.note_sent()
        self.refusal = None

    def note_granted(self) -> None:
        self._move(RetryEvent.GRANTED)
        self.refusal = None
        self.availability.clear_refusal()
        self._unanswered = 0

    def note_answer(self, *, tokens: int, more: bool = False) -> None:
        """Record an answer that has committed some tokens; `more` answers may be owed."""
        self._move(RetryEvent.ANSWERED_IN_PART if more else RetryEvent.ANSWERED)
        self._waiting_since = self.clock()
        self._unanswered = 0
        if tokens:
            self.budget = self.budget.renewed(tokens)
            self._next_edge_at = math.inf
            self.note_progress()

    def note_working(self, progress: Progress) -> None:
        """Wait on, because the edge computes what this request waits for; report how far it is."""
        if self.phase is not RetryPhase.AWAITING or progress == self._progress:
            return
        self._progress = progress
        self._sent_at = self._waiting_since = self.clock()
        self._unanswered = 0
        self.refusal = None
        self.note_progress()
        assert self._edge is not None
        self.on_wait(progress_sentence(self._edge, progress))

    def note_progress(self) -> None:
        """Restart the wait that is reported: new tokens have arrived."""
        self._report_at = self.clock() + REPORT_AFTER_S

    def note_resume(self, cause: str, *, silent: bool = False) -> None:
        """Record that the session is opened again, and delay that if it happens too often.

        `cause` ends a sentence; after a `silent` edge the next one gets twice the time. Raise SessionFailed after too
        many resumes for the tokens that were committed.
        """
        if not self.budget.resumes_left:
            raise SessionFailed(f"The session was resumed {self.resumes} times without progress: {cause}")
        self._move(RetryEvent.RESUMED)
        self.resumes += 1
        self.budget.resumes_left -= 1
        self.budget.resumes += 1
        self.budget.moves += silent
        self._unanswered = 0
        self._waiting_since = self.clock()
        if (late := self.budget.resumes - _AT_ONCE) > 0:
            delay_s = min(_FIRST_DELAY_S * 2.0 ** (late - 1), self.policy.retry_s)
            self._not_before = max(self._not_before, self.clock() + delay_s)

    def note_local(self) -> None:
        self._move(RetryEvent.WENT_LOCAL)

    def hold(self, seconds: float) -> None:
        """Send nothing for a time; several in a row add up to `LEAST_WAIT_S` each."""
        now = self.clock()
        self._not_before = max(now + seconds, max(now, self._not_before) + LEAST_WAIT_S)

    def hold_for_quota(self, seconds: float, reason: str) -> None:
        """Send nothing for a time, because the device has used up a quota at the edge."""
        _log.warning("A request waits %.1f s: %s", seconds, reason)
        self.session.counters.quota_wait_ms += seconds * 1e3
        self.hold(seconds)

    # How long to wait

    @property
    def held(self) -> bool:
        """Whether nothing is sent now: an edge asks for a delay, after many resumes, or none has the target model."""
        return self.clock() < self._not_before or self._waits_for_target

    @property
    def _waits_for_target(self) -> bool:
        """Whether edges are online, and none has the target model that the request began with."""
        if self.phase is not RetryPhase.ASKING or (wanted := self.session.wanted_target) is None:
            return False
        edges = self.availability.edges
        return bool(edges.online()) and not edges.serving(wanted)

    def deadline(self) -> float:
        """Return the moment at which `check` or a repeat is due if nothing arrives."""
        report_at = self._report_at if self._owed or self.held else math.inf
        return min(self._repeat_at, self._give_up_at, report_at, self._outage_at())

    def may_repeat(self) -> bool:
        """Whether the answer is late enough to send again."""
        return self.clock() >= self._repeat_at

    def may_repeat_early(self) -> bool:
        """Whether to send again before the time, because an edge is back; each use is counted."""
        if self.held or self.budget.early >= _MAX_EARLY:
            return False
        self.budget.early += 1
        return True

    # When to go to another edge

    def may_go_elsewhere(self) -> bool:
        """Whether the edge that has the session has been silent for too long, and another one is online."""
        opened = self.session.opened
        if self.phase is not RetryPhase.AWAITING or opened is None or not self.outbound.connected:
            return False
        if self.clock() - self._silent_since < self.policy.verdict_s * self._patience * 2.0**self.budget.moves:
            return False
        return any(state.edge != opened.edge for state in self._edges)

    def ask_another(self, retry_s: float | None) -> bool:
        """Count a refusal, which ends in `retry_s` seconds if known; return whether to ask another edge next."""
        now = self.clock()
        if self._next_edge_at <= now:
            self._next_edge_at = math.inf
        if retry_s is not None:
            self._next_edge_at = min(self._next_edge_at, now + retry_s)
        self.budget.refusals += 1
        online = len(self._edges)
        # One more than there are: an edge that answers what another was asked leaves that one time to answer too.
        return online > 1 and self.budget.refusals <= min(online, _MOST_EDGES)

    # When to give up

    def postpone(self, refused: Refused) -> None:
        """Delay the next Open for as long as a refusal asks for; raise it if that is too long."""
        retry_s = refused.retry_s
        if refused.code is RefusalCode.OTHER_TARGET:
            # The shared subscription rotates, so that another edge takes the next Open.
            if self.budget.refusals <= _TURNS * min(len(self.availability.edges.online()), _MOST_EDGES):
                self.budget.refusals += 1
                self.hold(0.0)
            return
        if refused.code in _ELSEWHERE:
            if self.ask_another(retry_s):
                self.refusal = SessionRefused(refused.code, refused.sentence, retry_s=retry_s)
                self.hold(0.0)
                return
            retry_s = self._shortest(retry_s)
        error = SessionRefused(refused.code, refused.sentence, retry_s=retry_s)
        self.availability.note_refusal(error)
        if refused.code in _TIMED:
            self._wait_out(error, retry_s)
        if refused.code not in _PASSING | _TIMED:
            raise error
        self.refusal = error

    def wait_out(self, fault: Fault) -> bool:
        """Keep the session and send nothing while a fault lasts; return False if another edge takes over."""
        seconds = fault.retry_s or 0.0
        # An edge that brings nothing for as long as a silent one may is left like a silent one.
        if self._waited_s + seconds >= self.policy.verdict_s and self.ask_another(seconds):
            return False
        self.refusal = SessionRefused(RefusalCode.QUOTA, fault.sentence, retry_s=fault.retry_s)
        self._wait_out(self.refusal, seconds, least_s=_WAIT_WITH_ALL_S if fault.handle is None else 0.0)
        return True

    def give_up(self, fault: Fault) -> None:
        """End the session, unless the edge shuts out the device and another edge can be asked.

        Raise SessionRefused if all online edges shut the device out, and its next requests as well; else SessionFailed.
        """
        if fault.code is not FaultCode.QUOTA or fault.retry_s is None:
            raise SessionFailed(fault.sentence)
        if self.ask_another(fault.retry_s):
            return
        shut_out = SessionRefused(RefusalCode.QUARANTINED, fault.sentence, retry_s=self._shortest(fault.retry_s))
        self.availability.note_refusal(shut_out)
        raise shut_out

    def check(self) -> str | None:
        """Return why the generation is to go on without an edge; None while it waits for one.

        When the wait is over, raise SessionRefused if the last answer was a refusal, else EdgeUnavailable, which is
        also raised if the offline policy is to fail.
        """
        if (cause := self._outage()) is None:
            self.check_wait()
            return None
        if self.outages.policy is OfflinePolicy.OTHER_TARGET:
            _log.warning("The generation continues with another target model: %s", cause)
            self.session.any_target = True
            self._absent_since = math.inf
            return None
        if self.outages.policy is not OfflinePolicy.LOCAL:
            raise self.refusal or cause
        _log.warning("The generation continues without an edge: %s", cause)
        return str(cause)

    def check_wait(self) -> None:
        """Report why no tokens come once that has lasted; raise when the wait is over, as `check` does."""
        if self.session.ended is not None:
            return
        now = self.clock()
        if now > self._give_up_at:
            raise self.refusal or self._silence(self._limit_s)
        if (self._owed or self.held) and now >= self._report_at:
            waited_s = max(1.0, now - self._report_at + REPORT_AFTER_S)
            self._report_at = math.inf
            reason: Exception = self._silence(waited_s)
            if self.outbound.connected and self.refusal is not None:
                reason = self.refusal
            logging.getLogger(WAIT_LOG).warning("Waiting: %s", reason)
            self.on_wait(str(reason))

    # Moments, infinity for never

    @property
    def _repeat_at(self) -> float:
        if self._waits_for_target:
            return math.inf
        if self._sent_at < self._not_before:
            return self._not_before
        return self._sent_at + (self._interval_s if self.phase is RetryPhase.ASKING else self.policy.verdict_s)

    @property
    def _give_up_at(self) -> float:
        # With the policy `wait`, the application decides how long.
        return self._waiting_since + self._limit_s if self._owed and not self._waits else math.inf

    def _outage_at(self) -> float:
        """Return the moment from which the offline policy applies."""
        self._track_absence()
        if self._waits or self.session.ended is not None:
            return math.inf
        if self._absent_since < math.inf:
            return min(self._absent_since, self.availability.absent_since) + self.outages.absence_s
        return math.inf if self.held or not self._owed else self._silent_since + self._longest_silence_s

    # Private

    def _move(self, event: RetryEvent) -> None:
        try:
            self.phase = TRANSITIONS[self.phase, event]
        except KeyError:
            raise ValueError(f"a request that is {self.phase.name} takes no {event.name}") from None

    @property
    def _owed(self) -> bool:
        """Whether an edge owes an answer."""
        return self.phase in (RetryPhase.ASKING, RetryPhase.AWAITING)

    @property
    def _waits(self) -> bool:
        """Whether the request waits without a limit; only refusals that name a time still have one."""
        if self.outages.policy is OfflinePolicy.OTHER_TARGET:
            return not self._others_serve
        return self.outages.policy is OfflinePolicy.WAIT

    @property
    def _waited_s(self) -> float:
        return self.clock() - self._waiting_since if self._owed else 0.0

    @property
    def _silent_since(self) -> float:
        """Moment since which the edge is silent: one that asks for a delay is not."""
        return max(self._waiting_since, self._not_before)

    @property
    def _edges(self) -> tuple[EdgeState, ...]:
        """Edges that are online and may continue this request."""
        return self.availability.edges.serving(self.session.wanted_target)

    @property
    def _others_serve(self) -> bool:
        """Whether another target model could continue what this one has begun."""
        return self.outbound.connected and len(self._edges) < len(self.availability.edges.online())

    @property
    def _edge(self) -> str | None:
        return None if self.session.opened is None else self.session.opened.edge

    @property
    def _interval_s(self) -> float:
        """Interval between two Opens: it grows, so that an edge that comes back does not find many."""
        return self.policy.retry_s * min(2.0 ** (max(0, self._unanswered - 1) // _UNHURRIED), _SLOWEST)

    @property
    def _limit_s(self) -> float:
        first = self.phase is RetryPhase.ASKING and self.resumes == 0
        return self.policy.open_s if first else self.policy.resume_s

    @property
    def _patience(self) -> float:
        """Factor on the time that the edge may take: more for a prompt that it has to compute."""
        opened = self.session.opened
        prompt = len(self.session.request.prompt) + opened.position if opened and self.session.first_under_way else 0
        return max(1.0, prompt / _PROMPT_TOKENS)

    @property
    def _longest_silence_s(self) -> float:
        """Time for which an edge that is online may be silent (seconds)."""
        patience_s = self.outages.answer_s * self._patience
        return patience_s if self.session.granted else min(patience_s, self.policy.open_s)

    def _shortest(self, retry_s: float | None) -> float | None:
        return retry_s if retry_s is None else min(retry_s, max(0.0, self._next_edge_at - self.clock()))

    def _wait_out(self, error: SessionRefused, retry_s: float | None, *, least_s: float = 0.0) -> None:
        waited_s = 0.0 if self._waits else self._waited_s
        if retry_s is None or waited_s + retry_s > self._limit_s:
            raise error
        self.hold_for_quota(max(retry_s, least_s), str(error))
        self.budget.refusals, self._next_edge_at = 0, math.inf  # after that time every edge is asked again

    def _outage(self) -> EdgeUnavailable | None:
        """Return why no edge answers, once that has lasted long enough for the offline policy to apply."""
        now = self.clock()
        if now < self._outage_at():
            return None
        if self._absent_since == math.inf:
            return self._silence(self._longest_silence_s)
        absent_s = now - min(self._absent_since, self.availability.absent_since)
        return self._silence(max(1.0, absent_s))

    def _silence(self, waited_s: float) -> EdgeUnavailable:
        return self.outbound.silence(waited_s, edge=self._edge, target_id=self.session.wanted_target)

    def _track_absence(self) -> None:
        """Record since when this request has no edge, and restart the wait when it has one again."""
        if self._edge_loads:
            # It takes what it takes; the edge reports when it is ready, or has failed.
            self._absent_since = math.inf
            self._waiting_since = max(self.clock(), self._not_before)
        elif self._absent():
            self._absent_since = min(self._absent_since, self.clock())
        elif self._absent_since < math.inf:
            self._absent_since = math.inf
            # Not without end, for an edge that comes and goes.
            if self.budget.returns < _MAX_RETURNS:
                self.budget.returns += 1
                self._waiting_since = max(self.clock(), self._not_before)

    @property
    def _edge_loads(self) -> bool:
        """Whether to wait for an edge that loads its target model, because nothing but an edge can continue."""
        if self.phase is not RetryPhase.ASKING or not self.outbound.connected:
            return False
        return self.outages.policy is not OfflinePolicy.LOCAL and bool(self.availability.edges.loading())

    def _absent(self) -> bool:
        if not self.outbound.connected:
            return True
        # An edge that has granted the session reports when it goes, or the broker does so for it.
        if self.phase in _AT_AN_EDGE:
            return False
        return self.session.state is SessionState.UNDELIVERED or not self._edges

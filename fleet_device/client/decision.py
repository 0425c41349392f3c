"""What a request does next: send, repeat, resume, wait, go on without an edge, or fail.

`decide` is a pure function of the session, of what the request remembers of its attempts (`RetryState`), of the edges,
and of the time. Whatever edges answer, a request asks a bounded number of times: it has one budget of attempts, which
new tokens renew, and the time that it may spend without an answer is limited.

A device keeps to the times that edges name, for all its requests, so that it is never quarantined for asking. One edge
does not speak for the others: each edge that is online is asked once before a refusal counts, so that an edge that is
wrong or hostile cannot keep a device from the rest.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fleet_device.client.messaging import EdgePresences
from fleet_device.errors import SessionFailed, SessionRefused
from fleet_device.session.machine import DeviceSession
from fleet_device.session.states import SessionState
from fleet_device.settings import INTERRUPTION_S, OfflinePolicy, Outages
from schemas.control import EdgeState
from schemas.messages import Fault, Progress, Refused
from schemas.reasons import FaultCode, RefusalCode

_log = logging.getLogger(__name__)

LEAST_WAIT_S: Final = 0.25
"""Minimum time between two messages that an edge has asked the device to delay, whatever time it named."""

REPORT_AFTER_S: Final = 10.0
"""Seconds without tokens after which the reason is reported."""

RECHECK_S: Final = 60.0
"""Longest time for which a refusal keeps a device from asking: an administrator may admit it earlier."""

# Attempts without a new token in between, after which the session has failed. The first resumes have no delay.
_MAX_ATTEMPTS: Final = 20
_AT_ONCE: Final = 2
_FIRST_DELAY_S: Final = 0.1

# Attempts without a new token, after which the return of the broker or of an edge changes nothing any more.
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
    """The edges as a device knows them, and the last timed refusal, kept from one request to the next.

    An edge that was not online at the refusal may be asked. `absent_since` is infinity while an edge is reachable.
    """

    clock: Callable[[], float]
    edges: EdgePresences
    connected: Callable[[], bool] = lambda: True
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


# Decisions


@dataclass(frozen=True, slots=True)
class Silence:
    """No edge has answered for a time (seconds)."""

    waited_s: float


Reason = Silence | SessionRefused


@dataclass(frozen=True, slots=True)
class Send:
    """Send a new Open, or draft on."""


@dataclass(frozen=True, slots=True)
class Repeat:
    """Send again what was not answered."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Leave a silent edge; with `any_target`, for an edge with another target model if need be."""

    reason: Silence
    any_target: bool = False


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait for a message, no longer than `until`; report the reason, if there is one."""

    until: float
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class Local:
    reason: Silence


@dataclass(frozen=True, slots=True)
class Fail:
    reason: Reason


Decision = Send | Repeat | Resume | Wait | Local | Fail


# What a request remembers


@dataclass(frozen=True, slots=True)
class RetryBudget:
    """Attempts of a request: resumes, and waits that begin again because the broker or an edge is back.

    Each costs one, and each committed token adds one. Delays double with those `spent` since the last token.
    """

    left: int = _MAX_ATTEMPTS
    spent: int = 0

    def reduced(self) -> "RetryBudget":
        return RetryBudget(self.left - 1, self.spent + 1)

    def renewed(self, tokens: int) -> "RetryBudget":
        return RetryBudget(min(self.left + tokens, _MAX_ATTEMPTS))


@dataclass(slots=True)
class RetryState:
    """State of a request between its attempts; moments are infinite for never.

    Attributes:
        sent_at: The last message was sent then.
        waiting_since: An answer is owed since then.
        not_before: Nothing is sent until then.
        report_at: The reason why no tokens come is reported then.
        absent_since: This request has had no edge since then.
        unanswered: Messages since the last answer.
        refusal: The last refusal, until an edge answers otherwise.
        refusals: Refusals since every edge was last asked.
        next_edge_at: The first of the edges that refused may be asked again then.
        progress: The latest that the edge has sent.
    """

    policy: RetryPolicy
    outages: Outages
    sent_at: float
    waiting_since: float = field(init=False)
    not_before: float = -math.inf
    report_at: float = field(init=False)
    absent_since: float = math.inf
    unanswered: int = 0
    budget: RetryBudget = field(default_factory=RetryBudget)
    refusal: SessionRefused | None = None
    refusals: int = 0
    next_edge_at: float = math.inf
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self.waiting_since = self.sent_at
        self.note_tokens(self.sent_at)

    def note_sent(self, session: DeviceSession, now: float) -> None:
        self.sent_at = now
        if session.opened is not None and not self.unanswered:
            self.waiting_since = now
        self.unanswered += 1

    def note_granted(self) -> None:
        self.refusal = None
        self.unanswered = 0

    def note_answer(self, now: float, *, tokens: int) -> None:
        """Record an answer that has committed some tokens."""
        self.waiting_since = now
        self.unanswered = 0
        if now >= self.not_before:
            self.refusal = None
        if tokens:
            self.budget = self.budget.renewed(tokens)
            self.refusals, self.next_edge_at = 0, math.inf
            self.note_tokens(now)

    def note_tokens(self, now: float) -> None:
        self.report_at = now + REPORT_AFTER_S

    def note_working(self, progress: Progress, now: float) -> bool:
        """Wait on, because the edge computes what this request waits for; return False if it is no further."""
        if progress == self.progress:
            return False
        self.progress = progress
        self.sent_at = self.waiting_since = now
        self.refusal = None
        self.note_tokens(now)
        return True

    def note_repeat_due(self) -> None:
        """Repeat as soon as no delay forbids it: messages may have been lost with a connection."""
        self.sent_at = -math.inf

    def note_resume(self, now: float) -> None:
        """Record that the session is opened again, and delay that if it happens too often."""
        self.budget = self.budget.reduced()
        self.unanswered = 0
        self.waiting_since = now
        if (late := self.budget.spent - _AT_ONCE) > 0:
            delay_s = _backoff(_FIRST_DELAY_S, late - 1, self.policy.retry_s)
            self.not_before = max(self.not_before, now + delay_s)

    def note_return(self, now: float) -> bool:
        """Start the wait again because the broker or an edge is back; False if that happens too often."""
        self.absent_since = math.inf
        if self.budget.spent >= _MAX_RETURNS:
            return False
        self.budget = self.budget.reduced()
        self.waiting_since = max(now, self.not_before)
        return True

    def hold(self, seconds: float, now: float) -> None:
        """Send nothing for a time; several in a row add up to `LEAST_WAIT_S` each."""
        self.not_before = max(now + seconds, max(now, self.not_before) + LEAST_WAIT_S)

    def hold_for_quota(self, session: DeviceSession, seconds: float, now: float, reason: str) -> None:
        """Send nothing for a time, because the device has used up a quota at the edge."""
        _log.warning("A request waits %.1f s: %s", seconds, reason)
        session.counters.quota_wait_ms += seconds * 1e3
        self.hold(seconds, now)

    def note_edges(self, session: DeviceSession, edges: EdgeAvailability, now: float) -> None:
        """Record since when this request has no edge, and restart the wait when it has one again."""
        view = _View(session, self, edges, now)
        if view.edge_loads:
            # It takes what it takes; the edge reports when it is ready, or has failed.
            self.absent_since = math.inf
            self.waiting_since = max(now, self.not_before)
        elif view.absent:
            self.absent_since = min(self.absent_since, now)
        elif self.absent_since < math.inf:
            self.absent_since = math.inf
            if view.owed:
                self.note_return(now)


# Decisions by time


def decide(session: DeviceSession, retry: RetryState, edges: EdgeAvailability, now: float) -> Decision:
    """Decide for a request that has handled all messages, and has not ended."""
    view = _View(session, retry, edges, now)
    if (end_of_wait := _end_of_wait(view)) is not None:
        return end_of_wait
    if not view.held and (session.may_send or session.may_open):
        return Send()
    reason: Reason | None = None
    if now < retry.report_at:
        if view.owed and now >= view.repeat_at:
            return Repeat()
    else:
        silence = Silence(max(1.0, now - retry.report_at + REPORT_AFTER_S))
        reason = silence if retry.refusal is None or not edges.connected() else retry.refusal
    return Wait(min(view.repeat_at, retry.report_at, view.ends_at, view.leave_at), reason)


def _end_of_wait(view: "_View") -> Resume | Local | Fail | None:
    retry, now = view.retry, view.now
    if view.leave_at <= now:
        return Resume(Silence(max(1.0, now - view.silent_since)))
    if now < view.ends_at:
        return None
    if retry.refusal is None or view.silent:  # edges that refuse are no outage
        match retry.outages.policy:
            case OfflinePolicy.OTHER_TARGET:
                return Resume(view.outage, any_target=True)
            case OfflinePolicy.LOCAL:
                return Local(view.outage)
    return Fail(retry.refusal or view.outage)


def is_held(session: DeviceSession, retry: RetryState, edges: EdgeAvailability, now: float) -> bool:
    """Nothing is sent now: an edge asked for a delay, many resumes failed, or no edge has the target model."""
    return _View(session, retry, edges, now).held


def _backoff(first_s: float, doublings: int, max_s: float = math.inf) -> float:
    return min(first_s * 2.0**doublings, max_s)


@dataclass(frozen=True, slots=True)
class _View:
    """Conclusions about a request at one moment, from which `decide` chooses."""

    session: DeviceSession
    retry: RetryState
    edges: EdgeAvailability
    now: float

    # Its edges

    @property
    def serving(self) -> tuple[EdgeState, ...]:
        """Edges that are online and may continue this request."""
        return self.edges.edges.serving(self.session.wanted_target)

    @property
    def waits_for_target(self) -> bool:
        """Edges are online, and none has the target model that the request began with."""
        if self.session.opened is not None or self.session.wanted_target is None:
            return False
        return bool(self.edges.edges.online()) and not self.serving

    @property
    def edge_loads(self) -> bool:
        """An edge loads its target model, and nothing but an edge can continue."""
        if self.session.opened is not None or not self.edges.connected():
            return False
        return self.retry.outages.policy is not OfflinePolicy.LOCAL and bool(self.edges.edges.loading())

    @property
    def absent(self) -> bool:
        if not self.edges.connected():
            return True
        # An edge that has granted the session reports when it goes, or the broker does so for it.
        if self.session.opened is not None:
            return False
        return self.session.state is SessionState.UNDELIVERED or not self.serving

    # Its waits

    @property
    def owed(self) -> bool:
        """An edge owes an answer."""
        return self.session.opened is None or bool(self.session.unanswered())

    @property
    def held(self) -> bool:
        return self.now < self.retry.not_before or self.waits_for_target

    @property
    def unlimited(self) -> bool:
        """The request waits without a limit; only refusals that name a time still have one."""
        policy = self.retry.outages.policy
        if policy is OfflinePolicy.OTHER_TARGET:
            return not self.edges.connected() or len(self.serving) == len(self.edges.edges.online())
        return policy is OfflinePolicy.WAIT

    @property
    def waited_s(self) -> float:
        return self.now - self.retry.waiting_since if self.owed else 0.0

    @property
    def silent_since(self) -> float:
        """Moment since which the edge is silent: one that asks for a delay is not."""
        return max(self.retry.waiting_since, self.retry.not_before)

    @property
    def patience(self) -> float:
        """Factor on the time that the edge may take: more for a prompt that it has to compute."""
        session = self.session
        opened = session.opened
        prompt = len(session.request.prompt) + opened.position if opened and session.first_under_way else 0
        return max(1.0, prompt / _PROMPT_TOKENS)

    @property
    def limit_s(self) -> float:
        return self.retry.policy.resume_s if self.session.granted else self.retry.policy.open_s

    @property
    def longest_silence_s(self) -> float:
        """Time for which an edge that is online may be silent (seconds)."""
        patience_s = self.retry.outages.answer_s * self.patience
        return patience_s if self.session.granted else min(patience_s, self.retry.policy.open_s)

    # Moments, infinity for never

    @property
    def repeat_at(self) -> float:
        retry, policy = self.retry, self.retry.policy
        if self.waits_for_target:
            return math.inf
        if retry.sent_at < retry.not_before:
            return retry.not_before
        if not self.owed:
            return math.inf
        if self.session.opened is not None:
            return retry.sent_at + policy.verdict_s
        # It grows, so that an edge that comes back does not find many Opens.
        doublings = max(0, retry.unanswered - 1) // _UNHURRIED
        return retry.sent_at + _backoff(policy.retry_s, doublings, policy.retry_s * _SLOWEST)

    @property
    def leave_at(self) -> float:
        """When the session leaves an edge that is silent, because another one is online."""
        opened, policy, retry = self.session.opened, self.retry.policy, self.retry
        if opened is None or not self.owed or not self.edges.connected():
            return math.inf
        if all(state.edge == opened.edge for state in self.serving):
            return math.inf
        return self.silent_since + _backoff(policy.verdict_s * self.patience, retry.budget.spent)

    @property
    def ends_at(self) -> float:
        """When the wait ends: nobody has answered for too long, or has granted the session."""
        if self.unlimited:  # the application decides how long
            return math.inf
        if self.retry.absent_since < math.inf:
            return self.absent_since + self.retry.outages.absence_s
        if not self.owed:
            return math.inf
        return min(self.silent_since + self.longest_silence_s, self.retry.waiting_since + self.limit_s)

    @property
    def silent(self) -> bool:
        return self.retry.absent_since < math.inf or self.now >= self.silent_since + self.longest_silence_s

    @property
    def absent_since(self) -> float:
        return min(self.retry.absent_since, self.edges.absent_since)

    @property
    def outage(self) -> Silence:
        since = self.silent_since if self.retry.absent_since == math.inf else self.absent_since
        return Silence(max(1.0, self.now - since))


# Refusals and faults


def on_refused(
    session: DeviceSession, retry: RetryState, edges: EdgeAvailability, now: float, refused: Refused
) -> None:
    """Delay the next Open for as long as a refusal asks for; raise it if that is too long."""
    retry_s = refused.retry_s
    if refused.code is RefusalCode.OTHER_TARGET:
        # The shared subscription rotates, so that another edge takes the next Open.
        online = min(len(edges.edges.online()), _MOST_EDGES)
        if retry.refusals <= _TURNS * online:
            retry.refusals += 1
            if retry.refusals >= online:
                retry.hold(0.0, now)
        return
    view = _View(session, retry, edges, now)
    if refused.code in _ELSEWHERE:
        if _ask_another(view, retry_s):
            retry.refusal = SessionRefused(refused.code, refused.sentence, retry_s=retry_s)
            retry.hold(0.0, now)
            return
        retry_s = _shortest(retry, retry_s, now)
    error = SessionRefused(refused.code, refused.sentence, retry_s=retry_s)
    edges.note_refusal(error)
    if refused.code in _TIMED:
        _wait_out(view, error, retry_s)
    if refused.code not in _PASSING | _TIMED:
        raise error
    retry.refusal = error


def on_wait(session: DeviceSession, retry: RetryState, edges: EdgeAvailability, now: float, fault: Fault) -> bool:
    """Keep the session and send nothing while a fault lasts; return False if another edge takes over."""
    view, seconds = _View(session, retry, edges, now), fault.retry_s or 0.0
    # An edge that answers nothing for as long as a silent one may is left like a silent one.
    if view.waited_s + seconds >= retry.policy.verdict_s and _ask_another(view, seconds):
        return False
    retry.refusal = SessionRefused(RefusalCode.QUOTA, fault.sentence, retry_s=fault.retry_s)
    _wait_out(view, retry.refusal, seconds, min_s=_WAIT_WITH_ALL_S if fault.handle is None else 0.0)
    return True


def on_give_up(session: DeviceSession, retry: RetryState, edges: EdgeAvailability, now: float, fault: Fault) -> None:
    """End the session, unless the edge shuts out the device and another edge can be asked.

    Raise SessionRefused if all online edges shut the device out, and its next requests as well; else SessionFailed.
    """
    if fault.code is not FaultCode.QUOTA or fault.retry_s is None:
        raise SessionFailed(fault.sentence)
    if _ask_another(_View(session, retry, edges, now), fault.retry_s):
        return
    retry_s = _shortest(retry, fault.retry_s, now)
    shut_out = SessionRefused(RefusalCode.QUARANTINED, fault.sentence, retry_s=retry_s)
    edges.note_refusal(shut_out)
    raise shut_out


def _ask_another(view: _View, retry_s: float | None) -> bool:
    """Count a refusal, which ends in `retry_s` seconds if known; return whether to ask another edge next."""
    retry, now = view.retry, view.now
    if retry.next_edge_at <= now:
        retry.next_edge_at = math.inf
    if retry_s is not None:
        retry.next_edge_at = min(retry.next_edge_at, now + retry_s)
    retry.refusals += 1
    online = len(view.serving)
    # One more than there are: an edge that answers what another was asked leaves that one time to answer too.
    return online > 1 and retry.refusals <= min(online, _MOST_EDGES)


def _shortest(retry: RetryState, retry_s: float | None, now: float) -> float | None:
    return retry_s if retry_s is None else min(retry_s, max(0.0, retry.next_edge_at - now))


def _wait_out(view: _View, error: SessionRefused, retry_s: float | None, *, min_s: float = 0.0) -> None:
    waited_s = 0.0 if view.unlimited else view.waited_s
    if retry_s is None or waited_s + retry_s > view.limit_s:
        raise error
    view.retry.hold_for_quota(view.session, max(retry_s, min_s), view.now, str(error))
    view.retry.refusals, view.retry.next_edge_at = 0, math.inf  # after that time every edge is asked again

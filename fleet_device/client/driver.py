"""Session driver: runs one request over a link, through losses, restarts and cancellation.

`DeviceSession` decides what is sent and committed, `decide` what is done when. The driver moves messages between them,
the drafter and the link. `run` takes a request to its end. It consists of `step`, which does what can be done now, and
`on_quiet`, for when nothing has arrived in time, so that tests drive it without threads or sleeping.
"""

import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from fleet_device.client.decision import (
    Decision,
    EdgeAvailability,
    Fail,
    Local,
    Reason,
    Repeat,
    Resume,
    RetryState,
    Send,
    Wait,
    decide,
    is_held,
    on_give_up,
    on_refused,
    on_wait,
)
from fleet_device.client.drafting import Drafting
from fleet_device.client.messaging import (
    ConnectionChanged,
    EdgeStateChanged,
    Event,
    Inbox,
    Outbound,
    ReceivedVerdict,
    Undelivered,
)
from fleet_device.errors import EdgeUnavailable, SessionFailed, SessionRefused
from fleet_device.requests.generate import RequestContext
from fleet_device.session.machine import DeviceSession
from fleet_device.session.sequence import CommittedTokens, TokenOrigin
from fleet_device.session.states import SessionState
from schemas.control import Presence
from schemas.errors import FleetError
from schemas.fields import MAX_CODE, MAX_SENTENCE
from schemas.messages import Close, Closed, Draft, Fault, Open, Opened, Progress, Refused
from schemas.printable import printable_line
from schemas.reasons import Action, EndReason
from schemas.topics import Topic

_log = logging.getLogger(__name__)

WAIT_LOG: Final = f"{__name__}.waits"
"""Logger that reports long waits, for programs that silence it because they show `on_wait` themselves."""

_KEPT_EVERY: Final = 64  # tokens without an edge, between two reports of the unfinished session

_MIN_WAIT_S: Final = 0.01  # a deadline that has passed is handled after the messages that are here

_WORDS: Final = re.compile(r"(?<=[a-z])(?=[A-Z])")

_UNFINISHED: Final = {"code": "process-ended", "sentence": "The device's program ended during the generation."}


def progress_sentence(edge: str, progress: Progress) -> str:
    """Return how far an edge is with what a request waits for, such as "edge-1: prompt 640 of 1,000, about 4 s."."""
    parts = [f"prompt {progress.computed:,} of {progress.tokens:,}"]
    if progress.ahead:
        parts.append(f"{progress.ahead:,} tokens of other requests before it")
    if (left_s := progress.left_s) is not None:
        parts.append(f"about {max(1.0, left_s):.0f} s")
    return f"{edge}: {', '.join(parts)}."


@dataclass(slots=True)
class SessionDriver:
    """Run one session: handle its events, draft, and send what is due.

    Attributes:
        end_tokens: Ids that end a generation without an edge.
        on_local: Receives, while the generation goes on without an edge, the Close to report should it never end.
        keep: Receives the Close to repeat until an edge confirms it.
        claim: Takes the handle that an edge has granted; False if another request of this device has it.
    """

    session: DeviceSession
    drafting: Drafting
    outbound: Outbound
    inbox: Inbox
    retry: RetryState
    availability: EdgeAvailability
    context: RequestContext = field(default_factory=RequestContext)
    end_tokens: tuple[int, ...] = ()
    on_local: Callable[[Close], None] = lambda _close: None
    keep: Callable[[Close], None] = lambda _close: None
    claim: Callable[[int], bool] = lambda _handle: True
    closing: "SessionEnd" = field(init=False)
    first_at: float | None = None
    resumes: int = 0
    _local_cause: str = ""  # why the generation goes on without an edge

    def __post_init__(self) -> None:
        self.closing = SessionEnd(self.session, self.outbound, self.clock, self.keep)

    @property
    def clock(self) -> Callable[[], float]:
        return self.availability.clock

    @property
    def done(self) -> bool:
        return self.closing.done

    def run(self) -> None:
        """Run the request to its end, and close the session, also after a DeviceError or DrafterError."""
        try:
            self.start()
            while not self.done:
                if not self.step():
                    self._wait()
        except BaseException as error:
            self.closing.fail(error)
            raise

    def start(self) -> None:
        self.drafting.restart()  # first, so that no edge receives a prompt that cannot be drafted for
        self._act(self._decide())

    def step(self) -> bool:
        """Handle an event, draft a token, or send what is due; return False if there is nothing to do but wait."""
        if self.context.cancellation.requested:
            self.session.cancel(EndReason.CANCELLED)
        if self.session.ended is not None and not self.closing.begun:
            self.closing.begin(within_s=self.retry.policy.close_s)
        elif (event := self.inbox.get()) is not None:
            self._handle(event)
        elif self.session.local:
            self._generate_alone()
        elif not self.closing.begun and isinstance(self._decide(), Send):
            self._send_next()
        else:
            return False
        return True

    def quiet_s(self) -> float:
        """Return how long to wait for the next message before `on_quiet` (seconds)."""
        if self.closing.begun:
            return self.closing.left_s
        decision = self._decide()
        return max(_MIN_WAIT_S, decision.until - self.clock()) if isinstance(decision, Wait) else _MIN_WAIT_S

    def on_quiet(self) -> None:
        """Do what is due because nothing has arrived in time."""
        if self.closing.begun:
            self.closing.on_quiet()
        else:
            self._act(self._decide())

    def resume(self, cause: str = "the edge went away.") -> None:
        """Open the session again behind the committed tokens, at once or after a delay.

        `cause` ends a sentence. Raise SessionFailed after too many resumes for the tokens that were committed.
        """
        if not self.retry.budget.left:
            raise SessionFailed(f"The session was resumed {self.resumes} times without progress: {cause}")
        self.resumes += 1
        self.retry.note_resume(self.clock())
        self._open_again()

    def _wait(self) -> None:
        started = self.clock()
        event = self.inbox.get(timeout_s=self.quiet_s())
        if not self.closing.begun:
            self.session.counters.wait_ms += (self.clock() - started) * 1e3
        if event is None:
            self.on_quiet()
        else:
            self._handle(event)

    # Decisions

    def _decide(self) -> Decision:
        now = self.clock()
        self.retry.note_edges(self.session, self.availability, now)
        return decide(self.session, self.retry, self.availability, now)

    @property
    def _held(self) -> bool:
        return is_held(self.session, self.retry, self.availability, self.clock())

    def _act(self, decision: Decision) -> None:
        match decision:
            case Send():
                self._send_next()
            case Repeat():
                self._repeat()
            case Resume():
                self._resume_elsewhere(decision)
            case Local(reason):
                self._go_local(str(self._error(reason)))
            case Fail(reason):
                raise self._error(reason)
            case Wait(reason=reason) if reason is not None:
                self._report(str(self._error(reason)))

    def _error(self, reason: Reason) -> EdgeUnavailable | SessionRefused:
        if isinstance(reason, SessionRefused):
            return reason
        edge = None if self.session.opened is None else self.session.opened.edge
        return self.outbound.silence(reason.waited_s, edge=edge, target_id=self.session.wanted_target)

    def _report(self, reason: str) -> None:
        """Report once why no tokens come."""
        self.retry.report_at = math.inf
        logging.getLogger(WAIT_LOG).warning("Waiting: %s", reason)
        self.context.on_wait(reason)

    def _resume_elsewhere(self, decision: Resume) -> None:
        if decision.any_target:
            _log.warning("The generation continues with another target model: %s", self._error(decision.reason))
            self.session.any_target = True
            self.retry.absent_since = math.inf
        elif self.session.opened is not None:
            _log.warning("Edge %s does not answer; the session goes on at another.", self.session.opened.edge)
        self.resume("the edge does not answer.")

    def _go_local(self, cause: str) -> None:
        _log.warning("The generation continues without an edge: %s", cause)
        self._local_cause = cause
        self.session.go_local(self.end_tokens)
        self.drafting.restart()

    # Events

    def _handle(self, event: Event) -> None:
        if self.closing.begun:
            self.closing.on_event(event)
        elif not self.session.local:  # otherwise it concerns a grant that is void
            self._on_event(event)
            if self.session.ended is None:
                # Here too: an edge may send without end, and answer nothing.
                decision = self._decide()
                newly_there = isinstance(decision, Resume) and isinstance(event, EdgeStateChanged)
                if newly_there or isinstance(decision, Fail | Local | Wait):
                    self._act(decision)

    def _on_event(self, event: Event) -> None:
        match event:
            case ReceivedVerdict():
                self._on_verdict(event)
            case Opened() | Refused() | Fault() | Closed():
                self._on_reply(event)
            case Progress():
                self._on_progress(event)
            case EdgeStateChanged():
                self._on_edge_state(event)
            case ConnectionChanged(up=True):
                self.retry.note_repeat_due()
            case Undelivered(topic=topic):
                self._on_undelivered(topic)
            case _:
                pass  # `Wake`: the next step checks for cancellation

    def _on_verdict(self, received: ReceivedVerdict) -> None:
        session = self.session
        if session.opened is not None and received.verdict.handle == session.opened.handle:
            session.counters.downlink_bytes += received.size
        effects = session.on_verdict(received.verdict)
        self.drafting.pacing.learn(effects)
        for effect in effects:
            self.retry.note_answer(self.clock(), tokens=len(effect.tokens))
            if effect.tokens:
                self.first_at = self.first_at or self.clock()
                other = session.sequence.verified is not None
                tokens = effect.committed.of_other_target() if other else effect.committed
                end = session.ended if effect is effects[-1] else None
                if self.context.on_tokens(replace(tokens, target_id=session.target_id, end=end)):
                    session.cancel(EndReason.STOP)
                    return
            self.drafting.follow(effect)
            if effect.request is not None and not self._held:  # otherwise it is sent with the repeats
                self._send_draft(effect.request)
        if session.ended is None and session.may_renew_edge_only and not self._held:
            renewal = self.drafting.renewal()
            if renewal is not None:
                self._send_draft(renewal)

    def _on_reply(self, reply: Opened | Refused | Fault | Closed) -> None:
        session = self.session
        match reply:
            case Opened():
                self._on_opened(reply)
            case Refused() if reply.session == session.request.session and session.state is SessionState.OPENING:
                on_refused(session, self.retry, self.availability, self.clock(), reply)
                session.on_postponed()
            case Fault() if reply.handle is None or (session.opened and reply.handle == session.opened.handle):
                self._on_fault(reply)
            case Closed() if session.opened is not None and session.concerns(reply):
                self.resume()  # the lease ended while we were away
            case _:
                pass

    def _on_fault(self, fault: Fault) -> None:
        situation = (self.session, self.retry, self.availability, self.clock(), fault)
        if fault.action is Action.GIVE_UP:
            on_give_up(*situation)
        elif fault.action is Action.WAIT and on_wait(*situation):
            return
        if self.session.opened is not None:
            _log.info("Resuming session %s: %s", self.session.request.session.hex(), fault.sentence)
            self.resume(fault.sentence)

    def _on_opened(self, opened: Opened) -> None:
        if not self.session.on_opened(opened):
            return
        self.retry.note_granted()
        self.availability.clear_refusal()
        self.drafting.restart()
        if not self.claim(opened.handle):
            self.resume("another request of this device has the same handle.")

    def _on_undelivered(self, topic: Topic) -> None:
        """Handle a message that no edge was subscribed to."""
        if topic is Topic.OPEN:
            self.session.on_undelivered()
        elif topic is Topic.DRAFT and self.session.opened is not None:
            self.resume()

    def _on_progress(self, progress: Progress) -> None:
        """Report how far the edge is, which computes what this request waits for."""
        opened = self.session.opened
        if opened is None or progress.handle != opened.handle or not self.session.unanswered():
            return
        if self.retry.note_working(progress, self.clock()):
            self.context.on_wait(progress_sentence(opened.edge, progress))

    def _on_edge_state(self, changed: EdgeStateChanged) -> None:
        session = self.session
        if session.opened is None:
            is_back = changed.before in (Presence.OFFLINE, Presence.DRAINING)
            is_wanted = changed.presence is Presence.ONLINE and (is_back or session.state is SessionState.UNDELIVERED)
            if session.open_sent and is_wanted and not self._held and self.retry.note_return(self.clock()):
                self._open_again()
        elif session.opened.edge == changed.edge and changed.presence is Presence.OFFLINE:
            self.resume()

    def _open_again(self) -> None:
        """Drop the grant and what is in flight; send a new Open unless that is to wait."""
        self.session.suspend()
        self.drafting.drop()
        if isinstance(self._decide(), Send):
            self._send_next()

    # Without an edge

    def _generate_alone(self) -> None:
        session, drafter = self.session, self.drafting.drafts.drafter
        if len(session.request.prompt) + len(session.committed) >= drafter.context:
            session.cancel(EndReason.LENGTH)
            return
        token = self.drafting.drafts.generate_alone()
        if token is None:
            raise EdgeUnavailable(
                f"{self._local_cause} The drafter {drafter.name!r} cannot go on alone: it has no model, or the prompt "
                "is longer than its context; set drafter = 'llama.cpp' with a larger context, or offline = 'wait'."
            )
        if session.ended is None and session.sequence.unverified % _KEPT_EVERY == 1:
            self.on_local(self.closing.unfinished())
        self.first_at = self.first_at or self.clock()
        origins = (TokenOrigin.UNVERIFIED,)
        if self.context.on_tokens(CommittedTokens((token,), origins, target_id=session.target_id, end=session.ended)):
            session.cancel(EndReason.STOP)

    # Sending

    def _send_next(self) -> None:
        if self.session.opened is None:
            self._send_open(self.session.open(wait_s=self._left_s))
        elif (draft := self.drafting.step()) is not None:
            self._send_draft(draft)

    def _send_open(self, message: Open) -> None:
        self.retry.note_sent(self.session, self.clock())
        self.retry.refusal = None
        self.outbound.publish_open(message)

    @property
    def _left_s(self) -> float | None:
        """Seconds that the application waits on; None without a limit."""
        deadline = self.context.deadline
        return None if deadline is None else round(max(0.0, deadline - self.clock()), 1)

    def _send_draft(self, draft: Draft) -> None:
        assert self.session.opened is not None
        self.retry.note_sent(self.session, self.clock())
        self.session.counters.uplink_bytes += self.outbound.publish_draft(draft, edge=self.session.opened.edge)

    def _repeat(self) -> None:
        """Send again what was not answered; the edge takes each round once."""
        if self.session.opened is None:
            self._send_open(self.session.open_again(wait_s=self._left_s))
            return
        self.retry.refusal = None
        for draft in self.session.unanswered():
            self._send_draft(draft)


@dataclass(slots=True)
class SessionEnd:
    """The end of a session: its Close, which `keep` has repeated, and the wait for the edge's confirmation."""

    session: DeviceSession
    outbound: Outbound
    clock: Callable[[], float]
    keep: Callable[[Close], None]
    started: float = field(init=False)
    failure: BaseException | None = None
    answer: Closed | None = None
    done: bool = False
    _until: float | None = None  # end of the wait for the answer

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def begun(self) -> bool:
        """The session has ended, and only its last messages are left."""
        return self._until is not None

    @property
    def left_s(self) -> float:
        return 0.0 if self._until is None else max(0.0, self._until - self.clock())

    def begin(self, *, within_s: float) -> None:
        if self.session.sequence.unverified and self.session.opened is None:
            self.keep(self._close())
            self._until, self.done = self.clock(), True
            return
        if self.session.open_sent:
            self.send_close()
        self._until = self.clock() + within_s
        # An edge that takes the Open later finds the Close behind it.
        self.done = not self.session.granted

    def fail(self, error: BaseException) -> None:
        """End the session because of an error, unless it has ended, and notify the edge that may have it."""
        if self.begun:
            return
        self.failure = error
        self.session.cancel(EndReason.CANCELLED if isinstance(error, KeyboardInterrupt) else EndReason.FAILED)
        refused = isinstance(error, SessionRefused)
        if self.session.granted or self.session.sequence.unverified or (self.session.open_sent and not refused):
            self.send_close()  # also if no edge has answered: one may yet take the Open that was sent

    def on_event(self, event: Event) -> None:
        if isinstance(event, Closed) and self.session.concerns(event):
            self.answer, self.done = event, True

    def on_quiet(self) -> None:
        self.done = self.done or self.left_s <= 0.0

    def unfinished(self) -> Close:
        """Return the Close of a session whose program ends without sending one."""
        return self.session.close(wall_ms=self._wall_ms, if_lost=True).model_copy(update=_UNFINISHED)

    @property
    def _wall_ms(self) -> float:
        return (self.clock() - self.started) * 1e3

    def send_close(self) -> None:
        close = self._close()
        if self.session.granted or self.session.sequence.unverified:
            self.keep(close)  # first: the confirmation may arrive at once, on another thread
        self.outbound.publish_close(close)

    def _close(self) -> Close:
        return with_cause(self.session.close(wall_ms=self._wall_ms), self.failure)


def with_cause(close: Close, error: BaseException | None) -> Close:
    if error is None or close.reason is not EndReason.FAILED:
        return close
    if isinstance(error, SessionRefused):
        code = error.code.value
    else:
        code = _WORDS.sub("-", type(error).__name__).lower()[:MAX_CODE]
    if isinstance(error, FleetError):
        sentence = printable_line(str(error))[:MAX_SENTENCE]
    else:  # the message of any other exception may quote anything
        sentence = f"The device's program has failed ({type(error).__name__}); its own log says more."
    return close.model_copy(update={"code": code, "sentence": sentence})

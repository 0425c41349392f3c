"""One session as the agent lives it: events in, drafts out, with the patience to outlast losses and restarts.

What travels and what is committed is `DeviceSession`'s business; a conversation drafts, sends and waits.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fleet_device.client.draft_sequence import DraftSequence
from fleet_device.client.inbox import (
    ConnectionChanged,
    EdgeStateChanged,
    Event,
    Inbox,
    ReceivedVerdict,
    Undelivered,
    Wake,
)
from fleet_device.client.outbound import Outbound
from fleet_device.client.retry import RetryState
from fleet_device.errors import EdgeUnavailable, SessionFailed, SessionRefused
from fleet_device.pacing.session_pacing import SessionPacing
from fleet_device.session.machine import DeviceSession
from schemas.control import Presence
from schemas.messages import Closed, Draft, Fault, Opened, Refused
from schemas.reasons import Action, EndReason, RefusalCode
from schemas.topics import Topic

__all__ = ["SessionDriver"]

_log = logging.getLogger(__name__)

# Refusals that pass by themselves, so that a resuming device tries again. One that has written nothing yet tries again
# only at an edge that ends, since another takes its place; a busy one the application is told of.
_PASSING = frozenset({RefusalCode.BUSY, RefusalCode.DRAINING})
_PASSING_AT_FIRST = frozenset({RefusalCode.DRAINING})


@dataclass(slots=True)
class SessionDriver:
    """A session under way.

    Attributes:
        session: The state machine.
        drafting: The draft model, in step with it.
        pace: How much to draft.
        wire: To the edge.
        inbox: What has arrived.
        edges: The edges' last known presence; kept for the next conversation.
        watch: How long it has waited, and how long it waits.
        clock: Monotonic seconds.
        on_tokens: Told of newly committed tokens; returns True if the text has come to its end for the application.
        cancelled: Ends the session early.
        started: When it began.
        first_at: When the first token was committed.
        closed: The edge's last word.
    """

    session: DeviceSession
    drafting: DraftSequence
    pace: SessionPacing
    wire: Outbound
    inbox: Inbox
    edges: dict[str, Presence]
    watch: RetryState
    clock: Callable[[], float]
    on_tokens: Callable[[Sequence[int]], bool | None]
    cancelled: threading.Event
    started: float = field(init=False)
    first_at: float | None = None
    closed: Closed | None = None
    _unheard: bool = False  # no edge was subscribed when the last Open was sent
    _refused: SessionRefused | None = None  # how the last Open was answered, if another may be answered better
    _known: bool = False  # some edge has granted the session

    def __post_init__(self) -> None:
        """Begin to count the time."""
        self.started = self.clock()

    @property
    def _opened(self) -> bool:
        return self.session.opened is not None

    def run(self) -> None:
        """Write the text to its end, and close.

        Raises:
            DeviceError: It could not be brought to its end; it is closed all the same.
            DrafterError: Likewise.
        """
        try:
            self._write()
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            self.session.cancel(EndReason.CANCELLED if interrupted else EndReason.FAILED)
            if self._known or (self.session.asked and not isinstance(error, SessionRefused)):
                self._send_close()  # also if no edge has answered: one may yet take the Open that was sent
            raise
        self._finish()

    # Drafting

    def _write(self) -> None:
        session = self.session
        self.drafting.rewind()  # first, so that no edge hears of a prompt that cannot be drafted for
        self._open()
        while session.ended is None:
            if session.may_send:
                self._draft()
            else:
                self._wait()

    def _draft(self) -> None:
        """Draft and send; verdicts that come meanwhile take effect at once."""
        session, plan = self.session, self.pace.plan()
        while self.drafting.draft(plan.tokens):
            self._take_events()
        if session.may_send:
            draft = session.send(more=plan.ahead and session.may_promise)
            self.pace.sent(draft)
            self._send_draft(draft)

    def _wait(self) -> None:
        started = self.clock()
        event = self.inbox.take(timeout_s=self.watch.quiet_s(opened=self._opened))
        self.session.counters.wait_ms += (self.clock() - started) * 1e3
        if event is None:
            self._nudge()
        else:
            self._handle(event)
            self._take_events()
        if self.cancelled.is_set():
            self.session.cancel(EndReason.CANCELLED)

    def _take_events(self) -> None:
        while self.session.ended is None and (event := self.inbox.take()) is not None:
            self._handle(event)

    def _handle(self, event: Event) -> None:
        match event:
            case ReceivedVerdict() as received:
                self._verdict(received)
            case Opened() | Refused() | Fault() | Closed():
                self._reply(event)
            case EdgeStateChanged(edge=edge, presence=presence):
                self._edge_changed(edge, presence)
            case ConnectionChanged(up=True):
                self._repeat()
            case Undelivered(topic=topic):
                self._undelivered(topic)
            case Wake() if self.cancelled.is_set():
                self.session.cancel(EndReason.CANCELLED)
            case _:
                pass

    def _verdict(self, received: ReceivedVerdict) -> None:
        session = self.session
        if session.opened is not None and received.verdict.handle == session.opened.handle:
            session.counters.downlink_bytes += received.size
        steps = session.on_verdict(received.verdict)
        self.pace.heard(received.verdict)
        for step in steps:
            self.watch.answered(got_on=bool(step.tokens))
            if step.tokens:
                self.first_at = self.first_at or self.clock()
                if self.on_tokens(step.tokens):
                    session.cancel(EndReason.STOP)
                    return
            self.drafting.follow(step)
            if step.request is not None:
                self._send_draft(step.request)

    def _reply(self, reply: Opened | Refused | Fault | Closed) -> None:
        session = self.session
        match reply:
            case Opened() if session.on_opened(reply):
                self._known = True
                self.watch.answered(got_on=False)
                self.pace.opened()
                self.drafting.rewind()
            case Refused() if reply.session == session.terms.session and session.opened is None:
                self._refused = SessionRefused(reply.code, reply.sentence)
                if reply.code not in (_PASSING if self.watch.resumes else _PASSING_AT_FIRST):
                    raise self._refused
            case Fault() if reply.handle is None or (session.opened and reply.handle == session.opened.handle):
                if reply.action is Action.GIVE_UP:
                    raise SessionFailed(reply.sentence)
                if session.opened is not None:
                    _log.info("Resuming session %s: %s", session.terms.session.hex(), reply.sentence)
                    self._resume(reply.sentence)
            case Closed() if session.opened is not None and session.concerns(reply):
                # The edge gave the session up, its lease ended while we were away; our text stands.
                self._resume()
            case _:
                pass

    def _undelivered(self, topic: Topic) -> None:
        """Nobody listens where a message went: the edge is away."""
        if topic is Topic.OPEN:
            self._unheard = not self._opened
        elif topic is Topic.DRAFT and self._opened:
            self._resume()

    def _edge_changed(self, edge: str, presence: Presence) -> None:
        before, self.edges[edge] = self.edges.get(edge), presence
        session = self.session
        if session.opened is None:
            if presence is Presence.ONLINE and (self._unheard or before in (Presence.OFFLINE, Presence.DRAINING)):
                self._open()
        elif session.opened.edge == edge and presence is Presence.OFFLINE:
            self._resume()

    # Sending

    def _open(self) -> None:
        self.watch.asked()
        self._unheard, self._refused = False, None
        self.wire.open(self.session.open())

    def _resume(self, cause: str = "the edge went away.") -> None:
        self.watch.resumed(cause)
        self._open()

    def _send_draft(self, draft: Draft) -> None:
        assert self.session.opened is not None
        self.watch.asked()
        self.session.counters.uplink_bytes += self.wire.draft(draft, edge=self.session.opened.edge)

    def _repeat(self) -> None:
        """Send again what was not answered; the edge takes each round once."""
        if self.session.opened is None:
            self._open()
            return
        for draft in self.session.unanswered():
            self._send_draft(draft)

    # Waiting

    def _nudge(self) -> None:
        """Nothing came in time: ask again, or give up."""
        if (waited_s := self.watch.exhausted_s(opened=self._opened)) is not None:
            raise self._refused or EdgeUnavailable(self.wire.silence(waited_s))
        if self.watch.may_ask_again(opened=self._opened):
            self._repeat()

    # The end

    def _finish(self) -> None:
        """Close, and wait shortly for the edge's last word."""
        self._send_close()
        if not self._known:
            return  # cancelled before any edge took it; one that does later finds the Close behind the Open
        deadline = self.clock() + self.watch.patience.close_s
        while self.closed is None and (left := deadline - self.clock()) > 0:
            event = self.inbox.take(timeout_s=left)
            if isinstance(event, Closed) and self.session.concerns(event):
                self.closed = event
            elif isinstance(event, ConnectionChanged) and event.up:
                self._send_close()
            elif isinstance(event, EdgeStateChanged):
                self.edges[event.edge] = event.presence
                opened = self.session.opened
                if opened is not None and event.edge == opened.edge and event.presence is Presence.OFFLINE:
                    self._send_close(to_any=True)

    def _send_close(self, *, to_any: bool = False) -> None:
        """Say how the session ended.

        Args:
            to_any: The edge that had it went away before it answered: another is to write the end down.
        """
        close = self.session.close(wall_ms=(self.clock() - self.started) * 1e3)
        self.wire.close(close.model_copy(update={"edge": None, "handle": None}) if to_any else close)

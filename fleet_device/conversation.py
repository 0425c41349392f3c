"""One session as the agent lives it: events in, drafts out, with the patience to outlast losses and restarts.

What travels and what is committed is `DeviceSession`'s business; a conversation drafts, sends and waits.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fleet_device.drafter import Drafter
from fleet_device.errors import EdgeUnavailable, SessionFailed, SessionRefused
from fleet_device.inbox import Connection, EdgePresence, Event, Inbox, ReceivedVerdict, Undelivered, Wake
from fleet_device.pacing import Pacing
from fleet_device.session import DeviceSession, Step
from fleet_device.wire import Wire
from schemas.codec import encode_close, encode_draft, encode_open
from schemas.control import Presence
from schemas.messages import Action, Closed, Draft, EndReason, Fault, Opened, RefusalCode, Refused
from schemas.topics import Topic

__all__ = ["Conversation", "Patience"]

_log = logging.getLogger(__name__)

# Refusals that pass by themselves, so that a resuming device tries again. One that has written nothing yet tries again
# only at an edge that ends, since another takes its place; a busy one the application is told of.
_PASSING = frozenset({RefusalCode.BUSY, RefusalCode.DRAINING})
_PASSING_AT_FIRST = frozenset({RefusalCode.DRAINING})

# An edge that keeps asking to begin again without a token between is one that will never get on.
_MAX_FRUITLESS = 20


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the agent waits.

    Attributes:
        open_s: For an edge to answer the first Open.
        resume_s: For an edge to take a session over again after a loss.
        verdict_s: For a verdict, before the draft is repeated.
        close_s: For the edge's last word.
    """

    open_s: float = 15.0
    resume_s: float = 120.0
    verdict_s: float = 10.0
    close_s: float = 5.0

    # Between two Opens while no edge answers.
    retry_s: float = 1.0


@dataclass(slots=True)
class Conversation:
    """A session under way.

    Attributes:
        session: The state machine.
        drafter: The draft model.
        pacing: How much to draft.
        wire: To the edge.
        inbox: What has arrived.
        edges: The edges' last known presence; kept for the next conversation.
        patience: How long to wait.
        clock: Monotonic seconds.
        on_tokens: Told of newly committed tokens; returns True if the text has come to its end for the application.
        cancelled: Ends the session early.
        started: When it began.
        first_at: When the first token was committed.
        resumes: How often the session was opened again.
        closed: The edge's last word.
    """

    session: DeviceSession
    drafter: Drafter
    pacing: Pacing
    wire: Wire
    inbox: Inbox
    edges: dict[str, Presence]
    patience: Patience
    clock: Callable[[], float]
    on_tokens: Callable[[Sequence[int]], bool | None]
    cancelled: threading.Event
    started: float = field(init=False)
    first_at: float | None = None
    resumes: int = 0
    closed: Closed | None = None
    _waiting_since: float = field(init=False)  # the edge has owed an answer since, and given none
    _asked_at: float = field(init=False)
    _unheard: bool = False  # no edge was subscribed when the last Open was sent
    _refused: SessionRefused | None = None  # how the last Open was answered, if another may be answered better
    _known: bool = False  # some edge has granted the session
    _fruitless: int = 0  # resumes since the last committed token

    def __post_init__(self) -> None:
        """Begin to count the time."""
        self.started = self._waiting_since = self._asked_at = self.clock()

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
        self.drafter.reset(session.terms.prompt)  # first, so that no edge hears of a prompt that cannot be drafted for
        self._open()
        while session.ended is None:
            if session.may_send:
                self._draft()
            else:
                self._wait()

    def _draft(self) -> None:
        """Draft and send; verdicts that come meanwhile take effect at once."""
        session, limit = self.session, self.pacing.length()
        # Behind the end of the draft model's context the target writes alone.
        while session.room(limit) and len(session.terms.prompt) + session.position < self.drafter.context:
            started = self.clock()
            q = self.drafter.next(session.terms.policy)
            if q is None:
                break  # no idea: the target writes the next token alone
            self.drafter.extend((session.propose(q),))
            session.counters.draft_ms += (self.clock() - started) * 1e3
            self._take_events()
        if session.may_send:
            draft = session.send(more=self.pacing.ahead() and session.may_promise)
            self._send_draft(draft)

    def _wait(self) -> None:
        started = self.clock()
        event = self.inbox.take(timeout_s=self.patience.retry_s if self.session.opened is None else self._quiet_s())
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
            case EdgePresence(edge=edge, presence=presence):
                self._edge_changed(edge, presence)
            case Connection(up=True):
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
        self._apply(session.on_verdict(received.verdict))

    def _reply(self, reply: Opened | Refused | Fault | Closed) -> None:
        session = self.session
        match reply:
            case Opened() if session.on_opened(reply):
                self._known = True
                self._waiting_since = self.clock()
                self._rewind()
            case Refused() if reply.session == session.terms.session and session.opened is None:
                self._refused = SessionRefused(reply.code, reply.sentence)
                if reply.code not in (_PASSING if self.resumes else _PASSING_AT_FIRST):
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
        opened = self.session.opened is not None
        if topic is Topic.OPEN:
            self._unheard = not opened
        elif topic is Topic.DRAFT and opened:
            self._resume()

    def _apply(self, steps: list[Step]) -> None:
        prompt_length = len(self.session.terms.prompt)
        for step in steps:
            self._waiting_since = self.clock()
            if step.tokens:
                self._fruitless = 0
                self.first_at = self.first_at or self.clock()
                if self.on_tokens(step.tokens):
                    self.session.cancel(EndReason.STOP)
                    return
            if step.correction is not None and self.session.ended is None:
                self.drafter.truncate(prompt_length + step.valid)
                self.drafter.extend((step.correction,))
            if step.request is not None:
                self._send_draft(step.request)

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
        self._asked_at, self._unheard, self._refused = self.clock(), False, None
        payload = encode_open(self.session.open())
        self.wire.send(Topic.OPEN, payload)

    def _resume(self, cause: str = "the edge went away.") -> None:
        self.resumes += 1
        self._fruitless += 1
        if self._fruitless > _MAX_FRUITLESS:
            raise SessionFailed(f"The session was resumed {_MAX_FRUITLESS} times without getting on: {cause}")
        self._waiting_since = self.clock()
        self._open()

    def _send_draft(self, draft: Draft) -> None:
        assert self.session.opened is not None
        self._asked_at = self.clock()
        payload = encode_draft(draft)
        self.session.counters.uplink_bytes += len(payload)
        self.wire.send(Topic.DRAFT, payload, edge=self.session.opened.edge)

    def _repeat(self) -> None:
        """Send again what was not answered; the edge takes each round once."""
        if self.session.opened is None:
            self._open()
            return
        for draft in self.session.unanswered():
            self._send_draft(draft)

    def _rewind(self) -> None:
        """Bring the drafter back to the committed text."""
        session = self.session
        self.drafter.reset((*session.terms.prompt, *session.committed))

    # Waiting

    def _quiet_s(self) -> float:
        return max(0.01, self.patience.verdict_s - (self.clock() - self._asked_at))

    def _nudge(self) -> None:
        """Nothing came in time: ask again, or give up."""
        now, session = self.clock(), self.session
        first = session.opened is None and self.resumes == 0
        limit = self.patience.open_s if first else self.patience.resume_s
        if now - self._waiting_since > limit:
            raise self._refused or EdgeUnavailable(self._absence(limit))
        if session.opened is None:
            if now - self._asked_at >= self.patience.retry_s:
                self._open()
        elif now - self._asked_at >= self.patience.verdict_s:
            self._repeat()

    def _absence(self, waited_s: float) -> str:
        if not self.wire.connected:
            return f"The broker has not been reachable for {waited_s:.0f} s; check that it runs and try again."
        return (
            f"No edge of fleet {self.wire.fleet!r} answered within {waited_s:.0f} s; start one with `fleet edge run`, "
            "or check that it uses the same broker and fleet name."
        )

    # The end

    def _finish(self) -> None:
        """Close, and wait shortly for the edge's last word."""
        self._send_close()
        if not self._known:
            return  # cancelled before any edge took it; one that does later finds the Close behind the Open
        deadline = self.clock() + self.patience.close_s
        while self.closed is None and (left := deadline - self.clock()) > 0:
            event = self.inbox.take(timeout_s=left)
            if isinstance(event, Closed) and self.session.concerns(event):
                self.closed = event
            elif isinstance(event, Connection) and event.up:
                self._send_close()
            elif isinstance(event, EdgePresence):
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
        if to_any:
            close = close.model_copy(update={"edge": None, "handle": None})
        self.wire.send(Topic.CLOSE, encode_close(close))

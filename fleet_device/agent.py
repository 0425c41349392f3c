"""The agent: drives one session at a time from prompt to text, through losses, restarts and cancellation.

What travels and what is committed is `DeviceSession`'s business; the agent drafts, sends, waits, and knows the time.
"""

import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fleet_device.drafter import Drafter
from fleet_device.errors import EdgeUnavailable, SessionFailed, SessionRefused
from fleet_device.inbox import Connection, EdgePresence, Event, Inbox, ReceivedVerdict, Undelivered, Wake
from fleet_device.pacing import Pacing
from fleet_device.session import Counters, DeviceSession, Step, Terms
from fleet_link.errors import LinkError
from fleet_link.link import Link
from schemas.codec import encode_close, encode_draft, encode_open
from schemas.control import Presence
from schemas.messages import SESSION_BYTES, Action, Closed, Draft, EndReason, Fault, Opened, RefusalCode, Refused
from schemas.policy import SamplingPolicy
from schemas.topics import TREE, Topic, build

__all__ = ["Agent", "Generation", "Patience"]

_log = logging.getLogger(__name__)

_RULES = {rule.topic: rule for rule in TREE}

# Refusals that pass by themselves, so that a resuming device may try again.
_PASSING = frozenset({RefusalCode.BUSY, RefusalCode.DRAINING})


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


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished text.

    Attributes:
        session: Its id, as in the session log.
        tokens: The text.
        reason: How it ended.
        counters: What the device counted.
        closed: What the edge counted, if its last word arrived.
        wall_ms: From Open to the end.
        first_ms: From Open to the first committed token; None if there was none.
        resumes: How often the session was opened again.
    """

    session: bytes
    tokens: tuple[int, ...]
    reason: EndReason
    counters: Counters
    closed: Closed | None
    wall_ms: float
    first_ms: float | None
    resumes: int


@dataclass(slots=True)
class _Run:
    """The moving parts of one session.

    `waiting_since` is when the edge last owed an answer and gave none; `asked_at` when it was last asked.
    """

    session: DeviceSession
    on_tokens: Callable[[Sequence[int]], bool | None]
    cancelled: threading.Event
    started: float
    waiting_since: float
    asked_at: float
    first_at: float | None = None
    resumes: int = 0
    closed: Closed | None = None
    unheard: bool = False  # no edge was subscribed when the last Open was sent
    known: bool = False  # some edge has granted the session
    fruitless: int = 0  # resumes since the last committed token


@dataclass(slots=True)
class Agent:
    """A device's end of the fleet.

    Attributes:
        link: To the broker; `attach` before it is started.
        fleet: The fleet's name.
        device: This device's name.
        drafter: The draft model.
        pacing: How much to draft.
        clock: Monotonic seconds.
        patience: How long to wait.
    """

    link: Link
    fleet: str
    device: str
    drafter: Drafter
    pacing: Pacing
    clock: Callable[[], float]
    patience: Patience = field(default_factory=Patience)
    inbox: Inbox = field(default_factory=Inbox)
    _edges: dict[str, Presence] = field(default_factory=dict)
    _one: threading.Lock = field(default_factory=threading.Lock)

    def attach(self) -> None:
        """Subscribe; once, before the link is started."""
        self.inbox.subscribe(self.link, fleet=self.fleet, device=self.device)

    def generate(
        self,
        prompt: Sequence[int],
        *,
        policy: SamplingPolicy,
        max_new_tokens: int,
        on_tokens: Callable[[Sequence[int]], bool | None] = lambda _tokens: None,
        cancelled: threading.Event | None = None,
    ) -> Generation:
        """Write a text. One at a time: a second caller waits for the first.

        Args:
            prompt: Token ids.
            policy: Sampling, with the seed.
            max_new_tokens: Most tokens to write.
            on_tokens: Told of newly committed tokens, on this thread; returns True if the text has come to its
                end for the application, by a stop string say.
            cancelled: Set it, and call `wake`, to end the session early.

        Raises:
            SessionRefused: The edge declined.
            EdgeUnavailable: No edge answers.
            SessionFailed: The session could not be brought to its end.
            ProtocolViolation: The edge answered something that no correct edge answers.
            DrafterError: The draft model failed, or the prompt has a token that it does not know.
        """
        with self._one:
            self._catch_up()
            now = self.clock()
            terms = Terms(
                session=secrets.token_bytes(SESSION_BYTES),
                prompt=tuple(prompt),
                policy=policy,
                max_new_tokens=max_new_tokens,
                vocabulary=self.drafter.vocabulary,
                draft_model=self.drafter.name,
                quantization=self.drafter.quantization,
            )
            run = _Run(DeviceSession(terms), on_tokens, cancelled or threading.Event(), now, now, now)
            try:
                self._write(run)
            except BaseException as error:
                interrupted = isinstance(error, KeyboardInterrupt)
                run.session.cancel(EndReason.CANCELLED if interrupted else EndReason.FAILED)
                if run.known or (run.session.asked and not isinstance(error, SessionRefused)):
                    self._send_close(run)  # also if no edge has answered: one may yet take the Open that was sent
                raise
            self._finish(run)
            return Generation(
                session=terms.session,
                tokens=tuple(run.session.committed),
                reason=run.session.ended or EndReason.FAILED,
                counters=run.session.counters,
                closed=run.closed,
                wall_ms=(self.clock() - run.started) * 1e3,
                first_ms=None if run.first_at is None else (run.first_at - run.started) * 1e3,
                resumes=run.resumes,
            )

    def wake(self) -> None:
        """Make a waiting `generate` look at its cancellation flag."""
        self.inbox.put(Wake())

    # One session

    def _catch_up(self) -> None:
        """Take note of the edges' states; whatever else has arrived belongs to sessions that are over."""
        while (event := self.inbox.take()) is not None:
            if isinstance(event, EdgePresence):
                self._edges[event.edge] = event.presence

    def _write(self, run: _Run) -> None:
        session = run.session
        self.drafter.reset(session.terms.prompt)  # first, so that no edge hears of a prompt that cannot be drafted for
        self._open(run)
        while session.ended is None:
            if session.may_send:
                self._draft(run)
            else:
                self._wait(run)

    def _draft(self, run: _Run) -> None:
        """Draft and send; verdicts that come meanwhile take effect at once."""
        session, limit = run.session, self.pacing.length()
        # Behind the end of the draft model's context the target writes alone.
        while session.room(limit) and len(session.terms.prompt) + session.position < self.drafter.context:
            started = self.clock()
            q = self.drafter.next(session.terms.policy)
            if q is None:
                break  # no idea: the target writes the next token alone
            self.drafter.extend((session.propose(q),))
            session.counters.draft_ms += (self.clock() - started) * 1e3
            self._take_events(run)
        if session.may_send:
            draft = session.send(more=self.pacing.ahead() and session.may_promise)
            self._send_draft(run, draft)

    def _wait(self, run: _Run) -> None:
        started = self.clock()
        event = self.inbox.take(timeout_s=self.patience.retry_s if run.session.opened is None else self._quiet_s(run))
        run.session.counters.wait_ms += (self.clock() - started) * 1e3
        if event is None:
            self._nudge(run)
        else:
            self._handle(event, run)
            self._take_events(run)
        if run.cancelled.is_set():
            run.session.cancel(EndReason.CANCELLED)

    def _take_events(self, run: _Run) -> None:
        while run.session.ended is None and (event := self.inbox.take()) is not None:
            self._handle(event, run)

    def _handle(self, event: Event, run: _Run) -> None:
        session = run.session
        match event:
            case ReceivedVerdict(verdict=verdict, size=size):
                if session.opened is not None and verdict.handle == session.opened.handle:
                    session.counters.downlink_bytes += size
                self._apply(session.on_verdict(verdict), run)
            case Opened() as opened:
                if session.on_opened(opened):
                    run.known = True
                    run.waiting_since = self.clock()
                    self._rewind(session)
            case Refused() as refused if refused.session == session.terms.session and session.opened is None:
                if run.resumes == 0 or refused.code not in _PASSING:
                    raise SessionRefused(refused.code, refused.sentence)
            case Fault() as fault if fault.handle is None or (session.opened and fault.handle == session.opened.handle):
                if fault.action is Action.GIVE_UP:
                    raise SessionFailed(fault.sentence)
                if session.opened is not None:
                    _log.info("Resuming session %s: %s", session.terms.session.hex(), fault.sentence)
                    self._resume(run, fault.sentence)
            case Closed() as closed if session.opened is not None and session.concerns(closed):
                # The edge gave the session up, its lease ended while we were away; our text stands.
                self._resume(run)
            case EdgePresence(edge=edge, presence=presence):
                self._edge_changed(edge, presence, run)
            case Connection(up=True):
                self._repeat(run)
            case Undelivered(topic=Topic.DRAFT):
                if session.opened is not None:
                    self._resume(run)
            case Undelivered(topic=Topic.OPEN):
                run.unheard = session.opened is None
            case Wake() if run.cancelled.is_set():
                session.cancel(EndReason.CANCELLED)
            case _:
                pass

    def _apply(self, steps: list[Step], run: _Run) -> None:
        prompt_length = len(run.session.terms.prompt)
        for step in steps:
            run.waiting_since = self.clock()
            if step.tokens:
                run.fruitless = 0
                run.first_at = run.first_at or self.clock()
                if run.on_tokens(step.tokens):
                    run.session.cancel(EndReason.STOP)
                    return
            if step.correction is not None and run.session.ended is None:
                self.drafter.truncate(prompt_length + step.valid)
                self.drafter.extend((step.correction,))
            if step.request is not None:
                self._send_draft(run, step.request)

    def _edge_changed(self, edge: str, presence: Presence, run: _Run) -> None:
        before, self._edges[edge] = self._edges.get(edge), presence
        session = run.session
        if session.opened is None:
            if presence is Presence.ONLINE and (run.unheard or before in (Presence.OFFLINE, Presence.DRAINING)):
                self._open(run)
        elif session.opened.edge == edge and presence is Presence.OFFLINE:
            self._resume(run)

    # Sending

    def _open(self, run: _Run) -> None:
        run.asked_at, run.unheard = self.clock(), False
        payload = encode_open(run.session.open())
        self._publish(Topic.OPEN, payload)

    def _resume(self, run: _Run, cause: str = "the edge went away.") -> None:
        run.resumes += 1
        run.fruitless += 1
        if run.fruitless > _MAX_FRUITLESS:
            raise SessionFailed(f"The session was resumed {_MAX_FRUITLESS} times without getting on: {cause}")
        run.waiting_since = self.clock()
        self._open(run)

    def _send_draft(self, run: _Run, draft: Draft) -> None:
        assert run.session.opened is not None
        run.asked_at = self.clock()
        payload = encode_draft(draft)
        run.session.counters.uplink_bytes += len(payload)
        self._publish(Topic.DRAFT, payload, edge=run.session.opened.edge)

    def _repeat(self, run: _Run) -> None:
        """Send again what was not answered; the edge takes each round once."""
        if run.session.opened is None:
            self._open(run)
            return
        for draft in run.session.unanswered():
            self._send_draft(run, draft)

    def _rewind(self, session: DeviceSession) -> None:
        """Bring the drafter back to the committed text."""
        self.drafter.reset((*session.terms.prompt, *session.committed))

    def _publish(self, topic: Topic, payload: bytes, *, edge: str | None = None) -> None:
        rule = _RULES[topic]
        try:
            self.link.publish(
                build(topic, fleet=self.fleet, device=self.device, edge=edge),
                payload,
                qos=rule.qos,
                expiry_s=rule.expiry_s,
                content_type=None if rule.hot else rule.content_type,
                alias=rule.hot,
                on_outcome=self.inbox.on_undelivered(topic),
            )
        except LinkError as error:
            _log.warning("Not sent: %s", error)  # repeated when the link is back, or when no answer comes

    # Waiting

    def _quiet_s(self, run: _Run) -> float:
        return max(0.01, self.patience.verdict_s - (self.clock() - run.asked_at))

    def _nudge(self, run: _Run) -> None:
        """Nothing came in time: ask again, or give up."""
        now, session = self.clock(), run.session
        first = session.opened is None and run.resumes == 0
        limit = self.patience.open_s if first else self.patience.resume_s
        if now - run.waiting_since > limit:
            raise EdgeUnavailable(self._absence(limit))
        if session.opened is None:
            if now - run.asked_at >= self.patience.retry_s:
                self._open(run)
        elif now - run.asked_at >= self.patience.verdict_s:
            self._repeat(run)

    def _absence(self, waited_s: float) -> str:
        if not self.link.connected:
            return f"The broker has not been reachable for {waited_s:.0f} s; check that it runs and try again."
        return (
            f"No edge of fleet {self.fleet!r} answered within {waited_s:.0f} s; start one with `fleet edge run`, or "
            "check that it uses the same broker and fleet name."
        )

    # The end

    def _finish(self, run: _Run) -> None:
        """Close, and wait shortly for the edge's last word."""
        self._send_close(run)
        if not run.known:
            return  # cancelled before any edge took it; one that does later finds the Close behind the Open
        deadline = self.clock() + self.patience.close_s
        while run.closed is None and (left := deadline - self.clock()) > 0:
            event = self.inbox.take(timeout_s=left)
            if isinstance(event, Closed) and run.session.concerns(event):
                run.closed = event
            elif isinstance(event, Connection) and event.up:
                self._send_close(run)
            elif isinstance(event, EdgePresence):
                self._edges[event.edge] = event.presence

    def _send_close(self, run: _Run) -> None:
        close = run.session.close(wall_ms=(self.clock() - run.started) * 1e3)
        self._publish(Topic.CLOSE, encode_close(close))

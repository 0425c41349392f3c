"""Session driver: writes one text over a link, through losses, restarts and cancellation.

What travels and what is committed is `DeviceSession`'s business; the driver drafts, sends and waits. `run` writes a
text to its end. It is made of `step`, which does what can be done now, and `on_quiet`, for when nothing has come in
time, so that tests can drive it without threads or sleeping.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from fleet_device.client.closing import Closing
from fleet_device.client.draft_sequence import Drafting
from fleet_device.client.inbox import (
    ConnectionChanged,
    EdgeStateChanged,
    Event,
    Inbox,
    ReceivedVerdict,
    Undelivered,
)
from fleet_device.client.outage import Outage
from fleet_device.client.outbound import Outbound
from fleet_device.client.refusals import LOOK_AGAIN_S, Refusals
from fleet_device.client.rejoining import Rejoining
from fleet_device.client.request import RequestContext
from fleet_device.client.retry import RetryState
from fleet_device.client.waiting import Waiting
from fleet_device.drafters.contract import Drafter
from fleet_device.errors import EdgeUnavailable
from fleet_device.offline import OfflinePolicy
from fleet_device.session.machine import DeviceSession
from fleet_device.session.states import SessionState
from fleet_device.session.text import CommittedTokens, TokenOrigin
from schemas.control import Presence
from schemas.messages import Close, Closed, Draft, Fault, Opened, Refused
from schemas.reasons import Action, EndReason
from schemas.topics import Topic

_log = logging.getLogger(__name__)

_KEPT_EVERY: Final = 64  # tokens without an edge


@dataclass(slots=True)
class SessionDriver:
    """A session under way.

    Attributes:
        session: The state machine.
        drafting: What is sent next.
        outbound: To the edge.
        inbox: What has arrived.
        retry: How long it has waited, and how long it waits.
        refusals: What edges have declined.
        waiting: Why no text comes.
        outage: Whether any edge answers.
        clock: Monotonic seconds.
        context: Receives tokens, and may cancel the request.
        on_alone: Told, as the text grows without an edge, what is to be said of it should it never be ended.
        claim: Takes the handle that an edge has given, unless another text of this device has it.
        closing: The end of the session.
        first_at: When the first token was committed.
    """

    session: DeviceSession
    drafting: Drafting
    outbound: Outbound
    inbox: Inbox
    retry: RetryState
    refusals: Refusals
    waiting: Waiting
    outage: Outage
    clock: Callable[[], float]
    context: RequestContext = field(default_factory=RequestContext)
    on_alone: Callable[[Close], None] = lambda _close: None
    claim: Callable[[int], bool] = lambda _handle: True
    closing: Closing = field(init=False)
    first_at: float | None = None
    _rejoining: Rejoining = field(init=False)

    def __post_init__(self) -> None:
        self.closing = Closing(self.session, self.outbound, self.clock)
        self._rejoining = Rejoining(self.clock)

    @property
    def done(self) -> bool:
        """Whether there is nothing more to do."""
        return self.closing.done

    def run(self) -> None:
        """Write the text to its end, and close.

        Raises:
            DeviceError: It could not be brought to its end; it is closed all the same.
            DrafterError: Likewise.
        """
        try:
            self.start()
            while not self.done:
                if not self.step():
                    self._wait()
        except BaseException as error:
            self.closing.fail(error)
            raise

    def start(self) -> None:
        self.drafting.restart()  # first, so that no edge hears of a prompt that cannot be drafted for
        if not self.retry.holding:
            self._open()

    def step(self) -> bool:
        """Take an event, draft a token, or send what is due; return False if there is nothing to do but to wait."""
        if self.context.cancellation.requested:
            self.session.cancel(EndReason.CANCELLED)
        if self.session.ended is not None and not self.closing.begun:
            self.closing.begin(within_s=self.retry.timeouts.close_s)
        elif (event := self.inbox.take()) is not None:
            self._handle(event)
        elif self.session.local:
            self._write_alone()
        elif self.session.may_send and not self.retry.holding:
            if (draft := self.drafting.step()) is not None:
                self._send_draft(draft)
        else:
            return False
        return True

    def quiet_s(self) -> float:
        """Return how long to wait for what arrives next before `on_quiet` (seconds)."""
        if self.closing.begun:
            return self.closing.left_s
        quiet_s = min(self.retry.quiet_s(opened=self._opened), self.waiting.quiet_s(), self.outage.quiet_s())
        return min(quiet_s, self._rejoining.left_s) if self._rejoining.asking else quiet_s

    def on_quiet(self) -> None:
        """Nothing came in time: ask again, or give up.

        Raises:
            DeviceError: All that there was to wait is over.
        """
        if self.closing.begun:
            self.closing.on_quiet()
            return
        if self.waiting.may_go_elsewhere():
            self.waiting.look()
            self._leave()
            return
        self._look()
        if self.session.local or self.session.ended is not None:
            return
        if self.retry.may_ask_again(opened=self._opened):
            self._repeat()

    def resume(self, cause: str = "the edge went away.", *, silent: bool = False) -> None:
        """Open the session again, at the text so far.

        Args:
            cause: Why, as the end of a sentence.
            silent: Whether because the edge says nothing at all.

        Raises:
            SessionFailed: It was resumed too often, and the text has not grown.
        """
        self.retry.resumed(cause, silent=silent)
        if self.retry.holding:
            self.session.suspend()
            self.drafting.drop()
        else:
            self._open()

    @property
    def _drafter(self) -> Drafter:
        return self.drafting.drafts.drafter

    @property
    def _opened(self) -> bool:
        return self.session.opened is not None

    def _wait(self) -> None:
        started = self.clock()
        event = self.inbox.take(timeout_s=self.quiet_s())
        if not self.closing.begun:
            self.session.counters.wait_ms += (self.clock() - started) * 1e3
        if event is None:
            self.on_quiet()
        else:
            self._handle(event)

    # Events

    def _handle(self, event: Event) -> None:
        if self.closing.begun:
            self.closing.on_event(event)
            return
        if self.session.local:
            self._handle_alone(event)
            return
        match event:
            case ReceivedVerdict():
                self._verdict(event)
            case Opened() | Refused() | Fault() | Closed():
                self._reply(event)
            case EdgeStateChanged():
                self._edge_changed(event)
            case ConnectionChanged(up=True) if not self.retry.holding:
                self._repeat()
            case Undelivered(topic=topic):
                self._undelivered(topic)
            case _:
                pass  # woken up, to look at the cancellation
        self._look()  # here too: an edge may send without end, and answer nothing

    def _verdict(self, received: ReceivedVerdict) -> None:
        session = self.session
        if session.opened is not None and received.verdict.handle == session.opened.handle:
            session.counters.downlink_bytes += received.size
        begin = len(session.committed)
        effects = session.on_verdict(received.verdict)
        self.drafting.pacing.learn(effects)
        for effect in effects:
            if not self.retry.holding:
                self.refusals.last = None
            self.retry.answered(tokens=len(effect.tokens), more=bool(session.unanswered()))
            if effect.tokens:
                self.refusals.progress()
                self.waiting.grown()
                self.first_at = self.first_at or self.clock()
                if self.context.on_tokens(self._told(self.drafting.drafts.committed(effect, begin=begin))):
                    session.cancel(EndReason.STOP)
                    return
                begin += len(effect.tokens)
            self.drafting.follow(effect)
            if effect.request is not None:
                self._send_draft(effect.request)
        if session.ended is None and session.may_renew_stream and not self.retry.holding:
            renewal = self.drafting.renewal()
            if renewal is not None:
                self._send_draft(renewal)

    def _told(self, tokens: CommittedTokens) -> CommittedTokens:
        """Return what is told of tokens that an edge has verified: nothing follows the law behind unverified ones."""
        if not self.session.text.unverified:
            return tokens
        return replace(tokens, origins=(TokenOrigin.UNVERIFIED,) * len(tokens))

    def _reply(self, reply: Opened | Refused | Fault | Closed) -> None:
        session = self.session
        match reply:
            case Opened():
                self._take_grant(reply)
            case Refused() if self._rejoining.asking and reply.session == session.request.session:
                elsewhere = self.refusals.leave(reply.retry_s)
                self._go_alone(reply.sentence, pause_s=0.0 if elsewhere else min(reply.retry_s or 0.0, LOOK_AGAIN_S))
            case Refused() if reply.session == session.request.session and session.state is SessionState.OPENING:
                self.refusals.postpone(reply)
                session.on_postponed()
            case Fault() if reply.handle is None or (session.opened and reply.handle == session.opened.handle):
                self._fault(reply)
            case Closed() if session.opened is not None and session.concerns(reply):
                # The edge gave the session up, its lease ended while we were away; our text stands.
                self.resume()
            case _:
                pass

    def _fault(self, fault: Fault) -> None:
        if fault.action is Action.GIVE_UP:
            self.refusals.give_up(fault)
        elif fault.action is Action.WAIT and self.refusals.wait(fault, opened=self._opened):
            return
        if self._opened:
            _log.info("Resuming session %s: %s", self.session.request.session.hex(), fault.sentence)
            self.resume(fault.sentence)

    def _take_grant(self, opened: Opened) -> None:
        length = len(self.session.committed)
        if not self.session.on_opened(opened):
            return
        self.refusals.last = None
        self.refusals.until.lift()
        self.retry.answered(tokens=0)
        self._rejoining.taken()
        if len(self.session.committed) < length:
            self.context.on_void(len(self.session.committed))
        self.drafting.restart()
        if not self.claim(opened.handle):
            self.resume("another text of this device has the same handle.")

    def _undelivered(self, topic: Topic) -> None:
        """Nobody listens where a message went: the edge is away."""
        if topic is Topic.OPEN:
            self.session.on_undelivered()
            if self._rejoining.asking:
                self._go_alone(self._rejoining.cause)
        elif topic is Topic.DRAFT and self._opened:
            self.resume()

    def _edge_changed(self, changed: EdgeStateChanged) -> None:
        session = self.session
        if session.opened is None:
            is_back = changed.before in (Presence.OFFLINE, Presence.DRAINING)
            wanted = session.state is SessionState.UNDELIVERED or is_back
            if changed.presence is Presence.ONLINE and wanted and self.retry.may_ask_early():
                self._open()
        elif session.opened.edge == changed.edge and changed.presence is Presence.OFFLINE:
            self.resume()
        elif self.waiting.may_go_elsewhere():
            self._leave()

    def _leave(self) -> None:
        """Go on at another edge: the one that has the session says nothing, not even that it is gone."""
        opened = self.session.opened
        assert opened is not None
        _log.warning("Edge %s does not answer; the session goes on at another.", opened.edge)
        self.resume("the edge does not answer.", silent=True)

    # Without an edge

    def _look(self) -> None:
        """See whether an edge answers, and do as is asked for if none does.

        Raises:
            DeviceError: The text is to fail then; or it waits, and all that there was to wait is over.
        """
        if self._rejoining.asking:
            if not self.outbound.connected or self._rejoining.is_due:
                self._go_alone(self._rejoining.cause)
        elif (cause := self.outage.cause()) is None:
            self.waiting.look()
        elif self.outage.settings.policy is OfflinePolicy.LOCAL:
            _log.warning("The text goes on without an edge: %s", cause)
            self._go_alone(str(cause))
        else:
            raise self.refusals.last or cause

    def _go_alone(self, cause: str, *, pause_s: float = 0.0) -> None:
        self._rejoining.alone(cause, pause_s=pause_s)
        self.retry.rest()
        self.session.go_local(self._drafter.codec.end_tokens)
        self.drafting.restart()

    def _write_alone(self) -> None:
        """Write a token without an edge, or ask for one that is back."""
        if self._rejoining.is_due and self._rejoin():
            return
        session = self.session
        if len(session.request.prompt) + len(session.committed) >= self._drafter.context:
            session.cancel(EndReason.LENGTH)
            return
        token = self.drafting.drafts.write_alone()
        if token is None:
            raise EdgeUnavailable(
                f"{self._rejoining.cause} The drafter {self._drafter.name!r} cannot go on alone: it has no "
                "model; set drafter = 'llama.cpp', or offline = 'wait'."
            )
        if session.ended is None and session.text.unverified % _KEPT_EVERY == 1:
            self.on_alone(self.closing.unfinished())
        self.first_at = self.first_at or self.clock()
        self.waiting.grown()
        if self.context.on_tokens(CommittedTokens((token,), (TokenOrigin.UNVERIFIED,))):
            session.cancel(EndReason.STOP)

    def _handle_alone(self, event: Event) -> None:
        match event:
            case ConnectionChanged(up=True) | EdgeStateChanged(presence=Presence.ONLINE):
                self._rejoining.hasten()
            case _:
                pass  # what an edge says of a grant that is void, or a wake-up to look at the cancellation

    def _rejoin(self) -> bool:
        """Ask for an edge that verifies the rest, if the text is to have one; return whether that was done."""
        if not self.outage.may_rejoin():
            self._rejoining.put_off()
            return False
        self._rejoining.ask()
        self.retry.resumes += 1
        self._open()
        return True

    # Sending

    def _open(self) -> None:
        self.retry.asked()
        self.refusals.last = None
        self.outbound.open(self.session.open())

    def _send_draft(self, draft: Draft) -> None:
        assert self.session.opened is not None
        self.retry.asked()
        self.session.counters.uplink_bytes += self.outbound.draft(draft, edge=self.session.opened.edge)

    def _repeat(self) -> None:
        """Send again what was not answered; the edge takes each round once."""
        self.refusals.last = None
        if self.session.opened is None:
            self.retry.asked()
            self.outbound.open(self.session.open_again())
            return
        for draft in self.session.unanswered():
            self._send_draft(draft)

"""Devices of the model: the real driver without a thread, which writes one text after another."""

from collections.abc import Callable
from dataclasses import dataclass, field

from fleet_common.mqtt.link import Will
from fleet_device.client.decision import EdgeAvailability, RetryPolicy, RetryState
from fleet_device.client.drafting import Drafting, DraftSequence, SessionPacing
from fleet_device.client.driver import SessionDriver
from fleet_device.client.messaging import Inbox, Outbound
from fleet_device.client.reports import UnconfirmedCloses
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.errors import DeviceError
from fleet_device.pacing.contract import Pacing
from fleet_device.requests.generate import RequestContext
from fleet_device.session.machine import DeviceSession
from fleet_device.session.sequence import VerdictEffect
from fleet_device.settings import OfflinePolicy, Outages
from schemas.control import DeviceState, Presence, encode_json
from schemas.messages import Open, Opened, Verdict
from schemas.reasons import EndReason
from schemas.topics import Topic, build
from tests.protocol_model.network import SteeredBroker, TappedLink
from tests.protocol_model.reference import Replay
from tests.support.markov import MarkovScript
from tests.support.memory_fleet import DRAFT, END, FLEET, START, Clock

PATIENT = RetryPolicy(open_s=3600.0, resume_s=3600.0)  # longer than all the waiting in a run
CLOSES = 8  # that a device keeps
ACTS = 400  # of one device in a row; more are a loop


@dataclass(slots=True)
class RecordedSession(DeviceSession):
    """A session whose effects are kept, each with the grant of the edge that has caused it."""

    effects: list[tuple[VerdictEffect, Opened]] = field(default_factory=list)

    def on_verdict(self, verdict: Verdict) -> list[VerdictEffect]:
        opened = self.opened
        effects = DeviceSession.on_verdict(self, verdict)
        if opened is not None:
            self.effects.extend((effect, opened) for effect in effects)
        return effects


@dataclass(slots=True)
class Text:
    """A request, running or finished.

    Attributes:
        replay: The expected output.
        error: How it failed.
        quarantined: Whether the device was quarantined meanwhile.
        harmed: Whether more happened to it than repeated or reordered messages.
    """

    session: RecordedSession
    driver: SessionDriver
    replay: Replay
    written: list[int]
    error: DeviceError | None = None
    quarantined: bool = False
    harmed: bool = False

    @property
    def over(self) -> bool:
        return self.driver.done or self.error is not None


@dataclass(slots=True)
class ModelDevice:
    """A device, up or down; `link` is None while it is down."""

    name: str
    broker: SteeredBroker
    clock: Clock
    tap: Callable[[str, bytes], None]
    target_of: Callable[[Opened], MarkovScript]
    text: Text | None = None
    link: TappedLink | None = None
    _inbox: Inbox = field(init=False)
    _outbound: Outbound = field(init=False)
    _unconfirmed: UnconfirmedCloses = field(init=False)
    _availability: EdgeAvailability = field(init=False)

    def start(self) -> None:
        self._inbox = Inbox()
        self.link = TappedLink(self.broker, self.name, self.tap, will=Will(self._topic, self._state(Presence.OFFLINE)))
        self._outbound = Outbound(self.link, FLEET, self.name, self._inbox)
        self._availability = EdgeAvailability(self.clock, self._inbox.edges, lambda: self._outbound.connected)
        self._unconfirmed = UnconfirmedCloses(self._outbound.publish_close)
        self._inbox.listener = self._unconfirmed.on_event
        self._inbox.subscribe(self.link, fleet=FLEET, device=self.name)
        self.link.on_connection(lambda up: self._announce() if up else None)
        self.link.start(timeout_s=1.0)
        self.broker.pump()

    def crash(self) -> None:
        self.text = self.link = None
        self.broker.forget(self.name)

    def write(self, request: Open, *, pacing: Pacing, note: dict[str, DeviceSession], any_target: bool = False) -> None:
        policy = OfflinePolicy.OTHER_TARGET if any_target else OfflinePolicy.WAIT
        text = self.prepare(request, pacing=pacing, note=note, outages=Outages(policy=policy, after_s=3.0))
        self._guarded(text.driver.start)

    def prepare(
        self,
        request: Open,
        *,
        pacing: Pacing,
        note: dict[str, DeviceSession],
        outages: Outages,
        policy: RetryPolicy = PATIENT,
    ) -> Text:
        assert self.link is not None
        while self._inbox.get() is not None:
            pass  # of finished requests
        written: list[int] = []
        session = note[self.name] = RecordedSession(request)
        retry = RetryState(policy, outages, self.clock())
        if self._availability.refused_s > 0.0:
            retry.hold(self._availability.refused_s, self.clock())
        drafts = DraftSequence(session, ScriptedDrafter(DRAFT, DRAFT.words, end_tokens=(END,)), self.clock)
        driver = SessionDriver(
            session=session,
            drafting=Drafting(session, drafts, SessionPacing(session, pacing, self.clock)),
            outbound=self._outbound,
            inbox=self._inbox,
            retry=retry,
            availability=self._availability,
            context=RequestContext(on_tokens=written.extend),
            keep=self._unconfirmed.keep,
        )
        self.text = Text(session, driver, Replay(request), written)
        return self.text

    def work(self) -> bool:
        """Do everything that is possible without waiting; return whether anything was done."""
        text, worked = self.text, False
        for _ in range(ACTS):
            if text is None or text.over or not self._guarded(text.driver.step):
                self.broker.pump()
                return worked
            worked = True
        raise AssertionError(f"the device is still busy after {ACTS} acts")

    def wait(self) -> None:
        self.work()
        if self.text is not None and not self.text.over:
            self._guarded(self.text.driver.on_quiet)
            self.work()

    def cancel(self) -> None:
        if self.text is not None:
            self.text.driver.context.cancellation.cancel()

    def check(self) -> None:
        text = self.text
        if text is None:
            return
        session = text.session
        for effect, opened in session.effects:
            text.replay.note_target(self.target_of(opened), len(effect.tokens))
            if text.replay.mixed:
                verified = session.sequence.verified
                assert session.any_target, "committed tokens of a request come from two targets"
                assert verified is not None, "tokens of another target are not marked"
                assert verified <= len(text.replay.text), "tokens of another target are not marked"
            text.replay.take(effect)
        session.effects.clear()
        assert session.committed == text.replay.text, "tokens were committed that no verdict has given"
        assert text.written == session.committed, "the application was given other tokens than were committed"
        if session.ended in (EndReason.STOP, EndReason.LENGTH):
            text.replay.check_whole()
        assert len(self._unconfirmed) <= CLOSES
        drafts = session._drafts
        if session.opened is not None:
            assert len(drafts.drafts) <= session.opened.window, "more drafts are in flight than were granted"
        assert drafts._early.keys() <= {draft.round for draft in drafts.drafts}, "verdicts are kept that nobody awaits"

    def _guarded(self, act: Callable[[], bool | None]) -> bool:
        """Run `act` as `SessionDriver.run` does: an error ends the request, and is reported to the edge."""
        text = self.text
        assert text is not None
        try:
            return bool(act())
        except DeviceError as error:
            text.error = error
            text.driver.closing.fail(error)
            return True

    @property
    def _topic(self) -> str:
        return build(Topic.STATE, fleet=FLEET, device=self.name)

    def _state(self, presence: Presence) -> bytes:
        state = DeviceState(presence=presence, software="0", draft_model="toy", quantization="none", since=START)
        return encode_json(state)

    def _announce(self) -> None:
        if self.link is not None:
            self.link.publish(self._topic, self._state(Presence.ONLINE), retain=True)

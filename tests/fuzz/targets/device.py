"""Device: its inbox, session driver and machine before a hostile edge.

An input is a byte that says what is asked for, and a sequence of frames: what the edge sends, and what else happens. A
text may fail, by an error of the device's own; it never grows past what was asked for, and the device never sends
without end.
"""

import random
from collections.abc import Iterator
from typing import Final

import cbor2

from fleet_device.client.decision import EdgeAvailability, RetryPolicy, RetryState
from fleet_device.client.drafting import Drafting, DraftSequence, SessionPacing
from fleet_device.client.driver import SessionDriver
from fleet_device.client.messaging import Inbox, Outbound, Undelivered
from fleet_device.drafters.contract import DrafterError
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.errors import DeviceError
from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import FixedPacing
from fleet_device.session.machine import DeviceSession
from fleet_device.settings import Outages
from schemas.codec import decode_close, decode_draft, decode_open
from schemas.policy import Mode
from schemas.reasons import EndReason
from schemas.topics import Topic, build, parse
from tests.fuzz.frames import Frame, pack, unpack
from tests.fuzz.harness import Finding
from tests.fuzz.targets.framed import FramedTarget, loaded, on_any_topic, recorded
from tests.fuzz.targets.stub_link import StubLink
from tests.support import memory_fleet
from tests.support.golden import CASES, payload_of
from tests.support.memory_broker import Faults
from tests.support.memory_fleet import DRAFT, EDGE, END, FLEET, Clock, MemoryFleet, terms

DEVICE: Final = "device-1"
VERDICT, REPLY, STATE, OTHER, HAPPENING = range(5)
KIND, LIVE, PLACED = 7, 32, 64  # bits of a frame's op
_MAX_STEPS: Final = 400  # to one frame
_MAX_SENT: Final = 80
_TOKENS: Final = 24
_CLOSERS: Final = {Topic.OPEN: decode_open, Topic.DRAFT: decode_draft, Topic.CLOSE: decode_close}


class DeviceTarget(FramedTarget):
    cbor, json = frozenset({VERDICT, REPLY}), frozenset({STATE})

    def __call__(self, data: bytes) -> None:
        if not data:
            return
        clock, link = Clock(), StubLink()
        driver = _driver(data[0], link, clock)
        try:
            driver.start()
            for frame in unpack(data[1:]):
                _give(driver, link, clock, frame)
                _work(driver)
                self._check(driver, link)
                if driver.done:
                    return
        except (DeviceError, DrafterError) as error:
            if len(str(error)) > 1000:
                raise Finding("an error longer than a sentence") from error
            driver.session.cancel(EndReason.FAILED)
            driver.closing.send_close()
        self._check(driver, link)

    def seeds(self) -> Iterator[bytes]:
        granted = b""
        for number in range(8):
            frames = list(_recorded(number))
            granted = granted or pack(frames[:1])
            yield bytes([number]) + pack(frames)
        kinds = {"verdict": VERDICT, "reply": REPLY, "EdgeState": STATE}
        for message in CASES:
            if message["reads"] in kinds:
                yield b"\x00" + granted + pack([Frame(kinds[message["reads"]] | LIVE | PLACED, payload_of(message))])
        for number in range(8):
            yield b"\x01" + pack([Frame(HAPPENING, bytes([number]))])

    @staticmethod
    def _check(driver: SessionDriver, link: StubLink) -> None:
        session = driver.session
        if len(session.committed) > _TOKENS + 1:
            raise Finding(f"{len(session.committed)} tokens, asked for were {_TOKENS}")
        if any(not 0 <= token < DRAFT.size for token in session.committed):
            raise Finding("a token outside the vocabulary is committed")
        sent = link.take()
        if len(sent) > _MAX_SENT:
            raise Finding(f"{len(sent)} messages for one")
        for topic, payload in sent:
            _CLOSERS[parse(topic).topic](payload)


def _driver(first: int, link: StubLink, clock: Clock) -> SessionDriver:
    mode = Mode.COUPLED if first & 1 else Mode.RESIDUAL
    session = DeviceSession(terms(first, mode=mode, max_new_tokens=_TOKENS))
    inbox = Inbox()
    inbox.subscribe(link, fleet=FLEET, device=DEVICE)
    outbound = Outbound(link, FLEET, DEVICE, inbox)
    pacing = AdaptivePacing() if first & 4 else FixedPacing(3, ahead=bool(first & 2))
    drafts = DraftSequence(session, ScriptedDrafter(DRAFT, DRAFT.words, end_tokens=(END,)), clock)
    return SessionDriver(
        session=session,
        drafting=Drafting(session, drafts, SessionPacing(session, pacing, clock)),
        outbound=outbound,
        inbox=inbox,
        retry=RetryState(RetryPolicy(), Outages(), clock()),
        availability=EdgeAvailability(clock, inbox.edges, lambda: outbound.connected),
    )


def _give(driver: SessionDriver, link: StubLink, clock: Clock, frame: Frame) -> None:
    kind, payload = frame.op & KIND, frame.payload
    live, placed = bool(frame.op & LIVE), bool(frame.op & PLACED)
    match kind:
        case 0:
            payload = _living_verdict(payload, driver.session, placed=placed) if live else payload
            link.deliver(build(Topic.VERDICT, fleet=FLEET, device=DEVICE), payload)
        case 1:
            payload = _living_reply(payload, driver.session, placed=placed) if live else payload
            link.deliver(build(Topic.SESSION, fleet=FLEET, device=DEVICE), payload)
        case 2:
            link.deliver(build(Topic.EDGE_STATE, fleet=FLEET, edge=EDGE), payload, retained=True)
        case 3:
            link.deliver(*on_any_topic(payload))
        case _:
            _happen(driver, link, clock, payload[0] % 8 if payload else 0)


def _happen(driver: SessionDriver, link: StubLink, clock: Clock, what: int) -> None:
    match what:
        case 0:
            link.connect(up=False)
        case 1:
            link.connect(up=True)
        case 2:
            driver.inbox.put(Undelivered(Topic.OPEN))
        case 3:
            driver.inbox.put(Undelivered(Topic.DRAFT))
        case 4:
            driver.context.cancellation.cancel()
        case _:
            clock.seconds += max(0.05, driver.quiet_s()) * (1 << (what - 5))
            driver.on_quiet()


def _work(driver: SessionDriver) -> None:
    for _ in range(_MAX_STEPS):
        if driver.done or not driver.step():
            return
    raise Finding(f"more than {_MAX_STEPS} steps for one message")


def _living_verdict(payload: bytes, session: DeviceSession, *, placed: bool) -> bytes:
    fields = loaded(payload, list)
    if fields is None or len(fields) < 7:
        return payload
    if session.opened is not None:
        fields[0] = session.opened.handle
    drafts = session.unanswered()
    if placed and drafts:
        fields[1] = drafts[0].round
        if isinstance(fields[2], int):
            fields[2] = min(fields[2], len(drafts[0].tokens))
    return cbor2.dumps(fields)


def _living_reply(payload: bytes, session: DeviceSession, *, placed: bool) -> bytes:
    fields = loaded(payload, dict)
    if fields is None:
        return payload
    if "session" in fields:
        fields["session"] = session.request.session
    if "attempt" in fields:
        fields["attempt"] = session._attempt
    if placed and "position" in fields:
        fields["position"] = len(session.committed)
    if "handle" in fields and session.opened is not None:
        fields["handle"] = session.opened.handle
    return cbor2.dumps(fields)


def _recorded(number: int) -> Iterator[Frame]:
    rng = random.Random(number)
    fleet = MemoryFleet(rng=rng, faults=Faults(duplicate=0.1, reorder=0.1) if number > 5 else None)
    asked = terms(number, mode=Mode.COUPLED if number & 1 else Mode.RESIDUAL, max_new_tokens=_TOKENS)
    device = memory_fleet.Device(fleet, DEVICE, asked, length=3, ahead=bool(number & 2))
    kinds = {Topic.VERDICT: VERDICT, Topic.SESSION: REPLY}
    for message in recorded(fleet, device, rng):
        if (topic := parse(message.topic).topic) in kinds:
            yield Frame(kinds[topic] | LIVE | PLACED, message.payload)

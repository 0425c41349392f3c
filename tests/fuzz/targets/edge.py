"""Edge: its guard, intake, handlers, scheduler and answers before two hostile devices, over a scripted target.

An input is a sequence of frames, each a message on one of the devices' topics, or time that passes. Answers go to who
asked and can be read, the edge logs no error, and nothing is left of sessions whose time is over.
"""

import random
from collections.abc import Iterator
from typing import Final

import cbor2

from fleet_edge.assembly import assemble
from fleet_edge.orchestrator import Orchestrator
from fleet_edge.sessions.machine import EdgeSession
from fleet_edge.settings import EdgeSettings
from schemas.codec import decode_reply, decode_verdict
from schemas.policy import Mode
from schemas.topics import Topic, build, parse
from tests.fuzz.frames import Frame, pack, unpack
from tests.fuzz.harness import Finding
from tests.fuzz.targets.framed import FramedTarget, loaded, on_any_topic, recorded
from tests.fuzz.targets.stub_link import StubLink
from tests.support.golden import CASES, payload_of
from tests.support.memory_broker import Faults
from tests.support.memory_fleet import EDGE, END, FLEET, TARGET, Clock, Device, MemoryFleet, Sink, terms
from tests.support.scripted_verifier import ScriptedVerifier

DEVICES: Final = ("device-1", "device-2")
OPEN, DRAFT, CLOSE, STATE, OTHER, TIME = range(6)
KIND, SECOND, RETAINED, LIVE, PLACED = 7, 8, 16, 32, 64  # bits of a frame's op
_TOPICS: Final = {OPEN: Topic.OPEN, DRAFT: Topic.DRAFT, CLOSE: Topic.CLOSE, STATE: Topic.STATE}
_MAX_ANSWERS: Final = 12  # to one frame
_MAX_RECORDS: Final = 60
_END_S: Final = 1e6


class EdgeTarget(FramedTarget):
    head = 0
    cbor, json = frozenset({OPEN, DRAFT, CLOSE}), frozenset({STATE})

    def __init__(self) -> None:
        self._settings = EdgeSettings.model_validate(
            {"fleet": FLEET, "edge": EDGE, "max_sessions_per_device": 4, "max_new_tokens": 64}
        )

    def __call__(self, data: bytes) -> None:
        clock, link, sink = Clock(), StubLink(), Sink()
        verifier = ScriptedVerifier(TARGET, TARGET.words, context=256, budget_tokens=300, end_tokens=(END,))
        edge = assemble(self._settings, verifier=verifier, link=link, sink=sink, clock=clock, now=clock.now)
        for frame in unpack(data):
            before = len(sink)
            sender = self._give(edge, link, clock, frame)
            if sender is not None:
                edge.step()
            _check_answers(link.take(), sender)
            if sender is not None and len(sink) - before > _MAX_RECORDS:
                raise Finding(f"{len(sink) - before} records for one message")
        clock.seconds += _END_S
        edge.handlers.expire()
        edge.handlers.flush()
        edge.scheduler._verifier.clear()  # what has ended is kept as long as there is room, and nothing else
        if len(edge.sessions) or verifier.capacity() != 300:
            raise Finding("an ended session leaves something behind")

    def seeds(self) -> Iterator[bytes]:
        for number in range(6):
            yield pack(_recorded(number))
        kinds = {"open": OPEN, "draft": DRAFT, "close": CLOSE, "DeviceState": STATE}
        for message in CASES:
            if message["reads"] in kinds:
                yield pack([Frame(kinds[message["reads"]], payload_of(message))])
        yield pack([Frame(OTHER, b"\x12dssd/v1/memory/x/y" + b"{}"), Frame(TIME, b"\x09")])

    def _give(self, edge: Orchestrator, link: StubLink, clock: Clock, frame: Frame) -> str | None:
        """Deliver a frame; return the sender, None for time that passes."""
        kind, device = frame.op & KIND, DEVICES[bool(frame.op & SECOND)]
        retained = bool(frame.op & RETAINED)
        if kind in _TOPICS:
            payload = frame.payload
            if kind == DRAFT and frame.op & LIVE:
                payload = _living(payload, edge, device, placed=bool(frame.op & PLACED))
            topic = build(_TOPICS[kind], fleet=FLEET, device=device, edge=EDGE if kind == DRAFT else None)
            link.deliver(topic, payload, retained=retained)
            return device
        if kind == OTHER:
            topic, payload = on_any_topic(frame.payload)
            link.deliver(topic, payload, retained=retained)
            try:
                return parse(topic).device or ""
            except ValueError:
                return ""
        clock.seconds += 2.0 ** (frame.payload[0] % 12) / 16 if frame.payload else 0.1
        edge.handlers.expire()
        edge.handlers.flush()
        edge.handlers.draining = len(frame.payload) > 1 and frame.payload[1] == 0xFF
        edge.step()
        return None


def _check_answers(published: list[tuple[str, bytes]], sender: str | None) -> None:
    if len(published) > _MAX_ANSWERS and sender is not None:
        raise Finding(f"{len(published)} answers to one message")
    for topic, payload in published:
        address = parse(topic)
        if sender is not None and address.device != sender:
            raise Finding(f"a message of {sender!r} is answered on {topic}")
        (decode_verdict if address.topic is Topic.VERDICT else decode_reply)(payload)


def _living(payload: bytes, edge: Orchestrator, device: str, *, placed: bool) -> bytes:
    session: EdgeSession | None = None
    for each in edge.sessions:
        if each.device == device:
            session = each
    fields = loaded(payload, list)
    if session is None or fields is None or len(fields) < 9:
        return payload
    fields[0] = session.handle
    if placed:
        fields[2], fields[3], fields[8] = session._epoch, session.committed, session._digest
    return cbor2.dumps(fields)


def _recorded(number: int) -> Iterator[Frame]:
    rng = random.Random(number)
    fleet = MemoryFleet(rng=rng, faults=Faults(duplicate=0.1, reorder=0.1) if number > 3 else None)
    mode = Mode.COUPLED if number % 2 else Mode.RESIDUAL
    device = Device(fleet, DEVICES[0], terms(number, mode=mode, max_new_tokens=10), length=3, ahead=number > 1)
    kinds = {topic: kind for kind, topic in _TOPICS.items()}
    for message in recorded(fleet, device, rng):
        if (topic := parse(message.topic).topic) in kinds:
            live = LIVE | PLACED if number % 2 and kinds[topic] == DRAFT else 0
            yield Frame(kinds[topic] | live, message.payload)

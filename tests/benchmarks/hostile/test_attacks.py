import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import pytest

from benchmarks.client_process import Identity
from benchmarks.hostile.attacks import contract
from benchmarks.hostile.attacks.contract import Attacker, _code_of
from benchmarks.hostile.attacks.registry import ATTACKS
from benchmarks.hostile.mqtt_client import ClientCounters
from benchmarks.hostile.place import Place
from schemas.codec import decode_close, decode_draft, decode_open, encode_reply, encode_verdict
from schemas.errors import CodecError
from schemas.messages import Fault, Refused, Verdict
from schemas.reasons import Action, FaultCode, RefusalCode
from schemas.topics import Topic, parse
from schemas.vocabulary import Vocabulary
from tests.support.mqtt_packets import IncomingPacket, PacketType, split_packets

VOCABULARY = Vocabulary.of([f"t{token}" for token in range(64)])


class SilentClient:
    """A client whose broker takes everything and answers nothing."""

    def __init__(self, identity: Identity, **_: Any) -> None:
        self.identity = identity
        self.counters = ClientCounters(connects=1)
        self.on_connect: Callable[[], None] = lambda: None
        self.connected, self.full, self.reads = True, False, True
        self.sent = bytearray()
        self.filters: list[str] = []

    def send(self, packets: bytes) -> None:
        self.sent += packets

    def pump(self, wait_s: float) -> None:
        pass

    def subscribe(self, filters: Sequence[str]) -> None:
        self.filters += filters

    def packets(self) -> list[IncomingPacket]:
        return list(split_packets(bytearray(self.sent)))


def place(*, devices: int = 1, control: bool = False) -> Place:
    return Place(
        fleet="home",
        edge="edge-1",
        sink="edge-sink",
        vocabulary_size=VOCABULARY.size,
        fingerprint=VOCABULARY.fingerprint.hex(),
        context=256,
        max_packet_bytes=1 << 20,
        identities=tuple(Identity(f"hostile-{n}", "h", 1, "ca", "pem", "key") for n in range(devices)),
        control=control,
    )


@pytest.fixture
def attack(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Attacker]:
    monkeypatch.setattr(contract, "RawClient", SilentClient)
    monkeypatch.setattr(contract.time, "sleep", lambda _seconds: None)

    def run(name: str, *, seconds: float = 1.0, control: bool = False) -> Attacker:
        ticks: Iterator[int] = count()

        def clock() -> float:
            return next(ticks) / 1000

        attacker = Attacker(
            place(devices=ATTACKS[name].devices, control=control),
            random.Random(1),
            running=lambda: clock() < seconds,
            clock=clock,
        )
        ATTACKS[name].run(attacker)
        return attacker

    return run


def packets_of(attacker: Attacker) -> list[IncomingPacket]:
    clients: list[Any] = list(attacker.clients)
    return [packet for client in clients for packet in client.packets()]


@pytest.mark.parametrize(
    ("name", "rate", "decode", "topic"),
    [
        ("unknown-session", 2000, decode_draft, Topic.DRAFT),
        ("unknown-session-qos0", 2000, decode_draft, Topic.DRAFT),
        ("out-of-epoch", 2000, decode_draft, Topic.DRAFT),
        ("opens", 3400, decode_open, Topic.OPEN),
        ("closes", 2000, decode_close, Topic.CLOSE),
        ("more-samples", 400, decode_draft, Topic.DRAFT),
        ("slow-reader", 1000, decode_draft, Topic.DRAFT),
    ],
)
def test_a_flood_keeps_its_rate_and_sends_what_our_decoder_takes(
    attack: Callable[..., Attacker], name: str, rate: int, decode: Callable[[bytes], object], topic: Topic
) -> None:
    seconds = 12.0  # those that need a session of their own wait 10 s for it, in vain
    attacker = attack(name, seconds=seconds)
    packets = packets_of(attacker)
    assert rate * 1.5 < len(packets) <= rate * seconds
    for packet in packets[-200:]:
        name_sent, identifier, payload = packet.publish()
        assert parse(name_sent.decode()).topic is topic
        assert (identifier is None) == name.endswith("qos0")
        decode(payload)


def test_in_a_control_the_edge_gets_nothing(attack: Callable[..., Attacker]) -> None:
    for name, each in ATTACKS.items():
        if not each.control or name in ("wills", "huge-opens", "retained"):
            continue
        topics = Counter(packet.publish()[0] for packet in packets_of(attack(name, control=True)) if packet.kind == 3)
        assert topics, name
        assert all(topic.endswith((b"/up/draft/edge-sink", b"/config/reported")) for topic in topics), name


def test_ten_thousand_filters_are_asked_for_in_parts(attack: Callable[..., Attacker]) -> None:
    (client,) = attack("filters", seconds=2.0).clients
    assert isinstance(client, SilentClient)
    assert len(set(client.filters)) == 10_000


def test_every_device_of_a_swarm_takes_part(attack: Callable[..., Attacker]) -> None:
    attacker = attack("swarm", seconds=5.0)
    assert len(attacker.clients) == 50
    assert all(packet.kind == PacketType.PUBLISH for packet in packets_of(attacker))
    assert len({packet.publish()[0].split(b"/")[3] for packet in packets_of(attacker)}) == 50


def test_random_bytes_are_no_messages(attack: Callable[..., Attacker]) -> None:
    payloads = [packet.publish()[2] for packet in packets_of(attack("random-bytes"))]
    assert len(payloads) > 500
    for payload in payloads[:50]:
        with pytest.raises(CodecError):
            decode_draft(payload)


@pytest.mark.parametrize("code", list(FaultCode))
def test_the_code_of_a_fault_is_found_without_decoding(code: FaultCode) -> None:
    fault = Fault(handle=1, round=2, code=code, action=Action.RESUME, sentence="The code is not here.")
    assert _code_of(b"d/down/session", encode_reply(fault)) == code.value


def test_the_code_of_a_refusal_is_found_and_a_verdict_is_known_by_its_topic() -> None:
    refused = Refused(session=bytes(8), code=RefusalCode.BUSY, sentence="Later.")
    assert _code_of(b"d/down/session", encode_reply(refused)) == "busy"
    assert _code_of(b"d/down/verdict", encode_verdict(Verdict(handle=1, round=1, accepted=0))) == "verdict"
    assert _code_of(b"d/down/session", b"code") == "other"
    assert _code_of(b"d/down/session", b"") == "other"


def test_a_place_survives_its_way_to_the_attacker() -> None:
    assert Place.from_json(place(devices=2).to_json()) == place(devices=2)

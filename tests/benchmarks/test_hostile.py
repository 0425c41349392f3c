import json
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.hostile import attacks, client
from benchmarks.hostile.attacks import ATTACKS, Attacker, wide_policy
from benchmarks.hostile.client import PATIENCE_S, KnownFleet
from benchmarks.hostile.grammars import long_opens
from benchmarks.hostile.messages import (
    DEFAULT_POLICY,
    HostileSessions,
)
from benchmarks.hostile.meters import rows_beside
from benchmarks.hostile.suite import AttackResult, wrong_with
from fleet_common.mqtt.link import Message
from schemas.codec import decode_close, decode_draft, decode_open
from schemas.messages import Draft
from schemas.policy import SamplingPolicy
from schemas.topics import Topic, build, parse
from schemas.vocabulary import Vocabulary
from tests.support.brokers import require_mosquitto
from tests.support.memory_fleet import EDGE, FLEET, MemoryFleet
from tests.support.memory_link import MemoryLink
from tests.support.mqtt_packets import IncomingPacket, split_packets
from tests.support.processes import BrokerClient

VOCABULARY = Vocabulary.of([f"t{token}" for token in range(64)])


class SilentClient:
    def __init__(self, identity: BrokerClient, **_: Any) -> None:
        self.identity = identity
        self.connects = 1
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


def place(*, devices: int = 1, control: bool = False) -> KnownFleet:
    return KnownFleet(
        fleet="home",
        edge="edge-1",
        sink="edge-sink",
        vocabulary_size=VOCABULARY.size,
        fingerprint=VOCABULARY.fingerprint.hex(),
        context=256,
        max_packet_bytes=1 << 20,
        identities=tuple(BrokerClient(f"hostile-{n}", "h", 1, "ca", "pem", "key") for n in range(devices)),
        control=control,
    )


@pytest.fixture
def attack(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Attacker]:
    monkeypatch.setattr(client, "HostileClient", SilentClient)
    monkeypatch.setattr(attacks.time, "sleep", lambda _seconds: None)

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
    seconds = 12.0  # attacks that need a session wait 10 s for it without success
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
        topics = Counter(
            packet.publish()[0] for packet in packets_of(attack(name, seconds=0.6, control=True)) if packet.kind == 3
        )
        assert topics, name
        assert all(topic.endswith((b"/up/draft/edge-sink", b"/config/reported")) for topic in topics), name


def good() -> AttackResult:
    return AttackResult(
        "opens", baseline=20.0, honest_control=0.95, honest_during=0.93, honest_after=1.0, fresh_device_s=0.2
    )


def test_a_fleet_that_held_out_is_told_from_one_that_did_not() -> None:
    assert not list(wrong_with(good()))
    for name, value in (
        ("honest_during", 0.5),
        ("honest_after", 0.5),
        ("edge_rss_mb", 101.0),
        ("rows", 101.0),
        ("fresh_device_s", 1.1),
        ("edge_died", True),
        ("broker_died", True),
        ("differing_texts", 1),
        ("quota_s", 3.0),
    ):
        result = good()
        setattr(result, name, value)
        assert list(wrong_with(result)), name


@pytest.mark.broker
@pytest.mark.slow
def test_an_attack_on_a_real_broker_and_a_scripted_edge_is_measured(tmp_path: Path) -> None:
    require_mosquitto()
    report = tmp_path / "hostile.json"
    words = "hostile attacks --scripted --attack unknown-session-qos0 --seconds 1 --baseline 0.5 --honest 1 --tokens 16"
    code = main([*words.split(" "), "--json", str(report), "--folder", str(tmp_path / "logs")])
    assert code in {0, 1}  # how well the fleet holds out on a busy machine is not for a test
    (attack,) = json.loads(report.read_text())["rows"]
    assert attack["name"] == "unknown-session-qos0"
    assert attack["baseline"] > 0
    assert attack["attacker"]["sent_per_s"] > 0
    assert attack["attacker"]["connects"] == 1
    assert 0.0 < attack["fresh_device_s"] < PATIENCE_S
    assert not attack["edge_died"]
    assert not attack["broker_died"]
    assert {"honest_during", "honest_after", "edge_rss_mb", "rows", "fresh_device_s"} <= attack.keys()


NAME = "hostile-1"


class Hostile:
    def __init__(self, policy: SamplingPolicy, *, number: int, drafts: bool = True) -> None:
        # The clock does not move here, so rates must be unlimited.
        self.fleet = MemoryFleet(settings={"quotas": {"drafts_per_s": 1e6, "new_tokens_per_min": 1e6}})
        self.link = MemoryLink(self.fleet.broker, NAME)
        self.drafts: list[Draft] = []
        self.closes = 0
        for topic in (Topic.SESSION, Topic.VERDICT):
            self.link.subscribe(build(topic, fleet=FLEET, device=NAME), self._arrived)
        self.link.start(timeout_s=1.0)
        self.group = HostileSessions(
            vocabulary=self.fleet.verifier.info.vocabulary,
            policy=policy,
            number=number,
            tokens=64,
            rng=random.Random(1),
            send=self.send,
            drafts=drafts,
        )

    def _arrived(self, message: Message) -> None:
        self.group.take(message.topic.encode(), message.payload)

    def send(self, topic: Topic, payload: bytes) -> None:
        if topic is Topic.DRAFT:
            self.drafts.append(decode_draft(payload))
        self.closes += topic is Topic.CLOSE
        edge = EDGE if topic is Topic.DRAFT else None
        self.link.publish(build(topic, fleet=FLEET, device=NAME, edge=edge), payload)


@pytest.mark.parametrize("policy", [DEFAULT_POLICY, wide_policy()])
def test_a_hostile_session_keeps_to_the_protocol_up_to_its_end(policy: SamplingPolicy) -> None:
    hostile = Hostile(policy, number=2)
    hostile.group.fill()
    hostile.fleet.settle()
    assert hostile.closes == 2
    assert not list(hostile.group)
    assert any(draft.fix is not None for draft in hostile.drafts), "or nothing was ever rejected"
    assert not hostile.fleet.sink.of("event"), "or it was answered with a fault"


class LinkedClient(SilentClient):
    """Client of an edge in memory, which answers at once."""

    def __init__(self, identity: BrokerClient, *, on_publish: Callable[[bytes, bytes], None], **_: Any) -> None:
        super().__init__(identity)
        self.fleet = MemoryFleet(settings={"quotas": {"new_tokens_per_min": 1e6, "prompt_s_per_min": 1e6}})
        self.link = MemoryLink(self.fleet.broker, identity.name)
        for topic in (Topic.SESSION, Topic.VERDICT):
            self.link.subscribe(
                build(topic, fleet=FLEET, device=identity.name),
                lambda message: on_publish(message.topic.encode(), message.payload),
            )
        self.link.start(timeout_s=1.0)

    def pump(self, wait_s: float) -> None:  # noqa: ARG002 - it answers at once
        packets, self.sent = self.sent, bytearray()
        for packet in split_packets(packets):
            topic, _, payload = packet.publish()
            self.link.publish(topic.decode(), payload)
        self.fleet.settle()


@pytest.mark.parametrize("length", [3, 40])
def test_requests_of_an_attacker_are_decoded_by_the_edge(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(client, "HostileClient", LinkedClient)
    ticks: Iterator[int] = count()
    vocabulary = MemoryFleet().verifier.info.vocabulary
    there = replace(place(), fleet=FLEET, vocabulary_size=vocabulary.size, fingerprint=vocabulary.fingerprint.hex())
    attacker = Attacker(there, random.Random(1), running=lambda: next(ticks) < 20, clock=lambda: next(ticks) / 1000)
    long_opens(attacker, sessions=2, length=length)
    assert attacker.verdicts >= 2, attacker.sent


def test_rows_of_honest_work_do_not_count_as_an_attackers(tmp_path: Path) -> None:
    database = tmp_path / "log.sqlite3"
    with sqlite3.connect(database) as connection:
        connection.executescript(
            """
            CREATE TABLE sessions (session, device); CREATE TABLE rounds (session); CREATE TABLE events (device);
            CREATE TABLE distributions (edge);
            INSERT INTO sessions VALUES ('a', 'honest'), ('b', 'hostile');
            INSERT INTO rounds VALUES ('a'), ('a'), ('b'), ('unknown');
            INSERT INTO events VALUES ('honest'), ('hostile'), (NULL);
            INSERT INTO distributions VALUES ('edge-1'), ('edge-1');
            """
        )
    assert rows_beside(database, ["honest"]) == 5

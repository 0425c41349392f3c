import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client

from broker_config.broker import Broker
from broker_config.processes import MosquittoProcess
from fleet_common.mqtt import connection, paho_link
from fleet_common.mqtt.connection import make_client
from fleet_common.mqtt.errors import NotConnected
from fleet_common.mqtt.link import Link, Message, PublishOutcome
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings
from schemas.topics import Topic, build, wildcard
from tests.support.brokers import require_mosquitto
from tests.support.links import START_S, Clock, Inbox
from tests.support.mqtt_packets import publish_packet
from tests.support.relay import Relay
from tests.support.scripted_broker import (
    ScriptedBroker,
    alias_maximum,
    connack,
    puback,
    receive_maximum,
)
from tests.support.waiting import until

FLEET, EDGE, DEVICE = "home", "edge-1", "device-1"
DRAFT = build(Topic.DRAFT, fleet=FLEET, device=DEVICE, edge=EDGE)
DRAFTS = wildcard(Topic.DRAFT, fleet=FLEET, edge=EDGE)
VERDICT = build(Topic.VERDICT, fleet=FLEET, device=DEVICE)
AFTER = build(Topic.SESSION, fleet=FLEET, device=DEVICE)


def make(port: int, name: str = DEVICE, *, clock: Callable[[], float] = time.monotonic, **settings: Any) -> PahoLink:
    values = {"min_backoff_s": 0.02, "max_backoff_s": 0.1, **settings}
    return PahoLink(LinkSettings(client_id=name, username=name, port=port, **values), rng=random.Random(1), clock=clock)


@pytest.fixture
def links() -> Iterator[list[Link]]:
    made: list[Link] = []
    yield made
    for link in made:
        link.stop()


@contextmanager
def scripted(
    answer: bytes = connack(),
    *,
    reading: threading.Event | None = None,
    **settings: Any,
) -> Iterator[tuple[ScriptedBroker, PahoLink]]:
    with ScriptedBroker(answer, reading=reading) as broker:
        link = make(broker.port, **settings)
        try:
            link.start(timeout_s=START_S)
            yield broker, link
        finally:
            link.stop()


@pytest.mark.broker
def test_unanswered_aliased_messages_are_resent_in_order(own_mosquitto: "MosquittoProcess", links: list[Link]) -> None:
    # The trap: a client library that repeats them as they were sends an alias that the new connection does not
    # know, which is a protocol error, and is thrown out for it for ever.
    inbox = Inbox()
    edge = make(own_mosquitto.port, EDGE)
    edge.subscribe(DRAFTS, inbox)
    edge.start(timeout_s=START_S)
    links.append(edge)
    with Relay(own_mosquitto.port) as relay:
        device = make(relay.port)
        device.start(timeout_s=START_S)
        device.publish(DRAFT, b"0", alias=True, expiry_s=30)
        until(lambda: inbox.payloads == [b"0"])
        relay.swallow()
        for payload in (b"1", b"2", b"3"):
            device.publish(DRAFT, payload, alias=True, expiry_s=30)
        until(lambda: device.counters.sent == 4)
        relay.cut()
        until(lambda: len(inbox) == 4)
        device.publish(DRAFT, b"4", alias=True, expiry_s=30)
        until(lambda: len(inbox) == 5)
        assert inbox.payloads == [b"0", b"1", b"2", b"3", b"4"]
        assert {message.topic for message in inbox} == {DRAFT}
        assert device.counters.connects == 2
        device.stop()


def lose_all(relay: Relay) -> None:
    """Drop all traffic in both directions without closing a connection."""
    relay.swallow()
    relay.hold()


@pytest.mark.broker
@pytest.mark.parametrize("publishing", [False, True])
def test_a_vanished_peer_is_given_up(own_mosquitto: "MosquittoProcess", links: list[Link], publishing: bool) -> None:
    # The library has a clock of its own: it would notice after two minutes.
    clock, changes = Clock(), list[bool]()
    with Relay(own_mosquitto.port) as relay:
        edge = PahoLink(
            LinkSettings(
                client_id=EDGE, username=EDGE, port=relay.port, keepalive_s=60, answer_s=1e9, min_backoff_s=0.02
            ),
            rng=random.Random(1),
            clock=clock,
        )
        links.append(edge)
        edge.on_connection(changes.append)
        edge.start(timeout_s=START_S)
        lose_all(relay)
        if publishing:
            edge.publish(VERDICT, b"not answered")

        def noticed() -> bool:
            clock.advance(30.0)
            return not edge.connected

        until(noticed)
        relay.cut()
        relay.release()
        until(lambda: changes == [True, False, True])
        edge.stop()


@pytest.mark.broker
def test_a_quiet_connection_is_asked_and_kept(
    own_mosquitto: "MosquittoProcess", monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, noted = Clock(), [0]
    asks = connection.SilenceWatch.asks

    def note(silence: connection.SilenceWatch, received: int) -> bool:
        asked = asks(silence, received)
        noted.append(received)
        return asked

    monkeypatch.setattr(connection.SilenceWatch, "asks", note)
    with Relay(own_mosquitto.port) as relay:
        edge = PahoLink(LinkSettings(client_id=EDGE, username=EDGE, port=relay.port, keepalive_s=60), clock=clock)
        edge.start(timeout_s=START_S)
        for _ in range(3):
            # The relay counts an answer before the link reads it, and the silence begins when it is read.
            until(lambda: noted[-1] == relay.down)
            came = relay.down
            clock.advance(1.1 * 60)
            until(lambda came=came: relay.down == came + 2)  # type: ignore[misc]
        assert edge.counters.connects == 1
        edge.stop()


@pytest.mark.broker
@pytest.mark.parametrize("error", [RuntimeError("a bug in the library"), SystemExit(1)])
def test_a_network_loop_that_fails_is_begun_anew(
    own_mosquitto: "MosquittoProcess",
    links: list[Link],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    inbox = Inbox()
    link = make(own_mosquitto.port, EDGE)
    links.append(link)
    link.subscribe(DRAFTS, inbox)
    changes = list[bool]()
    link.on_connection(changes.append)
    link.start(timeout_s=START_S)
    healthy, failed = Client.loop_misc, threading.Event()

    def fail_once(client: Client) -> object:
        if not failed.is_set():
            failed.set()
            raise error
        return healthy(client)

    monkeypatch.setattr(Client, "loop_misc", fail_once)
    # The restart is counted before the loss is noticed: only the second connect has the subscription in force again.
    until(lambda: changes == [True, False, True])
    assert link.counters.restarts == 1
    device = make(own_mosquitto.port)
    links.append(device)
    device.start(timeout_s=START_S)
    device.publish(DRAFT, b"still here")
    until(lambda: inbox.payloads == [b"still here"])


@pytest.mark.broker
def test_many_threads_may_publish(own_mosquitto: "MosquittoProcess", links: list[Link]) -> None:
    inbox = Inbox()
    edge, device = make(own_mosquitto.port, EDGE), make(own_mosquitto.port, queue_messages=10_000)
    links += [edge, device]
    edge.subscribe(wildcard(Topic.DRAFT, fleet=FLEET), inbox)
    edge.start(timeout_s=START_S)
    device.start(timeout_s=START_S)

    def publish(thread: int) -> None:
        for number in range(100):
            device.publish(DRAFT, b"%d %d" % (thread, number), alias=True)

    threads = [threading.Thread(target=publish, args=(thread,)) for thread in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: len(inbox) == 600)
    for number in range(6):
        mine = [payload for payload in inbox.payloads if payload.startswith(b"%d " % number)]
        assert mine == [b"%d %d" % (number, index) for index in range(100)]


def test_the_brokers_receive_maximum_is_kept() -> None:
    with scripted(connack(properties=receive_maximum(2))) as (broker, link):
        outcomes: list[PublishOutcome] = []
        for number in range(4):
            link.publish("a", b"%d" % number, on_outcome=outcomes.append)
        until(lambda: len(broker.publishes()) == 2)
        first, *_ = broker.identifiers()
        broker.send(puback(first, 0x10))
        until(lambda: len(broker.publishes()) == 3)
        assert outcomes == [PublishOutcome("a", 0x10)]
        assert [packet.body[-1:] for packet in broker.publishes()] == [b"0", b"1", b"2"]
        for number in range(1, 4):
            until(lambda number=number: len(broker.identifiers()) > number)  # type: ignore[misc]
            broker.send(puback(broker.identifiers()[number]))
        until(lambda: len(outcomes) == 4)


def test_what_does_not_fit_into_one_write_is_sent_as_soon_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paho_link, "POLL_S", 60.0)
    monkeypatch.setattr(connection, "MAX_POLL_S", 60.0)
    with scripted(queue_messages=1000, queue_bytes=1 << 27) as (broker, link):
        for _ in range(200):
            link.publish("a", bytes(16_000), qos=0)
        until(lambda: len(broker.publishes()) == 200)


def test_a_screen_holds_from_the_next_message_on() -> None:
    with scripted() as (broker, link):
        received: list[bytes] = []

        def handle(message: Message) -> None:
            received.append(message.payload)
            link.screen(lambda *_: False)

        link.subscribe("a", handle, qos=0)
        broker.send(publish_packet("a", b"1") + publish_packet("a", b"2"))
        until(lambda: len(received) + link.counters.screened == 2)
        assert received == [b"1"]


def test_what_is_to_be_sent_does_not_wait_for_the_end_of_a_flood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paho_link, "POLL_S", 60.0)
    monkeypatch.setattr(connection, "MAX_POLL_S", 60.0)
    with scripted() as (broker, link):
        sent: list[int] = []  # when each message of the flood is refused

        def refuse(_topic: bytes, _packet_bytes: int, _retained: bool) -> bool:
            if not sent:
                link.publish("answer", b"", qos=0)
            sent.append(link.counters.sent)
            return False

        link.screen(refuse)
        for number in range(1, 20):
            broker.send(publish_packet("flood", b"") * 10)
            until(lambda number=number: len(sent) == 10 * number)  # type: ignore[misc]
        assert sent == [0] * 10 + [1] * 180


class CountingClock(Clock):
    reads = 0

    def __call__(self) -> float:
        self.reads += 1
        return super().__call__()

    def pass_by(self, seconds: float) -> None:
        """Advance, and return once the link has looked at its connection a few times before and after."""
        self._until_read()
        self.advance(seconds)
        self._until_read()

    def _until_read(self) -> None:
        wanted = self.reads + 20
        until(lambda: self.reads >= wanted)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> CountingClock:
    monkeypatch.setattr(paho_link, "POLL_S", 0.01)
    monkeypatch.setattr(connection, "MAX_POLL_S", 0.01)
    return CountingClock()


def test_a_broker_that_answers_nothing_any_more_is_connected_to_anew(
    clock: CountingClock, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"keepalive_s": 0, "answer_s": 3600.0}
    with scripted(connack(properties=receive_maximum(2)), clock=clock, **settings) as (broker, link):
        outcomes: list[PublishOutcome] = []
        for number in range(3):
            link.publish("a", b"%d" % number, on_outcome=outcomes.append)
        until(lambda: len(broker.publishes()) == 2)
        clock.pass_by(7200.0)
        until(lambda: len(broker.publishes()) == 4)
        assert [packet.body[-1:] for packet in broker.publishes()] == [b"0", b"1", b"0", b"1"]
        assert link.counters.stalls == 1
        assert "answered" in caplog.text
        for number in range(2, 5):
            until(lambda number=number: len(broker.identifiers()) > number)  # type: ignore[misc]
            broker.send(puback(broker.identifiers()[number]))
        until(lambda: len(outcomes) == 3)


def test_a_message_is_not_late_while_it_is_still_on_its_way(clock: CountingClock) -> None:
    """A slow line is no silent broker: what has not arrived there cannot be answered."""
    reading = threading.Event()
    reading.set()
    large = {"packet_bytes": 1 << 26, "queue_bytes": 1 << 26}
    with scripted(reading=reading, clock=clock, keepalive_s=0, answer_s=60.0, **large) as (_, link):
        reading.clear()
        link.publish("a", b"one to wait behind")  # the broker looks whether it may read before each packet
        link.publish("a", bytes(1 << 25))  # more than the buffers on the way hold
        until(lambda: link.counters.sent == 2)
        clock.pass_by(600.0)
        assert (link.counters.connects, link.counters.stalls) == (1, 0)
        reading.set()


def test_a_broker_is_not_silent_while_a_large_message_of_it_is_on_its_way(clock: CountingClock) -> None:
    """Its answers are behind that; once the message is here and they are not, they are late all the same."""
    message = publish_packet("a", bytes(60_000), qos=0)
    with scripted(clock=clock, keepalive_s=0, answer_s=60.0) as (broker, link):
        link.publish("a", b"unanswered")
        until(lambda: len(broker.publishes()) == 1)
        for begin in range(0, len(message), 12_000):
            broker.send(message[begin : begin + 12_000])
            within = 0 < begin < len(message) - 12_000
            clock.pass_by(600.0 if within else 0.0)
            assert (link.counters.connects, link.counters.stalls) == (1, 0)
        clock.advance(600.0)
        until(lambda: link.counters.stalls == 1)


class CarelessMosquitto(MosquittoProcess):
    """A mosquitto without our limits: messages at QoS 0 fill the queue that acknowledgements need."""

    def _prepare(self, directory: Path) -> list[str]:
        command = super()._prepare(directory)
        conf = Path(command[-1])
        lines = conf.read_text().splitlines()
        kept = [line for line in lines if not line.startswith(("upgrade_outgoing_qos ", "max_queued_messages "))]
        assert len(kept) == len(lines) - 2
        conf.write_text("\n".join([*kept, "max_queued_messages 50", ""]))
        return command


@pytest.mark.broker
def test_answers_that_a_flooded_broker_drops_do_not_stop_the_link(links: list[Link]) -> None:
    """mosquitto drops whatever does not fit into a client's queue, the answers to its own publishes as well."""
    require_mosquitto()
    outcomes: list[PublishOutcome] = []
    with CarelessMosquitto(Broker()) as broker, Relay(broker.port) as relay:
        flooder = make(broker.port, queue_messages=10_000, queue_bytes=1 << 27)
        edge = make(relay.port, EDGE, queue_messages=20, answer_s=0.5)
        links += [edge, flooder]
        passed_on: list[Message] = []
        edge.subscribe(DRAFTS, lambda _message: None, qos=0)
        flooder.subscribe(VERDICT, passed_on.append, qos=0)
        edge.start(timeout_s=START_S)
        flooder.start(timeout_s=START_S)
        relay.hold()
        for _ in range(2_000):  # more than the buffers on the way hold, so that the queue at the broker fills up
            flooder.publish(DRAFT, bytes(16_000), qos=0)
        until(lambda: broker.await_log(f"dropped for client {EDGE}", patience_s=0.1))
        for number in range(20):
            edge.publish(VERDICT, b"%d" % number, on_outcome=outcomes.append)
        until(lambda: len(passed_on) == 20)  # whose answers did not fit
        relay.release()
        until(lambda: edge.counters.stalls + edge.counters.unanswered > 0)
        until(lambda: _published(edge, outcomes))


def _published(link: Link, outcomes: list[PublishOutcome]) -> bool:
    try:
        link.publish(AFTER, b"", on_outcome=outcomes.append)
    except NotConnected:
        return False
    until(lambda: any(outcome.topic == AFTER for outcome in outcomes))
    return True


@pytest.mark.parametrize(
    ("maximum", "topics"),
    [
        (0, [b"aa", b"bb", b"aa", b"cc", b"bb"]),
        (1, [b"aa", b"bb", b"aa", b"cc", b"bb"]),
        (2, [b"aa", b"bb", b"", b"cc", b"bb"]),
        (3, [b"aa", b"bb", b"", b"cc", b""]),
    ],
)
def test_aliases_stay_within_the_brokers_maximum(maximum: int, topics: list[bytes]) -> None:
    with scripted(connack(properties=alias_maximum(maximum)), flush_s=0.0) as (broker, link):
        for number, topic in enumerate(("aa", "bb", "aa", "cc", "bb"), start=1):
            link.publish(topic, b"", alias=True)  # one at a time: topics that wait take turns
            until(lambda number=number: len(broker.publishes()) == number)  # type: ignore[misc]
        assert [packet.publish()[0] for packet in broker.publishes()] == topics


def test_small_packets_go_out_at_once() -> None:
    client = make_client(LinkSettings(client_id="a"))
    with socket.socket() as sock:
        client._call_socket_open(sock)
        assert bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))


def test_publish_does_not_wait_for_a_network_thread_that_is_held_up() -> None:
    held, release, published = threading.Event(), threading.Event(), threading.Event()
    count = 900  # more wake-ups than a socket's buffer holds, fewer messages than the queue takes

    def hold(_: Message) -> None:
        held.set()
        release.wait(START_S)

    with scripted(flush_s=0.0) as (broker, link):
        link.subscribe("a", hold)
        until(lambda: len(broker.packets) == 2)
        broker.send(b"\x30\x05\x00\x01a\x00x")
        assert held.wait(START_S)

        def publish() -> None:
            for number in range(count):
                link.publish("b", b"%d" % number)
            published.set()

        thread = threading.Thread(target=publish)
        thread.start()
        try:
            assert published.wait(START_S / 2), "publish waits for the network thread"
            assert broker.publishes() == []
        finally:
            release.set()
            thread.join()
        until(lambda: len(broker.publishes()) == count)


def test_garbage_from_the_broker_ends_the_connection_and_not_the_link() -> None:
    with scripted() as (broker, link):
        broker.send(b"\x30\xff\xff\xff\xff\xff\xff")
        until(lambda: link.counters.connects == 2 and link.connected)
        broker.send(b"\x40\x01\x00")  # a PUBACK that is too short
        until(lambda: link.counters.connects == 3 and link.connected)

import io
from collections import Counter, deque
from typing import Any, cast

import pytest
from hypothesis import given, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from fleet_common.mqtt.errors import NotConnected
from fleet_common.mqtt.link import PACKET_TOO_LARGE, CallbackGuard, LinkCounters, PublishOutcome
from fleet_common.mqtt.outbox import BrokerLimits, Outbox, Outgoing, Sender
from fleet_common.mqtt.packets import publish_packet
from fleet_common.mqtt.settings import LinkSettings
from tests.support.memory_fleet import Clock


def make(
    *, max_messages: int = 10, max_bytes: int = 1 << 20, clock: Clock | None = None
) -> tuple[Outbox, LinkCounters]:
    counters = LinkCounters()
    return Outbox(
        max_messages=max_messages, max_bytes=max_bytes, clock=clock or Clock(0.0), counters=counters
    ), counters


def take_all(outbox: Outbox) -> list[bytes]:
    taken = []
    while (message := outbox.next_message(window=1000)) is not None:
        taken.append(message.payload)
    return taken


def test_an_answer_settles_what_was_sent_before_it() -> None:
    """A broker answers in order (MQTT 5, 4.6): an answer that was left out will not come."""
    outbox, counters = make()
    for identifier in (1, 2, 3):
        outbox.put(Outgoing("a", b"%d" % identifier))
        message = outbox.next_message(window=10)
        assert message is not None
        outbox.await_answer(identifier, message)
    answered = outbox.pop_answered(2)
    assert answered.payload == b"2"
    assert (counters.unanswered, outbox.pop_answered(1)) == (1, None)
    outbox.connection_lost()
    assert take_all(outbox) == [b"3"]
    assert outbox._bytes == 0


def test_bytes_are_bounded_too() -> None:
    outbox, _ = make(max_bytes=250)
    outbox.put(Outgoing("a", bytes(100)))
    outbox.put(Outgoing("a", bytes(100)))
    with pytest.raises(NotConnected):
        outbox.put(Outgoing("a", bytes(100)))
    outbox.put(Outgoing("a", b""))


def test_expired_messages_are_not_taken_and_make_room() -> None:
    clock = Clock(0.0)
    outbox, counters = make(max_messages=2, clock=clock)
    outbox.put(Outgoing("a", b"1", deadline=5.0))
    outbox.put(Outgoing("a", b"2", deadline=50.0))
    clock.seconds = 5.0
    outbox.put(Outgoing("a", b"3", deadline=6.0))
    assert counters.expired == 1
    clock.seconds = 6.0
    assert take_all(outbox) == [b"2"]
    assert counters.expired == 2
    outbox.connection_lost()
    assert outbox._bytes == 0


def test_qos_0_does_not_outlive_its_connection() -> None:
    outbox, counters = make()
    outbox.put(Outgoing("a", b"1", qos=0))
    outbox.put(Outgoing("a", b"2"))
    outbox.connection_lost()
    assert take_all(outbox) == [b"2"]
    assert counters.dropped == 1
    assert outbox._bytes == 0


def test_flows_take_turns() -> None:
    outbox, _ = make(max_messages=100)
    for number in range(50):
        outbox.put(Outgoing("backlog", b"%d" % number + bytes(1000)))
    outbox.put(Outgoing("late", b"one"))
    taken = take_all(outbox)
    assert b"one" in taken[:3]
    assert [payload.rstrip(b"\0") for payload in taken if payload != b"one"] == [b"%d" % number for number in range(50)]


def test_priority_goes_first_and_holds_nobody_up_for_good() -> None:
    outbox, _ = make(max_messages=100)
    for number in range(3):
        outbox.put(Outgoing("reply", b"reply %d" % number))
    for number in range(50):
        outbox.put(Outgoing("verdict", b"%d" % number, priority=True))
    taken = take_all(outbox)
    assert taken[:8] == [b"%d" % number for number in range(8)]
    assert taken.index(b"reply 2") < 30
    assert [payload for payload in taken if payload.startswith(b"reply")] == [b"reply 0", b"reply 1", b"reply 2"]
    assert [payload for payload in taken if not payload.startswith(b"reply")] == [
        b"%d" % number for number in range(50)
    ]


def test_where_there_is_no_room_the_flow_that_has_most_makes_it(caplog: pytest.LogCaptureFixture) -> None:
    outbox, counters = make(max_messages=10)
    for number in range(10):
        outbox.put(Outgoing("backlog", b"%d" % number))
    for number in range(5):
        outbox.put(Outgoing(f"device-{number}", b"answer"))
    assert counters.displaced == 5
    assert len(outbox) == 10
    with pytest.raises(NotConnected):
        outbox.put(Outgoing("backlog", b"one more"))
    assert sorted(take_all(outbox)) == sorted([b"answer"] * 5 + [b"%d" % number for number in range(5)])
    assert caplog.text.count("backlog") == 1
    assert outbox._bytes == 0


def test_room_in_bytes_is_made_by_the_flow_that_has_most_of_them() -> None:
    outbox, counters = make(max_messages=100, max_bytes=10_000)
    for _ in range(20):
        outbox.put(Outgoing("many", b""))
    for number in range(4):
        outbox.put(Outgoing("large", b"%d" % number + bytes(2300)))
    outbox.put(Outgoing("honest", bytes(1000)))
    assert counters.displaced == 1
    payloads = [payload[:1] for payload in take_all(outbox) if len(payload) > 1000]
    assert payloads == [b"0", b"1", b"2"]


def test_nothing_is_dropped_for_a_message_that_would_not_fit_anyway() -> None:
    outbox, counters = make(max_messages=10, max_bytes=1000)
    for _ in range(3):
        outbox.put(Outgoing("a", b""))
    with pytest.raises(NotConnected):
        outbox.put(Outgoing("b", bytes(2000), retain=True))
    assert (counters.displaced, len(outbox)) == (0, 3)


def test_a_full_queue_is_not_searched_for_expired_messages_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.0)
    outbox, counters = make(max_messages=2, clock=clock)
    searches: list[float] = []
    drop = Outbox._drop
    monkeypatch.setattr(
        Outbox, "_drop", lambda self, unwanted: (searches.append(clock.seconds), drop(self, unwanted))[1]
    )
    outbox.put(Outgoing("a", b"1", deadline=9.0))
    outbox.put(Outgoing("a", b"2", deadline=5.0))
    for _ in range(100):
        with pytest.raises(NotConnected):
            outbox.put(Outgoing("a", b"3"))
    assert len(searches) == 1
    clock.seconds = 5.0
    outbox.put(Outgoing("a", b"3"))
    assert counters.expired == 1


class OutboxMachine(RuleBasedStateMachine):
    """Nothing is lost except to make room, every flow keeps its order, and the largest flow makes room.

    A flow has the first letter of its topics.
    """

    BOUND = 8

    def __init__(self) -> None:
        super().__init__()
        self.outbox, self.counters = make(max_messages=self.BOUND)
        self.held: dict[tuple[str, bool], list[bytes]] = {}  # not answered, oldest first
        self.under_way = deque[tuple[int, Outgoing]]()
        self.serial = self.displaced = 0

    def lane(self, message: Outgoing) -> list[bytes]:
        return self.held.setdefault((message.topic[0], message.priority), [])

    def waiting(self) -> list[Outgoing]:
        return [*self.outbox._urgent, *self.outbox._others]

    @rule(topic=st.sampled_from(["a/1/2/3/4", "a/1/2/3/5", "b", "c"]), retain=st.booleans(), priority=st.booleans())
    def put(self, topic: str, *, retain: bool, priority: bool) -> None:
        self.serial += 1
        message = Outgoing(topic, b"%d" % self.serial, retain=retain, priority=priority)
        before = self.waiting()
        droppable = Counter((each.topic[0], each.priority) for each in before if not each.retain)
        most = max(droppable.values(), default=0)
        full = len(self.outbox) == self.BOUND
        try:
            self.outbox.put(message)
        except NotConnected:
            assert full
            assert most <= droppable[topic[0], priority]
            return
        self.lane(message).append(message.payload)
        gone = [each for each in before if each not in self.waiting()]
        assert len(gone) == full
        for each in gone:
            assert not each.retain
            assert droppable[each.topic[0], each.priority] == most
            self.lane(each).remove(each.payload)
            self.displaced += 1

    @rule()
    def take(self) -> None:
        message = self.outbox.next_message(window=4)
        if message is not None:
            self.serial += 1
            self.outbox.await_answer(self.serial, message)
            self.under_way.append((self.serial, message))
        else:
            assert len(self.under_way) == 4 or not self.waiting()

    @precondition(lambda self: self.under_way)
    @rule()
    def answer(self) -> None:
        identifier, message = self.under_way.popleft()
        assert self.outbox.pop_answered(identifier) is message
        assert self.lane(message).pop(0) == message.payload

    @rule()
    def lose_the_connection(self) -> None:
        self.outbox.connection_lost()
        self.under_way.clear()

    @invariant()
    def everything_is_there(self) -> None:
        assert len(self.outbox) == sum(map(len, self.held.values())) <= self.BOUND
        assert self.counters.displaced == self.displaced

    def teardown(self) -> None:
        self.outbox.connection_lost()
        while (message := self.outbox.next_message(window=100)) is not None:
            assert self.lane(message).pop(0) == message.payload
        assert not any(self.held.values())
        assert self.outbox._bytes == self.outbox._droppable_bytes == self.outbox._droppable == 0
        assert not self.outbox._holdings


TestOutboxMachine = OutboxMachine.TestCase


def test_a_queued_message_that_a_new_broker_finds_too_large_is_dropped_told_and_counted() -> None:
    guard, outcomes, sent = CallbackGuard(), list[PublishOutcome](), list[bytes]()
    sender = Sender(LinkSettings(client_id="a"), guard=guard, clock=Clock(0.0))
    sender.outbox.put(Outgoing("a", bytes(500), on_outcome=outcomes.append))
    sender.outbox.put(Outgoing("b", b"small", on_outcome=outcomes.append))

    def send(message: Outgoing) -> int:
        sent.append(message.payload)
        return len(sent)

    sender.drain(send, BrokerLimits(max_packet_bytes=100))
    assert sent == [b"small"]
    assert outcomes == [PublishOutcome("a", PACKET_TOO_LARGE)]
    assert (guard.counters.oversized, guard.counters.sent) == (1, 1)
    assert not sender.idle
    sender.on_answer(1, 0)
    assert outcomes[1:] == [PublishOutcome("b", 0)]
    assert sender.idle


class _Unsent(Client):
    packet = b""

    def __init__(self) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self._sock = cast("Any", io.BytesIO())  # any sign of a connection will do

    def _packet_queue(self, _command: Any, packet: Any, *_: Any) -> Any:
        self.packet = bytes(packet)


@given(
    topic=st.text(st.characters(exclude_characters="+#\0", exclude_categories=["Cs"]), min_size=1, max_size=200),
    payload=st.integers(0, 20_000).map(bytes),
    identifier=st.integers(0, 65_535),
    retain=st.booleans(),
    expiry_s=st.none() | st.integers(1, (1 << 32) - 1),
    content_type=st.none() | st.just("application/cbor; v=1"),
    alias=st.none() | st.integers(1, 65_535),
    known=st.booleans(),
)
def test_a_packet_is_what_the_library_would_write(
    topic: str,
    payload: bytes,
    identifier: int,
    retain: bool,
    expiry_s: int | None,
    content_type: str | None,
    alias: int | None,
    known: bool,
) -> None:
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if expiry_s is not None:
        properties.MessageExpiryInterval = expiry_s
    if content_type is not None:
        properties.ContentType = content_type
    known = known and alias is not None
    if alias is not None:
        properties.TopicAlias = alias
    library = _Unsent()
    library._send_publish(
        identifier, b"" if known else topic.encode(), payload, min(identifier, 1), retain, properties=properties
    )
    packet = publish_packet(
        "" if known else topic,
        payload,
        identifier=identifier,
        retain=retain,
        expiry_s=expiry_s,
        content_type=content_type,
        alias=alias,
    )
    assert len(packet) == len(library.packet)
    # In which order properties stand is the writer's choice.
    assert sorted(packet) == sorted(library.packet)
    assert packet.endswith(payload)

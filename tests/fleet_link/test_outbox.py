from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_link.counters import Guard, LinkCounters
from fleet_link.errors import NotConnected
from fleet_link.link import PACKET_TOO_LARGE, Outcome
from fleet_link.mqtt_client import Announced
from fleet_link.outbox import Outbox, Outgoing, Sender
from fleet_link.settings import LinkSettings


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(
    *, max_messages: int = 10, max_bytes: int = 1 << 20, clock: Clock | None = None
) -> tuple[Outbox, LinkCounters]:
    counters = LinkCounters()
    return Outbox(max_messages=max_messages, max_bytes=max_bytes, clock=clock or Clock(), counters=counters), counters


def take_all(outbox: Outbox) -> list[bytes]:
    taken = []
    while (message := outbox.take(window=1000)) is not None:
        taken.append(message.payload)
    return taken


def test_unanswered_messages_count_towards_the_bound_and_return_to_the_head_in_order() -> None:
    outbox, _ = make(max_messages=3)
    for payload in (b"1", b"2", b"3"):
        outbox.put(Outgoing("a", payload))
    for identifier in (7, 8):
        message = outbox.take(window=10)
        assert message is not None
        outbox.await_answer(identifier, message)
    with pytest.raises(NotConnected):
        outbox.put(Outgoing("a", b"4"))
    outbox.connection_lost()
    assert take_all(outbox) == [b"1", b"2", b"3"]
    assert len(outbox) == 0


def test_the_window_holds_back_qos_1() -> None:
    outbox, _ = make()
    outbox.put(Outgoing("a", b"1"))
    outbox.put(Outgoing("a", b"2"))
    first = outbox.take(window=1)
    assert first is not None
    outbox.await_answer(1, first)
    assert outbox.take(window=1) is None
    assert outbox.pop_answered(1) is first
    assert outbox.pop_answered(1) is None
    second = outbox.take(window=1)
    assert second is not None
    assert second.payload == b"2"


def test_an_answer_settles_what_was_sent_before_it() -> None:
    """A broker answers in order (MQTT 5, 4.6): an answer that was left out will not come."""
    outbox, counters = make()
    for identifier in (1, 2, 3):
        outbox.put(Outgoing("a", b"%d" % identifier))
        message = outbox.take(window=10)
        assert message is not None
        outbox.await_answer(identifier, message)
    answered = outbox.pop_answered(2)
    assert answered is not None
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
    clock = Clock()
    outbox, counters = make(max_messages=2, clock=clock)
    outbox.put(Outgoing("a", b"1", deadline=5.0))
    outbox.put(Outgoing("a", b"2", deadline=50.0))
    clock.now = 5.0
    outbox.put(Outgoing("a", b"3", deadline=6.0))
    assert counters.expired == 1
    clock.now = 6.0
    assert take_all(outbox) == [b"2"]
    assert counters.expired == 2


def test_expired_messages_give_their_bytes_back() -> None:
    clock = Clock()
    outbox, _ = make(max_bytes=250, clock=clock)
    outbox.put(Outgoing("a", bytes(100), deadline=5.0))
    outbox.put(Outgoing("a", bytes(100)))
    clock.now = 5.0
    outbox.put(Outgoing("a", bytes(100)))
    with pytest.raises(NotConnected):
        outbox.put(Outgoing("a", bytes(100)))
    take_all(outbox)
    outbox.put(Outgoing("a", bytes(200)))


def test_the_expiry_sent_is_what_is_left() -> None:
    message = Outgoing("a", b"", deadline=30.0)
    assert message.expiry_s(0.0) == 30
    assert message.expiry_s(29.5) == 1
    assert Outgoing("a", b"").expiry_s(0.0) is None


def test_qos_0_does_not_outlive_its_connection() -> None:
    outbox, counters = make()
    outbox.put(Outgoing("a", b"1", qos=0))
    outbox.put(Outgoing("a", b"2"))
    outbox.connection_lost()
    assert take_all(outbox) == [b"2"]
    assert counters.dropped == 1
    assert outbox._bytes == 0


@given(st.lists(st.sampled_from(["put", "take", "answer", "lose"]), max_size=60))
def test_nothing_is_lost_and_the_order_is_kept_whatever_happens(events: list[str]) -> None:
    outbox, _ = make(max_messages=8)
    expected: deque[bytes] = deque()  # not yet answered, in order
    answered, serial, waiting_answers = [], 0, deque[int]()
    for event in events:
        if event == "put":
            serial += 1
            try:
                outbox.put(Outgoing("a", b"%d" % serial))
            except NotConnected:
                assert len(expected) == 8
            else:
                expected.append(b"%d" % serial)
        elif event == "take":
            message = outbox.take(window=4)
            if message is not None:
                serial += 1
                outbox.await_answer(serial, message)
                waiting_answers.append(serial)
        elif event == "answer" and waiting_answers:
            done = outbox.pop_answered(waiting_answers.popleft())
            assert done is not None
            answered.append(done.payload)
            assert expected.popleft() == done.payload
        elif event == "lose":
            outbox.connection_lost()
            waiting_answers.clear()
        assert len(outbox) == len(expected)
    outbox.connection_lost()
    assert take_all(outbox) == list(expected)
    assert outbox._bytes == 0


def test_a_queued_message_that_a_new_broker_finds_too_large_is_dropped_told_and_counted() -> None:
    guard, outcomes, sent = Guard(), list[Outcome](), list[bytes]()
    sender = Sender(LinkSettings(client_id="a"), guard=guard, clock=Clock())
    sender.put(Outgoing("a", bytes(500), on_outcome=outcomes.append))
    sender.put(Outgoing("b", b"small", on_outcome=outcomes.append))

    def send(message: Outgoing) -> int:
        sent.append(message.payload)
        return len(sent)

    sender.drain(send, Announced(max_packet_bytes=100))
    assert sent == [b"small"]
    assert outcomes == [Outcome("a", PACKET_TOO_LARGE)]
    assert (guard.counters.oversized, guard.counters.sent) == (1, 1)
    assert not sender.idle
    sender.on_answer(1, 0)
    assert outcomes[1:] == [Outcome("b", 0)]
    assert sender.idle

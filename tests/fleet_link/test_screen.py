import itertools
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_link.connection.screen import BrokenStream, Screen
from fleet_link.counters import Guard
from tests.support.mqtt_packets import Publish, acknowledgement, packet

LIMIT = 1 << 20
TOPICS = [b"", b"a", b"dssd/v1/home/device-1/up/draft/edge-1", "τόπος".encode(), b"t" * 200]
OTHERS = [packet(0xD0, b""), packet(0x40, b"\0\1\0\0"), packet(0x90, b"\0\1\0\1"), packet(0xE0, b"\x8e\0")]

publishes = st.builds(
    Publish,
    topic=st.sampled_from(TOPICS),
    payload=st.integers(0, 300).map(bytes),
    identifier=st.none() | st.integers(1, 65_535),
    retain=st.booleans(),
)


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[begin:end] for begin, end in itertools.pairwise(at)]


@given(
    packets=st.lists(publishes | st.sampled_from(OTHERS), max_size=12),
    refused=st.sets(st.sampled_from(TOPICS)),
    cuts=st.lists(st.integers(0, 10_000), max_size=20),
    data=st.data(),
)
def test_however_the_stream_is_cut_the_reader_gets_what_is_accepted_and_the_broker_its_acknowledgements_in_order(
    packets: list[Publish | bytes], refused: set[bytes], cuts: list[int], data: st.DataObject
) -> None:
    asked: list[tuple[bytes, int, bool]] = []

    def accepts(topic: bytes, packet_bytes: int, retained: bool) -> bool:
        asked.append((topic, packet_bytes, retained))
        return topic not in refused

    guard = Guard()
    screen = Screen(max_packet_bytes=LIMIT, accepts=accepts, guard=guard)
    sent = [item for item in packets if isinstance(item, Publish)]
    accepted = [item for item in packets if not (isinstance(item, Publish) and item.topic in refused)]
    raw = [item.raw if isinstance(item, Publish) else item for item in accepted]
    expected = b"".join(raw)
    # The library answers a message some time after it has come whole.
    ends = [len(b"".join(raw[: number + 1])) for number in range(len(raw))]
    unanswered = deque(
        (end, acknowledgement(item.identifier))
        for end, item in zip(ends, accepted, strict=True)
        if isinstance(item, Publish) and item.identifier is not None
    )
    owed = b"".join(acknowledgement(item.identifier) for item in sent if item.identifier is not None)
    got = b""
    for piece in pieces_of(b"".join(item.raw if isinstance(item, Publish) else item for item in packets), cuts):
        got += screen.feed(piece)
        assert expected.startswith(got)
        for _ in range(data.draw(st.integers(0, 3))):
            if unanswered and unanswered[0][0] <= len(got):
                screen.answered(unanswered.popleft()[1])
        assert owed.startswith(screen.owed)
    assert got == expected
    for _, puback in unanswered:
        screen.answered(puback)
    assert screen.owed == owed
    assert asked == [(item.topic, len(item.raw), item.retain) for item in sent]
    assert guard.counters.screened == len(packets) - len(accepted)
    assert screen.passed == len(accepted)


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_bytes_that_are_no_mqtt_pass_unchanged_or_end_the_connection(pieces: list[bytes]) -> None:
    screen = Screen(max_packet_bytes=100, accepts=lambda *_: True)
    got = b""
    try:
        for piece in pieces:
            got += screen.feed(piece)
    except BrokenStream:
        pass
    assert b"".join(pieces).startswith(got)


def test_a_refused_packet_is_not_kept_while_it_comes() -> None:
    screen = Screen(max_packet_bytes=LIMIT, accepts=lambda *_: False)
    raw = Publish(b"a", bytes(LIMIT - 100), identifier=7).raw
    assert screen.feed(raw[:10]) == b""
    assert screen.owed == acknowledgement(7)
    for at in range(10, len(raw), 4096):
        assert screen.feed(raw[at : at + 4096]) == b""
        assert screen._head == b""
    assert screen.feed(OTHERS[0]) == OTHERS[0]


def test_an_accepted_packet_is_handed_on_while_it_comes() -> None:
    screen = Screen(max_packet_bytes=LIMIT, accepts=lambda *_: True)
    raw = Publish(b"a", bytes(1000)).raw
    assert [screen.feed(raw[at : at + 100]) for at in range(0, len(raw), 100)] == pieces_of(
        raw, list(range(0, len(raw), 100))
    )


@pytest.mark.parametrize("qos", [2, 3])
def test_a_message_of_another_qos_is_left_to_the_library(qos: int) -> None:
    screen = Screen(max_packet_bytes=LIMIT, accepts=lambda *_: False)
    raw = packet(0x30 | qos << 1, b"\0\1a\0\7\0")
    assert screen.feed(raw) == raw
    assert not screen.owed


@pytest.mark.parametrize("kind", [0x30, 0x32, 0xD0])
def test_a_packet_above_our_limit_ends_the_connection_before_it_has_come(kind: int) -> None:
    for refused in (True, False):
        screen = Screen(max_packet_bytes=1000, accepts=lambda *_, refused=refused: not refused)  # type: ignore[misc]
        with pytest.raises(BrokenStream, match="1001 bytes"):
            screen.feed(packet(kind, b"\0\1a\0\1\0" + bytes(992))[:9])
        assert len(screen.feed(packet(kind, b"\0\1a\0\1\0" + bytes(991)))) == 1000 * (not refused or kind == 0xD0)


@pytest.mark.parametrize("piece", [b"\x30\xff\xff\xff\xff", b"\x30\x80\x80\x80\x80\x01", b"\xd0\xff\xff\xff\xff\xff"])
def test_a_length_of_more_than_four_bytes_ends_the_connection(piece: bytes) -> None:
    with pytest.raises(BrokenStream, match="length"):
        Screen(max_packet_bytes=LIMIT).feed(piece)


def test_a_broker_that_waits_for_no_acknowledgement_is_left() -> None:
    screen = Screen(max_packet_bytes=LIMIT, accepts=lambda *_: False)
    burst = Publish(b"a", identifier=1).raw * 65_535
    screen.feed(burst)
    with pytest.raises(BrokenStream, match="without waiting"):
        screen.feed(Publish(b"a", identifier=1).raw)


def test_a_screen_that_fails_lets_the_message_pass_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: object) -> bool:
        raise SystemExit(1)

    guard = Guard()
    raw = Publish(b"a", identifier=3).raw
    for _ in range(3):
        assert Screen(max_packet_bytes=LIMIT, accepts=fails, guard=guard).feed(raw) == raw
    assert guard.counters.handler_errors == 3
    assert caplog.text.count("screen fails") == 1

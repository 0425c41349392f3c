import itertools
import socket
import ssl
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, strategies as st
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from fleet_common.mqtt.connection import make_client
from fleet_common.mqtt.link import CallbackGuard, Message
from fleet_common.mqtt.screen import BrokenStream, Screen, ScreenedSocket
from fleet_common.mqtt.settings import LinkSettings
from tests.support.mqtt_packets import Publish, packet, puback_packet
from tests.support.waiting import PATIENCE_S

LIMIT = 1 << 20
TOPICS = [b"", b"a", b"dssd/v1/home/device-1/up/draft/edge-1", "τόπος".encode(), b"t" * 200]
PUBACK = packet(0x40, b"\0\1\0\0")
OTHERS = [packet(0xD0, b""), PUBACK, packet(0x90, b"\0\1\0\1"), packet(0xE0, b"\x8e\0")]

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
    assert screen.owed == puback_packet(7)
    for at in range(10, len(raw), 4096):
        assert screen.feed(raw[at : at + 4096]) == b""
        assert screen._head == b""
    assert screen.feed(OTHERS[0]) == OTHERS[0]


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
        with pytest.raises(BrokenStream, match="1001"):
            screen.feed(packet(kind, b"\0\1a\0\1\0" + bytes(992))[:9])
        assert len(screen.feed(packet(kind, b"\0\1a\0\1\0" + bytes(991)))) == 1000 * (not refused or kind == 0xD0)


@pytest.mark.parametrize("piece", [b"\x30\xff\xff\xff\xff", b"\x30\x80\x80\x80\x80\x01", b"\xd0\xff\xff\xff\xff\xff"])
def test_a_length_of_more_than_four_bytes_ends_the_connection(piece: bytes) -> None:
    with pytest.raises(BrokenStream):
        Screen(max_packet_bytes=LIMIT).feed(piece)


def test_a_broker_that_waits_for_no_acknowledgement_is_left() -> None:
    screen = Screen(max_packet_bytes=LIMIT, accepts=lambda *_: False)
    burst = Publish(b"a", identifier=1).raw * 65_535
    screen.feed(burst)
    with pytest.raises(BrokenStream):
        screen.feed(Publish(b"a", identifier=1).raw)


@given(
    packets=st.lists(publishes | st.sampled_from(OTHERS), max_size=12),
    refused=st.sets(st.sampled_from(TOPICS)),
    cuts=st.lists(st.integers(0, 10_000), max_size=20),
)
def test_any_cut_keeps_order_and_answers(packets: list[Publish | bytes], refused: set[bytes], cuts: list[int]) -> None:
    came: list[Publish | bytes] = []  # what is told, and what the library has read, in the order in which that is seen
    answers: list[tuple[int, int]] = []
    by_content = {(item.topic, item.payload, item.retain): item for item in packets if isinstance(item, Publish)}

    def told(message: Message) -> None:
        came.append(by_content[message.topic.encode(), message.payload, message.retained])

    screen = Screen(
        max_packet_bytes=LIMIT,
        accepts=lambda topic, *_: topic not in refused,
        on_message=told,
        on_answer=lambda *answer: answers.append(answer),
    )
    raws = {item.raw: item for item in packets if isinstance(item, Publish)}
    unread = b""
    for piece in pieces_of(b"".join(item.raw if isinstance(item, Publish) else item for item in packets), cuts):
        unread += screen.feed(piece)
        while whole := next((raw for raw in [*raws, *OTHERS] if unread.startswith(raw)), b""):
            unread = unread[len(whole) :]
            item = raws.get(whole, whole)
            came.append(item)
            if isinstance(item, Publish) and item.identifier is not None:
                screen.answered(puback_packet(item.identifier))
    assert not unread
    accepted = [item for item in packets if isinstance(item, Publish) and item.topic not in refused]
    seen = [(item.topic, item.payload, item.retain) for item in came if isinstance(item, Publish)]
    assert seen == [(item.topic, item.payload, item.retain) for item in accepted]
    assert [item for item in came if isinstance(item, bytes)] == [
        item for item in packets if isinstance(item, bytes) and item != PUBACK
    ]
    assert answers == [(1, 0)] * packets.count(PUBACK)
    owed = [item.identifier for item in packets if isinstance(item, Publish) and item.identifier is not None]
    assert screen.owed == b"".join(puback_packet(identifier) for identifier in owed)


def test_a_message_behind_one_that_the_library_reads_waits_for_it() -> None:
    told: list[Message] = []
    screen = Screen(max_packet_bytes=LIMIT, on_message=told.append)
    long, short = Publish(b"a", bytes(1000), identifier=1).raw, Publish(b"a", b"2", identifier=2).raw
    assert screen.feed(long[:500]) == long[:500]
    assert screen.feed(long[500:] + short) == long[500:] + short
    assert not told
    screen.feed(short)
    assert [message.payload for message in told] == [b"2"]


@pytest.mark.parametrize(
    "raw",
    [
        packet(0x30, b"\0\0\0x"),  # an alias for a topic, and we allow none
        packet(0x30, b"\0\2\xff\xfe\0x"),  # no UTF-8
        packet(0x30, b"\0\1a"),  # ends before its properties
        packet(0x30, b"\0\1a\x7f\1"),  # properties that are longer than the packet
        packet(0x34, b"\0\1a\0\7\0x"),  # QoS 2
        packet(0x40, b"\0"),
    ],
)
def test_what_is_not_as_expected_is_left_to_the_library(raw: bytes) -> None:
    screen = Screen(max_packet_bytes=LIMIT, on_message=pytest.fail, on_answer=lambda *_: pytest.fail("told"))
    assert screen.feed(raw) == raw


def test_properties_whose_length_is_none_end_the_connection() -> None:
    with pytest.raises(BrokenStream):
        Screen(max_packet_bytes=LIMIT, on_message=pytest.fail).feed(packet(0x30, b"\0\1a\xff\xff\xff\xff\xff\1"))


def test_properties_of_a_message_are_left_out_and_reasons_of_an_answer_told() -> None:
    told: list[Message] = []
    answers: list[tuple[int, int]] = []
    screen = Screen(max_packet_bytes=LIMIT, on_message=told.append, on_answer=lambda *answer: answers.append(answer))
    assert screen.feed(packet(0x31, b"\0\1a\5\2\0\0\0\x09body") + packet(0x40, b"\1\2\x10\0")) == b""
    assert told == [Message("a", b"body", retained=True)]
    assert answers == [(0x102, 0x10)]


PACKET_LIMIT = 1 << 20
GOOD, BAD = b"good", b"bad"


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, ScreenedSocket]]:
    far, near = socket.socketpair()
    near.settimeout(0)
    far.settimeout(PATIENCE_S)
    sock = ScreenedSocket(near, Screen(max_packet_bytes=PACKET_LIMIT, accepts=lambda topic, *_: topic != BAD))
    yield far, sock
    far.close()
    sock.close()


def test_the_end_is_reported_behind_what_came_before(ends: tuple[socket.socket, ScreenedSocket]) -> None:
    far, sock = ends
    good = Publish(GOOD).raw
    far.sendall(good)
    far.close()
    sock.fill()
    sock.fill()
    assert sock.recv(100) == good
    sock.fill()
    assert sock.ready
    assert sock.recv(100) == b""


def test_a_broken_stream_is_an_error_for_the_reader_and_says_why(ends: tuple[socket.socket, ScreenedSocket]) -> None:
    far, sock = ends
    far.sendall(b"\x30\xff\xff\xff\xff")
    sock.fill()
    with pytest.raises(ConnectionError):
        sock.recv(1)
    assert "length" in sock.ending


def test_acknowledgements_wait_for_the_end_of_a_packet_that_is_half_written() -> None:
    wire = _Narrow(room=5)
    sock = ScreenedSocket(wire, Screen(max_packet_bytes=PACKET_LIMIT, accepts=lambda *_: False))
    outgoing = Publish(b"up", b"payload").raw
    assert sock.send(outgoing) == 5
    wire.incoming = Publish(BAD, identifier=9).raw
    sock.fill()
    wire.room = 100
    sock.flush()
    assert wire.written == outgoing[:5]
    assert sock.wants_write
    assert sock.send(outgoing[5:]) == len(outgoing) - 5
    sock.flush()
    assert wire.written == outgoing + puback_packet(9)
    assert not sock.wants_write


def test_a_half_written_acknowledgement_goes_before_the_next_packet() -> None:
    wire = _Narrow(room=3)
    sock = ScreenedSocket(wire, Screen(max_packet_bytes=PACKET_LIMIT, accepts=lambda *_: False))
    wire.incoming = Publish(BAD, identifier=9).raw
    sock.fill()
    sock.flush()
    outgoing = Publish(b"up").raw
    with pytest.raises(BlockingIOError):
        sock.send(outgoing)
    wire.room = 100
    assert sock.send(outgoing) == len(outgoing)
    assert wire.written == puback_packet(9) + outgoing


def test_a_packet_that_would_block_is_tried_again_before_anything_else_is_written() -> None:
    """TLS may have taken the bytes that it could not write."""
    wire = _Narrow(room=0)
    sock = ScreenedSocket(wire, Screen(max_packet_bytes=PACKET_LIMIT, accepts=lambda *_: False))
    outgoing = Publish(b"up").raw
    with pytest.raises(ssl.SSLWantWriteError):
        sock.send(outgoing)
    wire.incoming = Publish(BAD, identifier=9).raw
    sock.fill()
    wire.room = 100
    sock.flush()
    assert wire.written == b""
    assert sock.send(outgoing) == len(outgoing)
    sock.flush()
    assert wire.written == outgoing + puback_packet(9)


def test_acknowledgements_are_written_before_what_is_sent_next(ends: tuple[socket.socket, ScreenedSocket]) -> None:
    far, sock = ends
    for identifier in (1, 2):
        assert sock.send(puback_packet(identifier)) == 4
    far.settimeout(0)
    with pytest.raises(BlockingIOError):
        far.recv(1)
    outgoing = Publish(b"up").raw
    assert sock.send(outgoing) == len(outgoing)
    assert far.recv(100) == puback_packet(1) + puback_packet(2) + outgoing


class _Narrow:
    def __init__(self, *, room: int) -> None:
        self.room = room
        self.incoming = b""
        self.written = b""

    def recv(self, _size: int) -> bytes:
        data, self.incoming = self.incoming, b""
        if not data:
            raise ssl.SSLWantReadError
        return data

    def send(self, data: bytes) -> int:
        if not self.room:
            raise ssl.SSLWantWriteError
        taken = bytes(data[: self.room])
        self.room -= len(taken)
        self.written += taken
        return len(taken)


class _Recorder:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.used: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.used.add(name)
        return getattr(self._sock, name)


def test_paho_uses_only_the_socket_methods_that_we_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a release of paho that reads, writes or makes its socket in another way we must hear here."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        recorders: list[_Recorder] = []
        original = Client._create_socket

        def recorded(self: Client) -> Any:
            recorders.append(_Recorder(original(self)))  # type: ignore[arg-type]
            return recorders[0]

        monkeypatch.setattr(Client, "_create_socket", recorded)
        plain = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        port = server.getsockname()[1]
        plain.connect("127.0.0.1", port)
        peer, _ = server.accept()
        with peer:
            peer.recv(1000)
            peer.sendall(b"\x20\x03\x00\x00\x00")
            while not plain.is_connected():
                plain.loop_read()
            peer.sendall(Publish(GOOD, identifier=1).raw)
            received: list[bytes] = []
            plain.on_message = lambda _c, _u, message: received.append(message.payload)
            while not received:
                plain.loop_read()
            plain.publish("a", b"x", qos=1)
            plain.loop_misc()
            plain.disconnect()
        recorders[0]._sock.close()
    assert recorders[0].used <= {"recv", "send", "close", "fileno", "setblocking"}
    monkeypatch.undo()
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = make_client(LinkSettings(client_id="a", port=server.getsockname()[1]))
        client.connect("127.0.0.1", server.getsockname()[1])
        sock = client.socket()
        assert isinstance(sock, ScreenedSocket)
        sock.close()


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

    guard = CallbackGuard()
    screen = Screen(max_packet_bytes=LIMIT, accepts=accepts, guard=guard)
    sent = [item for item in packets if isinstance(item, Publish)]
    accepted = [item for item in packets if not (isinstance(item, Publish) and item.topic in refused)]
    raw = [item.raw if isinstance(item, Publish) else item for item in accepted]
    expected = b"".join(raw)
    # The library answers a message some time after it has come whole.
    ends = [len(b"".join(raw[: number + 1])) for number in range(len(raw))]
    unanswered = deque(
        (end, puback_packet(item.identifier))
        for end, item in zip(ends, accepted, strict=True)
        if isinstance(item, Publish) and item.identifier is not None
    )
    owed = b"".join(puback_packet(item.identifier) for item in sent if item.identifier is not None)
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

"""The socket with a screen, against real sockets, and what paho asks of it."""

import socket
import ssl
from collections.abc import Iterator
from typing import Any

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from fleet_common.mqtt.connection.mqtt_client import make_client
from fleet_common.mqtt.connection.screen import Screen
from fleet_common.mqtt.connection.screened_socket import (
    CROWD,
    LONGEST_PAUSE_S,
    MOST_CROWD,
    SHORTEST_PAUSE_S,
    ScreenedSocket,
)
from fleet_common.mqtt.settings import LinkSettings
from tests.support.mqtt_packets import Publish, acknowledgement

LIMIT = 1 << 20
GOOD, BAD = b"good", b"bad"


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, ScreenedSocket]]:
    far, near = socket.socketpair()
    near.settimeout(0)
    far.settimeout(10)
    sock = ScreenedSocket(near, Screen(max_packet_bytes=LIMIT, accepts=lambda topic, *_: topic != BAD))
    yield far, sock
    far.close()
    sock.close()


def read(sock: ScreenedSocket, size: int = 1) -> bytes:
    """Read as paho does, until there is nothing more."""
    got = b""
    while True:
        try:
            piece = sock.recv(size)
        except BlockingIOError:
            return got
        if not piece:
            return got
        got += piece


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_the_reader_gets_what_is_accepted(ends: tuple[socket.socket, ScreenedSocket], size: int) -> None:
    far, sock = ends
    good = Publish(GOOD, b"x" * 300).raw
    with pytest.raises(BlockingIOError):
        sock.recv(1)
    far.sendall(good + Publish(BAD, identifier=1).raw + good)
    sock.fill()
    assert sock.ready
    assert read(sock, size) == good * 2
    assert not sock.ready
    sock.flush()
    assert far.recv(100) == acknowledgement(1)


def test_nothing_is_read_while_the_reader_has_something_left(ends: tuple[socket.socket, ScreenedSocket]) -> None:
    far, sock = ends
    first, second = Publish(GOOD, b"1").raw, Publish(GOOD, b"2").raw
    far.sendall(first)
    sock.fill()
    far.sendall(second)
    sock.fill()
    assert read(sock) == first
    sock.fill()
    assert read(sock) == second


def test_the_end_and_a_broken_connection_are_told_behind_what_came_before(
    ends: tuple[socket.socket, ScreenedSocket],
) -> None:
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
    sock = ScreenedSocket(wire, Screen(max_packet_bytes=LIMIT, accepts=lambda *_: False))
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
    assert wire.written == outgoing + acknowledgement(9)
    assert not sock.wants_write


def test_a_half_written_acknowledgement_goes_before_the_next_packet() -> None:
    wire = _Narrow(room=3)
    sock = ScreenedSocket(wire, Screen(max_packet_bytes=LIMIT, accepts=lambda *_: False))
    wire.incoming = Publish(BAD, identifier=9).raw
    sock.fill()
    sock.flush()
    outgoing = Publish(b"up").raw
    with pytest.raises(BlockingIOError):
        sock.send(outgoing)
    wire.room = 100
    assert sock.send(outgoing) == len(outgoing)
    assert wire.written == acknowledgement(9) + outgoing


def test_a_packet_that_would_block_is_tried_again_before_anything_else_is_written() -> None:
    """TLS may have taken the bytes that it could not write."""
    wire = _Narrow(room=0)
    sock = ScreenedSocket(wire, Screen(max_packet_bytes=LIMIT, accepts=lambda *_: False))
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
    assert wire.written == outgoing + acknowledgement(9)


def test_the_readers_acknowledgements_are_written_together_and_before_what_it_sends_next(
    ends: tuple[socket.socket, ScreenedSocket],
) -> None:
    far, sock = ends
    for identifier in (1, 2):
        assert sock.send(acknowledgement(identifier)) == 4
    far.settimeout(0)
    with pytest.raises(BlockingIOError):
        far.recv(1)
    outgoing = Publish(b"up").raw
    assert sock.send(outgoing) == len(outgoing)
    assert far.recv(100) == acknowledgement(1) + acknowledgement(2) + outgoing


def test_reading_rests_only_while_most_is_dropped_and_little_comes(
    ends: tuple[socket.socket, ScreenedSocket],
) -> None:
    far, sock = ends
    good, bad = Publish(GOOD).raw, Publish(BAD).raw
    assert sock.fill() == 0.0
    far.sendall(bad * 5)
    assert sock.fill() == LONGEST_PAUSE_S
    far.sendall(good + bad * 2)
    assert sock.fill() == 0.0
    read(sock)
    for _ in range(10):
        far.sendall(bad * CROWD)
        pause_s = sock.fill()
    assert pause_s == SHORTEST_PAUSE_S
    for _ in range(10):
        far.sendall(bad)
        pause_s = sock.fill()
    assert pause_s == LONGEST_PAUSE_S


def test_a_broker_that_has_more_under_way_is_read_less_often(ends: tuple[socket.socket, ScreenedSocket]) -> None:
    far, sock = ends

    def flood(size: int) -> float:
        far.sendall(b"".join(Publish(BAD, identifier=number + 1).raw for number in range(size)))
        pause_s = sock.fill()
        sock.flush()
        return pause_s

    assert flood(2 * CROWD) == LONGEST_PAUSE_S, "what is not acknowledged shows how many there may be"
    assert flood(CROWD) == LONGEST_PAUSE_S
    assert flood(2 * CROWD) < LONGEST_PAUSE_S
    for _ in range(20):
        pause_s = flood(10 * CROWD)
    assert pause_s == SHORTEST_PAUSE_S
    for _ in range(20):
        pause_s = flood(1)
    assert pause_s == LONGEST_PAUSE_S
    assert flood(MOST_CROWD) < LONGEST_PAUSE_S, "however many there may be"


def test_few_acknowledgements_are_written_every_other_time_and_many_at_once(
    ends: tuple[socket.socket, ScreenedSocket],
) -> None:
    far, sock = ends
    far.settimeout(0)

    def flood(size: int) -> int:
        far.sendall(Publish(BAD, identifier=7).raw * size)
        sock.fill()
        sock.settle()
        try:
            return len(far.recv(1000)) // len(acknowledgement(7))
        except BlockingIOError:
            return 0

    assert [flood(3), flood(4), flood(5)] == [0, 7, 0]
    assert not sock.wants_write, "nobody has to wait for the socket"
    sock.flush()
    assert len(far.recv(1000)) == 5 * len(acknowledgement(7))
    assert [flood(CROWD), flood(3)] == [CROWD, 0]
    outgoing = Publish(b"up").raw
    sock.send(outgoing)
    assert far.recv(1000) == acknowledgement(7) * 3 + outgoing


class _Narrow:
    """A socket that takes `room` bytes more, and gives what is set as `incoming`."""

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
    """Stands for a socket; notes what paho does with it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.used: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.used.add(name)
        return getattr(self._sock, name)


def test_paho_makes_its_socket_where_we_wrap_it_and_uses_no_more_of_it_than_we_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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


def test_paho_writes_an_acknowledgement_as_one_packet_of_four_bytes() -> None:
    client = make_client(LinkSettings(client_id="a"))
    packets: list[bytes] = []
    client._packet_queue = lambda _command, packet, *_: packets.append(bytes(packet))  # type: ignore[method-assign,assignment]
    client._send_puback(7)
    assert packets == [acknowledgement(7)]

"""The TLS stream against the standard library's TLS: over a network that cuts and blocks, and a real one."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet_common.identity.authority import issue
from fleet_common.identity.roles import IdentityRole
from fleet_common.mqtt.connection.screen import Screen
from fleet_common.mqtt.connection.screened_socket import ScreenedSocket
from fleet_common.mqtt.settings import TlsSettings
from fleet_common.mqtt.tls.context import LinkContext, tls_context
from fleet_common.mqtt.tls.stream import RECORD, TlsStream
from tests.support.mqtt_packets import Publish, acknowledgement
from tests.support.tls_fleet import HOST, new_authority

ALL: Final = 1 << 30
SIZES: Final = st.lists(st.sampled_from([1, 2, 4, 5, 6, 100, 5_000, 1 << 16]), max_size=60)
MESSAGES: Final = st.lists(st.sampled_from([1, 30, 110, 4_000, RECORD, 40_000]), min_size=1, max_size=30)


@pytest.fixture(scope="module", params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def contexts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """Return the authority's certificate, and a server's context of one version of TLS."""
    folder = tmp_path_factory.mktemp("tls")
    authority = new_authority(folder / "ca")
    made = issue(authority, "broker", role=IdentityRole.BROKER, hosts=[HOST], folder=folder / "broker")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = request.param
    context.load_cert_chain(made.certificate, made.key)
    return authority.folder.certificate, context


class Peer:
    """The server's end, and the network before it, which stands for a socket.

    Attributes:
        got: What has come from the stream, decrypted.
        gives: How many bytes each reading gets, and then as many as there are; 0 for none now.
        takes: Likewise each writing.
        readings: How often somebody has read something.
        under_way: What has been sent and not yet been read.
        over: Whether there comes nothing more.
        told: The alert that has come.
        broken: What reading, of nothing more, and writing raise.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self.got = b""
        self.gives: Iterator[int] = iter(())
        self.takes: Iterator[int] = iter(())
        self.readings = 0
        self.under_way = b""
        self.over = False
        self.told = ""
        self.broken: OSError | None = None
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._shaken = False

    def write(self, data: bytes) -> None:
        """Encrypt a message, and have it on its way."""
        sent = 0
        while sent < len(data):
            sent += self.tls.write(data[sent:])
        self._give_out()

    def say_goodbye(self) -> None:
        """Send TLS's own goodbye."""
        with pytest.raises(ssl.SSLWantReadError):  # that of the other end
            self.tls.unwrap()
        self._give_out()

    def recv(self, size: int) -> bytes:
        most = next(self.gives, ALL)
        if not most or not self.under_way:
            if self.over and most:
                return b""
            if self.broken is not None:
                raise self.broken
            raise BlockingIOError
        self.readings += 1
        piece = self.under_way[: min(size, most)]
        self.under_way = self.under_way[len(piece) :]
        return piece

    def send(self, data: bytes) -> int:
        if self.broken is not None:
            raise self.broken
        size = min(next(self.takes, ALL), len(data))
        if not size:
            raise BlockingIOError
        self._incoming.write(data[:size])
        self._serve()
        return size

    def sendall(self, data: bytes) -> None:
        if data:
            self.send(data)

    def settimeout(self, _seconds: float) -> None:
        pass

    def setblocking(self, _flag: bool) -> None:
        pass

    def _serve(self) -> None:
        try:
            if not self._shaken:
                self.tls.do_handshake()
                self._shaken = True
            while piece := self.tls.read(RECORD):
                self.got += piece
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self.told = str(error)
        self._give_out()

    def _give_out(self) -> None:
        self.under_way += self._outgoing.read()


Ends = tuple[Peer, TlsStream, LinkContext]
Connect = Callable[[], Ends]


@pytest.fixture(scope="module")
def connect(contexts: tuple[Path, ssl.SSLContext]) -> Connect:
    """Return what makes two ends that have shaken hands."""
    authority, serving = contexts

    def made() -> Ends:
        peer, context = Peer(serving), tls_context(TlsSettings(authority))
        stream = TlsStream(cast("Any", peer), context, HOST)
        stream.shake_hands(timeout_s=5.0)
        return peer, stream, context

    return made


def read(stream: TlsStream, peer: Peer, size: int = 1 << 16) -> bytes:
    """Read as a poll would have it: while the network has something, or the stream says that it has."""
    got = b""
    while peer.under_way or stream.pending:
        try:
            piece = stream.recv(size)
        except ssl.SSLWantReadError:
            continue
        if not piece:
            return got
        got += piece
    return got


def numbered(sizes: list[int]) -> list[bytes]:
    """Return messages of these sizes, no two alike."""
    return [(b"%06d" % number * (size // 6 + 1))[:size] for number, size in enumerate(sizes)]


@settings(deadline=None)
@given(sizes=MESSAGES, gives=SIZES, wanted=st.sampled_from([1_000, RECORD, 1 << 16]))
def test_what_was_sent_is_read_however_the_network_cuts_it(
    connect: Connect, sizes: list[int], gives: list[int], wanted: int
) -> None:
    peer, stream, _ = connect()
    messages = numbered(sizes)
    for message in messages:
        peer.write(message)
    peer.gives = iter([*gives, *[0, 1] * 3])
    assert read(stream, peer, wanted) == b"".join(messages)
    with pytest.raises(ssl.SSLWantReadError):
        stream.recv(1)


@settings(deadline=None)
@given(sizes=MESSAGES, takes=st.lists(st.sampled_from([0, 1, 3, 500, 20_000]), max_size=80))
def test_what_is_written_arrives_however_little_room_there_is(
    connect: Connect, sizes: list[int], takes: list[int]
) -> None:
    peer, stream, _ = connect()
    peer.takes = iter(takes)
    sent = b""
    for message in numbered(sizes):
        left = message
        while left:
            try:
                size = stream.send(left)
            except ssl.SSLWantWriteError:
                assert stream.wants_write
                continue
            assert peer.got == sent + left[:size], "told sent before it was"
            sent, left = sent + left[:size], left[size:]
    assert not stream.wants_write
    assert peer.got == b"".join(numbered(sizes))


def test_many_records_cost_one_reading_of_the_network(connect: Connect) -> None:
    peer, stream, _ = connect()
    read(stream, peer)
    peer.readings = 0
    for message in numbered([110] * 100):
        peer.write(message)
    assert stream.recv(1 << 16) == b"".join(numbered([110] * 100))
    assert peer.readings == 1
    assert not stream.pending


def test_a_goodbye_and_an_end_without_one_are_told_behind_what_came_before(connect: Connect) -> None:
    for end in (Peer.say_goodbye, lambda peer: setattr(peer, "over", True)):
        peer, stream, context = connect()
        peer.write(b"last")
        end(peer)
        assert read(stream, peer) == b"last"
        assert stream.recv(100) == b""
        assert stream.recv(100) == b""
        assert context.alert is None


def test_an_end_in_the_midst_of_a_record_is_an_end(connect: Connect) -> None:
    peer, stream, _ = connect()
    read(stream, peer)
    peer.write(b"cut off")
    peer.under_way, peer.over = peer.under_way[:-1], True
    assert read(stream, peer) == b""
    assert stream.recv(100) == b""


@pytest.mark.parametrize("cut", [3, 20])
def test_what_is_no_record_is_an_error_and_the_other_end_is_told(connect: Connect, cut: int) -> None:
    peer, stream, context = connect()
    read(stream, peer)
    peer.write(b"good")
    good = peer.under_way
    peer.write(b"a longer message, which is spoilt")
    peer.under_way = good + peer.under_way[len(good) :][:cut] + b"\xff" * 100
    assert stream.recv(100) == b"good"
    assert stream.pending
    with pytest.raises(ssl.SSLError):  # whatever OpenSSL calls it
        stream.recv(100)
    assert context.alert is not None
    assert "ALERT" in peer.told


def test_a_broken_connection_is_told_as_the_system_tells_it(connect: Connect) -> None:
    peer, stream, _ = connect()
    read(stream, peer)
    peer.broken = ConnectionResetError()
    with pytest.raises(ConnectionResetError):
        stream.recv(100)
    with pytest.raises(ConnectionResetError):
        stream.send(b"x")
    assert stream.recv(100) == b"", "what comes behind a gap would be taken for the next packet"


class Silent:
    """A socket whose other end says nothing, or a byte now and then, in a time that passes with each reading."""

    def __init__(self, said: bytes) -> None:
        self.now = 0.0
        self.closed = False
        self._said = iter(said)

    def recv(self, _size: int) -> bytes:
        self.now += 1.0
        for byte in self._said:
            return bytes([byte])
        raise TimeoutError

    def __getattr__(self, name: str) -> Any:
        return lambda *_: setattr(self, "closed", self.closed or name == "close")


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x03\x40\x00" + bytes(100)])
def test_a_handshake_that_takes_too_long_is_given_up(contexts: tuple[Path, ssl.SSLContext], said: bytes) -> None:
    wire = Silent(said)
    stream = TlsStream(cast("Any", wire), tls_context(TlsSettings(contexts[0])), HOST, clock=lambda: wire.now)
    with pytest.raises(TimeoutError):
        stream.shake_hands(timeout_s=5.0)
    assert wire.now <= 6.0
    assert wire.closed


def test_a_peer_that_hangs_up_amid_the_handshake(contexts: tuple[Path, ssl.SSLContext]) -> None:
    far, near = socket.socketpair()
    far.close()
    stream = TlsStream(near, tls_context(TlsSettings(contexts[0])), HOST)
    with pytest.raises(OSError):  # noqa: PT011 - whatever the system calls it
        stream.shake_hands(timeout_s=5.0)
    assert near.fileno() == -1


def test_a_screened_socket_over_tls_reads_all_and_acknowledges(connect: Connect) -> None:
    peer, stream, _ = connect()
    sock = ScreenedSocket(stream, Screen(max_packet_bytes=1 << 20, accepts=lambda topic, *_: topic == b"good"))
    good = Publish(b"good", b"x" * 30_000).raw
    for identifier in range(1, 9):
        peer.write(Publish(b"bad", b"y" * 100, identifier=identifier).raw)
        peer.write(good)
    got = b""
    while peer.under_way or sock.pending:
        sock.fill()
        while sock.ready:
            got += sock.recv(100_000)
    assert got == good * 8
    peer.takes = iter([0, 5, 0])
    sock.flush()
    assert sock.wants_write
    while sock.wants_write:
        sock.flush()
    assert peer.got == b"".join(acknowledgement(identifier) for identifier in range(1, 9))


def test_a_large_packet_goes_both_ways_over_a_real_connection(contexts: tuple[Path, ssl.SSLContext]) -> None:
    """The other end is the standard library's, which reads nothing until all that the system holds is full."""
    authority, serving = contexts
    size = 3 << 20
    packet = b"".join(b"%08d" % number for number in range(size // 8))
    echoed = threading.Event()

    def echo() -> None:
        peer, _ = server.accept()
        with serving.wrap_socket(peer, server_side=True) as far:
            full.wait(10.0)
            got = bytearray()
            while len(got) < size:
                got += far.recv(1 << 16)
            far.sendall(got)
            echoed.set()

    full = threading.Event()
    with socket.create_server((HOST, 0)) as server:
        thread = threading.Thread(target=echo, daemon=True)
        thread.start()
        sock = socket.create_connection(server.getsockname())
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        stream = TlsStream(sock, tls_context(TlsSettings(authority)), HOST)
        stream.shake_hands(timeout_s=10.0)
        sent, got = 0, b""
        while len(got) < size:
            if sent < size:
                try:
                    sent += stream.send(packet[sent:])
                except ssl.SSLWantWriteError:
                    full.set()
            with contextlib.suppress(ssl.SSLWantReadError):
                got += stream.recv(1 << 16)
        assert full.is_set()
        assert echoed.wait(10.0)
        assert got == packet
        stream.close()
        thread.join()

import logging
import select
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Self, cast

import pytest
from cryptography import x509
from hypothesis import given, settings, strategies as st

from fleet_common.identity.authority import Authority, issue
from fleet_common.identity.certificates import IdentityRole, key_pem, load_key, make_request, new_key
from fleet_common.identity.files import write_atomically
from fleet_common.mqtt.errors import ConnectFailed, LinkFault
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.screen import Screen, ScreenedSocket
from fleet_common.mqtt.settings import LinkSettings, TlsSettings
from fleet_common.mqtt.tls import (
    LOOK_S,
    RECORD,
    RETRY_S,
    Credentials,
    LinkContext,
    TlsStream,
    certificate_end,
    tls_context,
)
from tests.support.links import START_S, connect_failure
from tests.support.mqtt_packets import Publish, puback_packet
from tests.support.scripted_broker import ScriptedBroker
from tests.support.tls_fleet import HOST, TlsFleet, enrol, new_authority, tls_fleet
from tests.support.waiting import PATIENCE_S, until

NAME = "sensor-1"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return new_authority(tmp_path / "ca")


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> TlsSettings:
    return enrol(authority, NAME, tmp_path)


def key_of(files: TlsSettings) -> Path:
    assert files.key is not None
    return files.key


def certificate_of(files: TlsSettings) -> Path:
    assert files.certificate is not None
    return files.certificate


def complaint(files: TlsSettings, *, now: datetime | None = None) -> str:
    with pytest.raises(ConnectFailed) as caught:
        tls_context(files, now=now)
    assert caught.value.final
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_below_tls_1_2_and_no_weak_cipher(files: TlsSettings) -> None:
    context = tls_context(files)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert (context.check_hostname, context.verify_mode) == (True, ssl.CERT_REQUIRED)
    assert not context.hostname_checks_common_name
    assert context.options & ssl.OP_NO_RENEGOTIATION
    ciphers = [str(cipher["name"]) for cipher in context.get_ciphers()]
    assert ciphers
    assert all(name.startswith(("TLS_", "ECDHE-")) for name in ciphers)
    assert all("GCM" in name or "CHACHA20" in name for name in ciphers)


@pytest.mark.parametrize("which", ["ca", "certificate", "key"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x00\xff" * 50])
def test_a_file_of_the_wrong_kind_is_named(files: TlsSettings, tmp_path: Path, which: str, content: bytes) -> None:
    (tmp_path / "wrong.pem").write_bytes(content)
    said = complaint(replace(files, **{which: tmp_path / "wrong.pem"}))
    assert "wrong.pem: it holds no" in said


def test_a_key_of_another_certificate(files: TlsSettings, authority: Authority, tmp_path: Path) -> None:
    other = enrol(authority, "sensor-2", tmp_path)
    said = complaint(replace(files, key=other.key))
    assert f"{other.key}: it does not belong to the certificate {files.certificate}" in said


def test_a_key_with_a_passphrase_is_not_asked_for_on_the_terminal(files: TlsSettings) -> None:
    encrypted = key_pem(load_key(key_of(files)), b"secret")
    key_of(files).write_bytes(encrypted)
    assert "it has a passphrase" in complaint(files)


@pytest.mark.parametrize("days", [91, -1])
def test_a_certificate_that_is_not_valid_now(files: TlsSettings, days: int) -> None:
    now = datetime.now(UTC) + timedelta(days=days)
    with pytest.raises(ConnectFailed) as caught:
        tls_context(files, now=now)
    assert f"this machine's clock says {now:%Y-%m-%d %H:%M} (UTC)" in str(caught.value)


class Server:
    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._listener = socket.create_server((HOST, 0))
        self.port = int(self._listener.getsockname()[1])
        self.versions: list[str | None] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with peer:
                peer.settimeout(PATIENCE_S)
                try:
                    with self._context.wrap_socket(peer, server_side=True) as stream:
                        self.versions.append(stream.version())
                        stream.recv(100)
                except OSError:
                    continue

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


def refusal(port: int, tls: TlsSettings, host: str = HOST, *, handshake_s: float = PATIENCE_S) -> ConnectFailed:
    settings = LinkSettings(
        client_id=NAME,
        host=host,
        port=port,
        tls=tls,
        min_backoff_s=0.01,
        connect_timeout_s=PATIENCE_S,
        handshake_s=handshake_s,
    )
    return connect_failure(PahoLink(settings))


def serving(authority: Authority, folder: Path, role: IdentityRole, hosts: list[str]) -> ssl.SSLContext:
    name = "broker" if role is IdentityRole.BROKER else "sensor-9"
    made = issue(authority, name, role=role, hosts=hosts, folder=folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.certificate, made.key)
    return context


@pytest.fixture
def server(request: pytest.FixtureRequest, authority: Authority, tmp_path: Path) -> Iterator[Server]:
    with Server(serving(authority, tmp_path / "server", *request.param)) as made:
        yield made


@pytest.mark.parametrize("server", [(IdentityRole.BROKER, ["elsewhere.example.org"])], indirect=True)
def test_a_broker_of_another_name(server: Server, files: TlsSettings) -> None:
    error = refusal(server.port, files)
    assert "it is for another address; use a name that is in it" in str(error)
    assert "it is for another host name" in str(refusal(server.port, files, "localhost"))
    assert error.final


@pytest.mark.parametrize("server", [(IdentityRole.DEVICE, [])], indirect=True)
def test_a_device_that_plays_the_broker(server: Server, files: TlsSettings) -> None:
    assert "another server may pose as the broker" in str(refusal(server.port, files))


@pytest.mark.parametrize("server", [(IdentityRole.BROKER, [HOST])], indirect=True)
def test_a_broker_of_another_authority(server: Server, files: TlsSettings, tmp_path: Path) -> None:
    stranger = new_authority(tmp_path / "other")
    error = refusal(server.port, replace(files, ca=stranger.folder.certificate))
    assert "check the CA file" in str(error)


@pytest.mark.parametrize(
    ("days", "sentence"),
    [(-100, "it has ended; have it renewed"), (100, "it is not valid yet by this machine's clock")],
)
def test_a_brokers_expired_certificate_is_refused(files: TlsSettings, tmp_path: Path, days: int, sentence: str) -> None:
    ca = new_authority(tmp_path / "other", clock=lambda: datetime.now(UTC) + timedelta(days=days))
    with Server(serving(ca, tmp_path / "server", IdentityRole.BROKER, [HOST])) as server:
        assert sentence in str(refusal(server.port, replace(files, ca=ca.folder.certificate)))


def test_tls_to_a_port_that_has_none(files: TlsSettings) -> None:
    with ScriptedBroker(None) as broker:
        assert "is it a TLS port" in str(refusal(broker.port, files, handshake_s=0.2))


def test_the_reason_is_read_after_a_hang_up(files: TlsSettings, authority: Authority, tmp_path: Path) -> None:
    # Under TLS 1.3 a client is through before the server has judged it; the write then fails, not the read.
    context = serving(authority, tmp_path / "server", IdentityRole.BROKER, [HOST])
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(new_authority(tmp_path / "other").folder.certificate)
    asks = tls_context(files)
    with Server(context) as server, socket.create_connection((HOST, server.port)) as sock:
        link = TlsStream(sock, asks, HOST)
        link.shake_hands(timeout_s=PATIENCE_S)
        poll = select.poll()
        poll.register(link, select.POLLRDHUP)
        assert poll.poll(5000), "the server has not hung up"
        with pytest.raises(OSError):  # noqa: PT011, PT012 - whatever the system calls it
            for _ in range(3):
                link.send(b"CONNECT")
    assert str(asks.alert.reason).endswith("UNKNOWN_CA")


class Times:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += LOOK_S
        return self.now


@pytest.fixture
def watched(files: TlsSettings) -> Credentials:
    credentials = Credentials(files, clock=Times())
    credentials.current()
    credentials.accepted()
    return credentials


def renew(authority: Authority, files: TlsSettings) -> None:
    write_atomically(certificate_of(files), authority.renew(NAME, early=True).pem.encode(), mode=0o644)


def test_a_replaced_certificate_is_a_renewal(watched: Credentials, authority: Authority, files: TlsSettings) -> None:
    before = watched.current()
    renew(authority, files)
    assert watched.renewed()
    assert watched.current() is not before
    watched.accepted()
    assert not watched.renewed()


def test_a_certificate_without_its_key_is_waited_for(
    watched: Credentials, authority: Authority, files: TlsSettings, caplog: pytest.LogCaptureFixture
) -> None:
    key = new_key()
    request = x509.load_pem_x509_csr(make_request(key, NAME))
    before = watched.current()
    with caplog.at_level(logging.WARNING):
        write_atomically(
            certificate_of(files), authority.renew(NAME, request=request, early=True).pem.encode(), mode=0o644
        )
        for _ in range(3):
            assert not watched.renewed()
    assert len(caplog.records) == 1
    assert "does not belong to the certificate" in caplog.text
    assert watched.current() is before, "a connection that is lost meanwhile comes back with what works"
    write_atomically(key_of(files), key_pem(key), mode=0o600)
    assert watched.renewed()
    assert watched.current() is not before


def test_files_that_are_away_for_a_moment_do_no_harm(watched: Credentials, files: TlsSettings) -> None:
    before = watched.current()
    certificate_of(files).unlink()
    assert not watched.renewed()
    assert watched.current() is before


def test_a_renewal_that_the_broker_refuses_is_put_aside_for_a_while(authority: Authority, files: TlsSettings) -> None:
    times = Times()
    watched = Credentials(files, clock=times)
    before = watched.current()
    watched.accepted()
    renew(authority, files)
    assert watched.renewed()
    assert watched.current() is not before
    watched.refused("no")
    assert not watched.renewed()
    assert watched.current() is before
    watched.accepted()
    times.now += RETRY_S
    assert watched.renewed()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[TlsFleet]:
    with tls_fleet(tmp_path / "fleet") as made:
        yield made


@pytest.mark.broker
def test_a_client_of_another_authority_is_told_so(fleet: TlsFleet, files: TlsSettings) -> None:
    stranger = replace(files, ca=fleet.authority.folder.certificate)
    with pytest.raises(ConnectFailed) as caught:
        fleet.link(stranger, NAME).start(timeout_s=START_S)
    assert (caught.value.fault, caught.value.final) == (LinkFault.CERTIFICATE, True)


@pytest.mark.broker
def test_a_client_without_a_certificate_is_told_so(fleet: TlsFleet) -> None:
    with pytest.raises(ConnectFailed) as caught:
        fleet.link(TlsSettings(fleet.authority.folder.certificate), NAME).start(timeout_s=START_S)
    assert caught.value.fault is LinkFault.CERTIFICATE


@pytest.mark.broker
def test_a_connection_outlives_a_renewal_that_the_broker_refuses(fleet: TlsFleet, tmp_path: Path) -> None:
    tls = fleet.enrol(NAME)
    link = fleet.link(tls, NAME)
    link.start(timeout_s=START_S)
    saved = [path.read_bytes() for path in (certificate_of(tls), key_of(tls))]
    foreign = enrol(new_authority(tmp_path / "other"), NAME, tmp_path / "foreign")
    key_of(tls).write_bytes(key_of(foreign).read_bytes())
    shutil.copyfile(certificate_of(foreign), certificate_of(tls))
    until(lambda: link.counters.renewals == 1 and link.counters.connects == 2)
    assert link.connected
    for path, content in zip((certificate_of(tls), key_of(tls)), saved, strict=True):
        path.write_bytes(content)
    until(lambda: link.counters.renewals == 2 and link.counters.connects == 3)


def test_the_end_of_a_certificate_is_read_from_its_file(files: TlsSettings, tmp_path: Path) -> None:
    expected = x509.load_pem_x509_certificate(certificate_of(files).read_bytes()).not_valid_after_utc
    assert certificate_end(files.certificate) == expected
    (tmp_path / "nonsense.pem").write_text("no certificate")
    assert certificate_end(tmp_path / "nonsense.pem") is None
    assert certificate_end(tmp_path / "nowhere.pem") is None
    assert certificate_end(None) is None


ALL: Final = 1 << 30
SIZES: Final = st.lists(st.sampled_from([1, 2, 4, 5, 6, 100, 5_000, 1 << 16]), max_size=60)
MESSAGES: Final = st.lists(st.sampled_from([1, 30, 110, 4_000, RECORD, 40_000]), min_size=1, max_size=30)


@pytest.fixture(scope="module", params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def contexts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    folder = tmp_path_factory.mktemp("tls")
    authority = new_authority(folder / "ca")
    made = issue(authority, "broker", role=IdentityRole.BROKER, hosts=[HOST], folder=folder / "broker")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = request.param
    context.load_cert_chain(made.certificate, made.key)
    return authority.folder.certificate, context


class Peer:
    """A TLS server and the network before it, in place of a socket.

    Attributes:
        gives: Bytes for each read, then all that are there; 0 for none now.
        takes: Likewise for each write.
        readings: Number of reads that returned something.
        broken: What a read at the end, and each write, raises.
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
        sent = 0
        while sent < len(data):
            sent += self.tls.write(data[sent:])
        self._give_out()

    def say_goodbye(self) -> None:
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
    authority, serving = contexts

    def made() -> Ends:
        peer, context = Peer(serving), tls_context(TlsSettings(authority))
        stream = TlsStream(cast("Any", peer), context, HOST)
        stream.shake_hands(timeout_s=PATIENCE_S)
        return peer, stream, context

    return made


def read(stream: TlsStream, peer: Peer, size: int = 1 << 16) -> bytes:
    """Read as a poll loop does: while the network or the stream has data."""
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
    return [(b"%06d" % number * (size // 6 + 1))[:size] for number, size in enumerate(sizes)]


@settings(deadline=None)
@given(sizes=MESSAGES, gives=SIZES, wanted=st.sampled_from([1_000, RECORD, 1 << 16]))
def test_any_cut_of_the_network_is_read(connect: Connect, sizes: list[int], gives: list[int], wanted: int) -> None:
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
def test_what_is_written_arrives_in_any_room(connect: Connect, sizes: list[int], takes: list[int]) -> None:
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
    """A socket whose peer sends nothing, or single bytes; each read advances the time."""

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
        stream.shake_hands(timeout_s=PATIENCE_S)
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
    assert peer.got == b"".join(puback_packet(identifier) for identifier in range(1, 9))

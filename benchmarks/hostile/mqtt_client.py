"""MQTT client of an attacker: one TLS socket, packets built beforehand, many of them in one write.

It believes that the broker keeps to MQTT, keeps nothing for a second try, and lets its owner decide whether to read.
"""

import contextlib
import select
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from benchmarks.client_process import Identity
from schemas.errors import FleetError
from tests.support.mqtt_packets import (
    PING,
    IncomingPacket,
    PacketType,
    WillMessage,
    connect_packet,
    puback_packet,
    split_packets,
    subscribe_packet,
)

_CHUNK: Final = 1 << 16
_CONNECT_S: Final = 10.0
_PING_S: Final = 20.0
_BACKLOG: Final = 1 << 18


class ConnectRefused(FleetError):  # noqa: N818 - reads as what it says
    """The broker has not let the client in."""


@dataclass(slots=True)
class ClientCounters:
    """What a client has met, over all its connections."""

    connects: int = 0
    refused: int = 0
    losses: Counter[str] = field(default_factory=Counter)
    received: Counter[int] = field(default_factory=Counter)
    received_bytes: int = 0
    sent_bytes: int = 0


def tls_socket(identity: Identity, context: ssl.SSLContext) -> ssl.SSLSocket:
    """Return a socket whose handshake is done, in blocking mode.

    Raises:
        OSError: There is no connection, or no agreement.
    """
    plain = socket.create_connection((identity.host, identity.port), timeout=_CONNECT_S)
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return context.wrap_socket(plain, server_hostname=identity.host)
    except BaseException:
        plain.close()
        raise


class RawClient:
    """One client, connected when it is first pumped and again when the broker has hung up.

    Args:
        identity: Who it is, and where the broker is.
        on_publish: Called with topic and payload of what arrives.
        clock: Monotonic seconds.
        retry_s: Wait between a lost connection and the next.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        on_publish: Callable[[bytes, bytes], None] = lambda _topic, _payload: None,
        clock: Callable[[], float] = time.monotonic,
        retry_s: float = 0.5,
    ) -> None:
        self.identity = identity
        self.on_publish = on_publish
        self.on_connect: Callable[[], None] = lambda: None
        self.counters = ClientCounters()
        self.reads = True
        self._context = identity.tls_context()
        self._clock = clock
        self._retry_s = retry_s
        self._not_before = 0.0
        self._pinged = 0.0
        self._socket: ssl.SSLSocket | None = None
        self._out = bytearray()
        self._in = bytearray()

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._socket is not None

    @property
    def full(self) -> bool:
        """Whether the broker takes less than it is given: nothing more should be sent for now."""
        return len(self._out) > _BACKLOG

    def connect(self, will: WillMessage | None = None) -> None:
        """Connect, and return when the broker has answered.

        Raises:
            ConnectRefused: It answers with a reason, or not at all.
        """
        self.abort()
        self._not_before = self._clock() + self._retry_s
        try:
            sock = tls_socket(self.identity, self._context)
            sock.sendall(connect_packet(self.identity.name, will=will))
            reason = _await_connack(sock, self._in)
        except OSError as error:
            self.counters.refused += 1
            raise ConnectRefused(f"The broker does not take {self.identity.name}: {error}.") from error
        if reason:
            sock.close()
            self.counters.refused += 1
            raise ConnectRefused(f"The broker refuses {self.identity.name} with reason code {reason}.")
        sock.setblocking(False)  # noqa: FBT003 - the standard library's
        self._socket = sock
        self._pinged = self._clock()
        self.counters.connects += 1
        self.on_connect()

    def subscribe(self, filters: Sequence[str]) -> None:
        """Subscribe at QoS 1, all filters in one packet."""
        self.send(subscribe_packet(filters))

    def send(self, packets: bytes) -> None:
        """Send as soon as the socket takes it; lost if there is no connection."""
        if self._socket is not None:
            self._out += packets

    def pump(self, wait_s: float) -> None:
        """Write what waits and read what has come; wait at most `wait_s` for either."""
        if self._socket is None:
            self._reconnect(wait_s)
            return
        sock = self._socket
        if self._clock() - self._pinged > _PING_S:
            self._pinged = self._clock()
            self._out += PING
        try:
            self._write(sock)
            pending = self.reads and sock.pending() > 0
            readers = [sock] if self.reads else []
            readable, writable, _ = select.select(readers, [sock] if self._out else [], [], 0.0 if pending else wait_s)
            if writable:
                self._write(sock)
            if readable or pending:
                self._read(sock)
        except OSError:
            self._lost("closed")

    def abort(self) -> None:
        """End the connection without a word, as a power failure would."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
        self._socket = None
        self._out.clear()
        self._in.clear()

    def _reconnect(self, wait_s: float) -> None:
        delay = self._not_before - self._clock()
        if delay > 0:
            time.sleep(min(delay, max(wait_s, 0.001)))
            return
        with contextlib.suppress(ConnectRefused):
            self.connect()

    def _write(self, sock: ssl.SSLSocket) -> None:
        while self._out:
            try:
                sent = sock.send(bytes(self._out[:_CHUNK]))
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            self.counters.sent_bytes += sent
            del self._out[:sent]

    def _read(self, sock: ssl.SSLSocket) -> None:
        try:
            received = sock.recv(_CHUNK)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        if not received:
            self._lost("closed")
            return
        self._in += received
        self.counters.received_bytes += len(received)
        for packet in split_packets(self._in):
            self._take(packet)

    def _take(self, packet: IncomingPacket) -> None:
        self.counters.received[packet.kind] += 1
        if packet.kind == PacketType.PUBLISH:
            topic, identifier, payload = packet.publish()
            if identifier is not None:
                self._out += puback_packet(identifier)
            self.on_publish(topic, payload)
        elif packet.kind == PacketType.DISCONNECT:
            self._lost(f"0x{packet.reason:02x}")

    def _lost(self, why: str) -> None:
        if self._socket is not None:
            self.counters.losses[why] += 1
            self._not_before = self._clock() + self._retry_s
            self.abort()


def _await_connack(sock: ssl.SSLSocket, received: bytearray) -> int:
    while True:
        chunk = sock.recv(_CHUNK)
        if not chunk:
            raise ConnectionResetError("it hangs up")
        received += chunk
        for packet in split_packets(received):
            if packet.kind == PacketType.CONNACK:
                return packet.reason

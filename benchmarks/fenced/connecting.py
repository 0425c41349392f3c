"""Connections of the benchmark: a bare socket to a broker, with TLS or without, MQTT's beginning done by hand."""

import socket
import ssl
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from benchmarks.shared.identity import Identity
from benchmarks.shared.processes import BenchError
from tests.support.mqtt_packets import PacketType, connect_packet, split_packets

__all__ = ["CHUNK", "Access", "drain"]

CHUNK: Final = 1 << 16
_HOST: Final = "127.0.0.1"
_PATIENCE_S: Final = 10.0
_KEEPALIVE_S: Final = 600


@dataclass(frozen=True, slots=True)
class Access:
    """How a client gets to a broker.

    Attributes:
        name: User name and client id.
        port: On loopback.
        identity: Its certificate; None without TLS.
    """

    name: str
    port: int
    identity: Identity | None = None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote."""
        identity = fields["identity"]
        return cls(fields["name"], fields["port"], Identity(**identity) if identity else None)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)

    def connect(self) -> socket.socket:
        """Return a socket, plain or TLS, whose MQTT connection the broker has taken.

        Raises:
            BenchError: It has not.
        """
        sock = socket.create_connection((_HOST, self.port), timeout=_PATIENCE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        username = None
        if self.identity is None:
            username = self.name
        else:
            sock = self.identity.tls_context().wrap_socket(sock, server_hostname=_HOST)
        sock.sendall(connect_packet(self.name, keepalive_s=_KEEPALIVE_S, username=username))
        answer = next(split_packets(bytearray(sock.recv(CHUNK))), None)
        if answer is None or answer.kind != PacketType.CONNACK or answer.reason:
            raise BenchError(f"The broker does not take {self.name}.")
        return sock


def drain(sock: socket.socket) -> int:
    """Read what has come, to its end for now; return how many bytes."""
    size = 0
    while True:
        try:
            piece = sock.recv(CHUNK)
        except (BlockingIOError, ssl.SSLWantReadError):
            return size
        if not piece:
            raise BenchError("The broker has ended a connection of the benchmark.")
        size += len(piece)

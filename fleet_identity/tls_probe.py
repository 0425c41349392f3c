"""TLS probe: shows a certificate to a broker and reads the answer, no more.

The link of `fleet_link` is made to get through; here the point is to learn precisely how the broker answers.
"""

import contextlib
import secrets
import socket
import ssl
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from fleet_identity.certificates import Credential
from fleet_identity.files import SECRET, write_atomically
from fleet_identity.keys import key_pem

__all__ = ["CertificateAnswer", "TlsEndpoint", "probe_certificate"]

ALERT_S = 1.0  # TLS 1.3 lets a client finish before the server has judged its certificate
KEEPALIVE_S = 10
CONNACK, SUCCESS = 0x20, 0
_REVOKED = "CERTIFICATE_REVOKED"


class CertificateAnswer(Enum):
    """What the broker made of a certificate."""

    ACCEPTED = auto()
    REVOKED = auto()


@dataclass(frozen=True, slots=True)
class TlsEndpoint:
    """Where a broker's TLS listener is.

    Attributes:
        host: Name or address, as its certificate has it.
        port: TCP port.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def probe_certificate(
    door: TlsEndpoint, credential: Credential, *, authority: bytes, timeout_s: float, await_alert: bool = True
) -> CertificateAnswer:
    """Connect as whom the certificate names, and leave at once.

    The broker ends an older session of that name before it answers.

    Args:
        door: The broker.
        credential: What to show.
        authority: Who vouches for the broker, in PEM.
        timeout_s: Longest wait.
        await_alert: Whether to give a refusal the time to arrive: a packet sent too early may make the network lose it.

    Raises:
        OSError: Neither a yes nor a no could be had: `ssl.SSLError`, `TimeoutError`, `ConnectionError` and the like.
    """
    try:
        with _connected(door, credential, authority, timeout_s) as stream:
            if await_alert:
                _hear_out(stream, min(ALERT_S, timeout_s))
            stream.settimeout(timeout_s)
            stream.sendall(_connect_packet(credential.name))
            answer = stream.recv(4)
            if len(answer) < 4 or answer[0] != CONNACK or answer[3] != SUCCESS:  # noqa: PLR2004 - of a CONNACK
                raise ConnectionError("the broker accepted the certificate but not the client")
            with contextlib.suppress(OSError):
                stream.sendall(b"\xe0\x00")  # DISCONNECT
            return CertificateAnswer.ACCEPTED
    except ssl.SSLError as error:
        if _REVOKED in str(error.reason):
            return CertificateAnswer.REVOKED
        raise


@contextlib.contextmanager
def _connected(
    door: TlsEndpoint, credential: Credential, authority: bytes, timeout_s: float
) -> Iterator[ssl.SSLSocket]:
    context = ssl.create_default_context(cadata=authority.decode())
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, credential)
    with (
        socket.create_connection((door.host, door.port), timeout=timeout_s) as sock,
        context.wrap_socket(sock, server_hostname=door.host) as stream,
    ):
        yield stream


def _load(context: ssl.SSLContext, credential: Credential) -> None:
    # The library reads files only: the key is encrypted with a passphrase that never leaves this function.
    passphrase = secrets.token_bytes(32).hex().encode()
    with tempfile.TemporaryDirectory(prefix="fleet-takeover-") as folder:
        pair = Path(folder) / "pair.pem"
        write_atomically(pair, credential.certificate + key_pem(credential.key, passphrase), mode=SECRET)
        context.load_cert_chain(pair, password=passphrase)


def _hear_out(stream: ssl.SSLSocket, seconds: float) -> None:
    stream.settimeout(seconds)
    with contextlib.suppress(TimeoutError):
        if not stream.recv(1):
            raise ConnectionError("the broker closed the connection")


def _connect_packet(client_id: str) -> bytes:
    """Return a CONNECT of MQTT 5 with a clean start and nothing else (3.1)."""
    name = client_id.encode()
    body = b"\x00\x04MQTT\x05\x02" + struct.pack("!HB", KEEPALIVE_S, 0) + struct.pack("!H", len(name)) + name
    return bytes([0x10, len(body)]) + body

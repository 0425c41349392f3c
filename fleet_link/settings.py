"""How to reach the broker."""

from dataclasses import dataclass, field
from pathlib import Path

from fleet_link.link import Will

__all__ = ["LinkSettings", "TlsSettings"]


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """Files of an encrypted connection.

    Attributes:
        ca: Certificates (PEM) of those who may vouch for the broker.
        certificate: Our own certificate (PEM), where the broker asks for one.
        key: Its private key (PEM).
    """

    ca: Path
    certificate: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """One client's connection to the broker.

    Attributes:
        client_id: Unique at the broker: of two clients with the same one, the older is disconnected.
        host: Name or address of the broker.
        port: TCP port.
        username: Identity for a broker without client certificates.
        password: Its secret; never shown.
        tls: Files of an encrypted connection, or None for plain TCP.
        will: Published by the broker, retained, if this client vanishes.
        keepalive_s: Seconds of silence after which either side asks whether the other is there. A vanished
            client is noticed after 1.5 times as long.
        connect_timeout_s: For TCP, TLS and the broker's answer together.
        queue_messages: Most messages waiting or unacknowledged.
        queue_bytes: Likewise, of their packets.
        packet_bytes: Largest packet that we send or take. The same for all clients of a broker: it silently drops what
            is too large for a subscriber. Some brokers have a limit and do not announce it; this one holds then.
        min_backoff_s: About the first delay before connecting again.
        max_backoff_s: The longest.
        flush_s: Longest that `stop` waits for acknowledgements.
        no_delay: Whether small packets go out at once. False only to measure what that costs.
    """

    client_id: str
    host: str = "127.0.0.1"
    port: int = 1883
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: TlsSettings | None = None
    will: Will | None = None
    keepalive_s: int = 15
    connect_timeout_s: float = 5.0
    queue_messages: int = 1000
    queue_bytes: int = 8 << 20
    packet_bytes: int = 1 << 20
    min_backoff_s: float = 0.2
    max_backoff_s: float = 30.0
    flush_s: float = 2.0
    no_delay: bool = True

    @property
    def where(self) -> str:
        """The address for a sentence."""
        return f"{self.host}:{self.port}"

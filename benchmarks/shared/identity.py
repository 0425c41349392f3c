"""Identity of a client, as JSON for the process that has it: its certificate, and the broker that takes it."""

import ssl
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Identity"]


@dataclass(frozen=True, slots=True)
class Identity:
    """A client with a certificate, and the broker that takes it.

    Attributes:
        name: In the certificate.
        host: Of the broker.
        port: Of the broker.
        ca: Who vouches for the broker (PEM).
        certificate: The client's own (PEM).
        key: Its private key (PEM).
    """

    name: str
    host: str
    port: int
    ca: str
    certificate: str
    key: str

    def tls_context(self) -> ssl.SSLContext:
        """Return a context that shows the certificate, and checks the broker's."""
        context = ssl.create_default_context(cafile=self.ca)
        context.load_cert_chain(self.certificate, self.key)
        return context

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments of `Identity`, as JSON values."""
        return asdict(self)

    def settings(self) -> dict[str, Any]:
        """Return the section `broker` of a device's or an edge's settings."""
        return {
            "host": self.host,
            "port": self.port,
            "ca": Path(self.ca),
            "certificate": Path(self.certificate),
            "key": Path(self.key),
        }

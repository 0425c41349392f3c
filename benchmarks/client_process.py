"""Client processes: who they are at a broker, how they end, and the events that they write on standard output."""

import contextlib
import json
import signal
import ssl
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from fleet_device.requests.generate import Cancellation


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


@dataclass(frozen=True, slots=True)
class Ending:
    """End of a process that writes texts.

    Attributes:
        event: Set when it is to end.
        cancellation: Ends the text that is being written then.
    """

    event: threading.Event = field(default_factory=threading.Event)
    cancellation: Cancellation = field(default_factory=Cancellation)

    def at_sigterm(self) -> Self:
        """Have SIGTERM bring it about; on the main thread. Returns itself."""
        # Not in the handler itself: it would run in the midst of whatever takes the locks that it needs.
        threading.Thread(target=self._cancel, name="cancel", daemon=True).start()
        signal.signal(signal.SIGTERM, lambda *_: self.event.set())
        return self

    def with_parent(self) -> Self:
        """Have the end of standard input bring it about: the parent process has ended. Returns itself."""
        threading.Thread(target=self._outlive_nobody, name="lifeline", daemon=True).start()
        return self

    def _cancel(self) -> None:
        self.event.wait()
        self.cancellation.cancel()

    def _outlive_nobody(self) -> None:
        while sys.stdin.readline():
            pass
        self.event.set()


def tell(event: str, **fields: object) -> None:
    """Write an event, unless nobody reads any more."""
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps({"event": event, **fields}), flush=True)

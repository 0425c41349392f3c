"""Origin of a request: its true address and scheme behind proxies, and the name that it was sent to."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from starlette.datastructures import Headers
from starlette.types import Scope

from fleet_admin.dashboard.settings import Network

_OF_THIS_MACHINE: Final = frozenset({"127.0.0.1", "localhost", "[::1]"})


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request comes from and goes to.

    Attributes:
        address: Of the client; of the last proxy that is not trusted, if there are several.
        secure: Whether the client spoke TLS, with us or with a trusted proxy.
        proxied: Whether a trusted proxy has passed it on, so that its headers are believed.
        host: The Host header, with its port.
    """

    address: str
    secure: bool
    proxied: bool
    host: str

    def named(self, allowed: frozenset[str]) -> bool:
        """Whether the request was sent to a name that is ours: a page whose name resolves to us has another."""
        host = self.host.lower()
        name, colon, port = host.rpartition(":")
        name = name if colon and port.isascii() and port.isdigit() else host
        return name in _OF_THIS_MACHINE or name in allowed or host in allowed

    @property
    def url(self) -> str:
        """As browsers write the origin of a page of ours."""
        return f"{'https' if self.secure else 'http'}://{self.host}".lower()


def origin_of(scope: Scope, *, trusted: Sequence[Network]) -> Origin:
    """Return where a request comes from. Of two Host headers there is none."""
    headers = Headers(scope=scope)
    hosts = headers.getlist("host")
    client = scope.get("client")
    address = str(client[0]) if client else ""
    secure, proxied = scope.get("scheme") == "https", _within(address, trusted)
    if proxied:
        secure = headers.get("x-forwarded-proto", "").split(",")[-1].strip().lower() == "https"
        passed = [each.strip() for line in headers.getlist("x-forwarded-for") for each in line.split(",")]
        # From the right: what stands left of the first that is not ours may be invented.
        address = next((each for each in reversed(passed) if each and not _within(each, trusted)), address)
    return Origin(_plain(address), secure, proxied, hosts[0] if len(hosts) == 1 else "")


def _within(address: str, trusted: Sequence[Network]) -> bool:
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(known in network for network in trusted if network.version == known.version)


def _plain(address: str) -> str:
    """Return the address alone: a header may hold anything."""
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        return "unknown"

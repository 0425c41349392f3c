"""Dashboard settings, from flags, the environment (`FLEET_DASHBOARD_…`) and TOML; roles of accounts."""

import ipaddress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from pydantic import ValidationInfo, field_validator

from fleet_admin.settings import AdminSettings
from fleet_common.metrics import ListenAddress
from fleet_common.settings import setting
from schemas.names import Name


class AccountRole(StrEnum):
    """What an account may do.

    Attributes:
        VIEWER: Read everything, change nothing but its own password.
        OPERATOR: Also act on devices, settings and alerts.
    """

    VIEWER = "viewer"
    OPERATOR = "operator"

    def includes(self, other: "AccountRole") -> bool:
        return self is AccountRole.OPERATOR or other is AccountRole.VIEWER


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who makes a request; `by` is `login` or `proxy`, `address` the browser's."""

    name: str
    role: AccountRole
    by: str
    address: str


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class DashboardSettings(AdminSettings):
    variable_prefix: ClassVar[str] = "FLEET_DASHBOARD_"

    name: Name = setting("dashboard", "Name of this monitor; its identity at the broker, used by no other program.")
    steer: bool = setting(
        False,  # noqa: FBT003 - a default
        "Whether to connect to the broker as a monitor, so that operators can change settings and send commands.",
    )
    db: str = setting(
        "sqlite:///fleet.sqlite3",
        "URL of the session log: `sqlite:///PATH` or `postgresql://USER@HOST/NAME`.",
        in_errors=False,
        min_length=1,
    )
    names: str = setting(
        "",
        "Host names and addresses of the pages, separated by commas, in addition to this machine's own. Requests "
        "under other names are refused.",
    )
    alerts: Path | None = setting(None, "TOML file of alert settings, with the webhook (docs/alerts.md).")
    https_certificate: Path | None = setting(
        None, "Certificate, its chain and its key (PEM, one file) for HTTPS; without it the pages use HTTP."
    )
    proxies: str = setting(
        "",
        "Trusted reverse proxies (X-Forwarded-For, X-Forwarded-Proto): addresses or networks, separated by commas.",
        rare=True,
    )
    proxy_account: str = setting(
        "",
        "Header with the user that a proxy has authenticated, such as X-Forwarded-User; empty for none.",
        rare=True,
    )
    listen: str = setting(
        "127.0.0.1:8400",
        "Address and port of the pages. Beyond this machine, HTTPS (`https_certificate`) or a proxy is needed.",
    )

    @field_validator("proxies")
    @classmethod
    def _networks(cls, proxies: str) -> str:
        networks(proxies)
        return proxies

    @field_validator("proxy_account")
    @classmethod
    def _from_proxies(cls, header: str, seen: ValidationInfo) -> str:
        if header and not seen.data.get("proxies", header):
            raise ValueError("any client could send that header; set 'proxies' too")
        return header

    # Declared after all fields that it depends on.
    @field_validator("listen")
    @classmethod
    def _protected(cls, listen: str, seen: ValidationInfo) -> str:
        """Refuse to send passwords unencrypted over a network."""
        known = seen.data
        if ListenAddress.read(listen).loopback:
            return listen
        if known.get("https_certificate") is None and not known.get("proxies"):
            raise ValueError(
                "other machines reach that address, and passwords would pass over the network in the clear; set "
                "'https_certificate', or 'proxies' that do TLS, or listen on 127.0.0.1"
            )
        if not known.get("names"):
            raise ValueError(
                "other machines reach that address; set 'names' to those under which browsers ask for the pages, so "
                "that no page of another name can read them"
            )
        return listen

    def allowed_names(self) -> frozenset[str]:
        return frozenset(each.strip().lower() for each in self.names.split(",") if each.strip())

    def trusted(self) -> tuple[Network, ...]:
        return networks(self.proxies)


def networks(text: str) -> tuple[Network, ...]:
    """Parse addresses and networks between commas; raises ValueError."""
    found = []
    for each in filter(None, (part.strip() for part in text.split(","))):
        try:
            found.append(ipaddress.ip_network(each, strict=False))
        except ValueError:
            raise ValueError(f"{each[:60]!r} is neither an address nor a network") from None
    return tuple(found)

"""Identity roles, and the names that are reserved for them.

The broker grants rights by name alone: a device with an edge's name could read every draft of the fleet. Two rules
keep the roles apart. A word that names a role is reserved for that role, and a name that was given to one role is never
given to another (`fleet_common.identity.index` records them).
"""

from enum import StrEnum
from typing import Final

from fleet_common.identity.errors import NameRefused
from schemas.names import check_name


class IdentityRole(StrEnum):
    """Purpose of a certificate: the organizational unit of its subject."""

    DEVICE = "device"
    EDGE = "edge"
    MONITOR = "monitor"
    BRIDGE = "bridge"  # one broker as another's client
    BROKER = "broker"  # the only one that is a server

    @property
    def is_server(self) -> bool:
        """Whether the certificate is a TLS server's."""
        return self is IdentityRole.BROKER


# A reader of a log takes `edge`, `edge-1` or `edge.north` for an edge.
_RESERVED: Final = (IdentityRole.EDGE, IdentityRole.MONITOR, IdentityRole.BRIDGE, IdentityRole.BROKER)
_SEPARATORS: Final = "-._"


def folded(name: str) -> str:
    """Return the form in which names are compared: people confuse names that differ in case only."""
    return name.casefold()


def probe_name(edge: str) -> str:
    """Return the device name that `fleet edge selftest` uses."""
    return f"probe-{edge}"


def check_identity_name(name: str, role: IdentityRole) -> str:
    """Return `name` if an identity of this role may have it.

    Raises:
        InvalidName: The name is malformed.
        NameRefused: The name is reserved for another role.
    """
    check_name(name)
    for owner in _RESERVED:
        same_word = folded(name) == owner or folded(name).startswith(tuple(owner + mark for mark in _SEPARATORS))
        if same_word and role is not owner:
            raise NameRefused(
                f"The name {name!r} is reserved: a name that begins with '{owner}' belongs to {_article(owner)}; "
                f"choose another for {_article(role)}."
            )
    return name


def _article(role: IdentityRole) -> str:
    return f"an {role}" if role[0] in "aeiou" else f"a {role}"

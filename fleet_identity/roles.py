"""Identity roles, and the names that are reserved for them.

The broker gives rights by name alone, so a name is a right: a device that got the name of an edge would read every
draft of the fleet. Two rules keep them apart: a word that says a role belongs to that role, and a name that was ever
given to one role is never given to another (`fleet_identity.index` remembers).
"""

from enum import StrEnum
from typing import Final

from fleet_identity.errors import NameRefused
from schemas.names import check_name

__all__ = ["IdentityRole", "check_identity_name", "folded", "probe_name"]


class IdentityRole(StrEnum):
    """What a certificate is for; its subject's organizational unit says it."""

    DEVICE = "device"
    EDGE = "edge"
    MONITOR = "monitor"
    BRIDGE = "bridge"  # one broker as another's client
    BROKER = "broker"  # the only one that is a server

    @property
    def is_server(self) -> bool:
        """Whether it is presented by the one who is connected to."""
        return self is IdentityRole.BROKER


# `edge`, `edge-1`, `edge.north`: whoever reads such a name in a log believes it.
_RESERVED: Final = (IdentityRole.EDGE, IdentityRole.MONITOR, IdentityRole.BRIDGE, IdentityRole.BROKER)
_SEPARATORS: Final = "-._"


def folded(name: str) -> str:
    """Return the form in which names are compared: two that differ in case alone would be taken for one by people."""
    return name.casefold()


def probe_name(edge: str) -> str:
    """Return the name of an edge's probe: the device as which `fleet edge selftest` asks."""
    return f"probe-{edge}"


def check_identity_name(name: str, role: IdentityRole) -> str:
    """Return `name` if an identity of this role may have it.

    Raises:
        InvalidName: It cannot be a name at all.
        NameRefused: It is reserved for another role.
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

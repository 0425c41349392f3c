"""Roles: who may look, and who may also act."""

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What an account or a key may do.

    Attributes:
        VIEWER: Look at everything, change nothing but its own password.
        OPERATOR: Also act on devices, settings, alerts and its own keys.
    """

    VIEWER = "viewer"
    OPERATOR = "operator"

    def includes(self, other: "Role") -> bool:
        """Whether this role may do all that the other may."""
        return self is Role.OPERATOR or other is Role.VIEWER


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who makes a request.

    Attributes:
        name: The account's.
        role: Its role, or its key's if that is less.
        by: How it was recognised: `login`, `key` or `proxy`.
        address: The browser's or the program's, as far as it is known.
    """

    name: str
    role: Role
    by: str
    address: str

"""Fence records: devices that are shut out, and let in again."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final

ADMINISTRATOR: Final = "the administrator"
"""Who fences or lifts, where it is no edge. Its spaces keep it apart from the name of any edge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFenced:
    """A device is shut out for a while: edges drop what it sends.

    Attributes:
        device: Which.
        by: The edge that fenced it, or `ADMINISTRATOR`. Of several fences by one of them the latest holds; of fences
            by several, the one that ends last.
        at: Since when (UTC, aware).
        until: Until when (UTC, aware); None: until it is lifted.
        reason: Why, in a sentence.
        strikes: That led to it; 0 if none did.
        level: How often the time has doubled.
    """

    device: str
    by: str
    at: datetime
    until: datetime | None
    reason: str
    strikes: int
    level: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceLifted:
    """All fences of a device, by whomever, that begin at `at` or before are over.

    Attributes:
        device: Which.
        by: Who lifted them: an edge or `ADMINISTRATOR`.
        at: When (UTC, aware).
    """

    device: str
    by: str
    at: datetime

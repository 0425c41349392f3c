"""Ranges of time that pages look back over: one picker for all of them."""

from datetime import timedelta
from typing import Final

from fleet_admin.dashboard.errors import Problem

RANGES: Final[tuple[tuple[str, str], ...]] = (
    ("1h", "1 hour"),
    ("6h", "6 hours"),
    ("24h", "24 hours"),
    ("7d", "7 days"),
    ("30d", "30 days"),
    ("365d", "1 year"),
)
"""As the address has them, and in words."""

DEFAULT_RANGE: Final = "24h"

_LENGTHS: Final = {
    "1h": timedelta(hours=1),
    "6h": timedelta(hours=6),
    "24h": timedelta(hours=24),
    "7d": timedelta(days=7),
    "30d": timedelta(days=30),
    "365d": timedelta(days=365),
}


def range_of(text: str) -> tuple[str, timedelta]:
    """Return a range as the address has it, and how long it is.

    Raises:
        Problem: There is none of that name.
    """
    name = text or DEFAULT_RANGE
    length = _LENGTHS.get(name)
    if length is None:
        raise Problem(400, f"There is no range {name[:20]!r}; there are {', '.join(_LENGTHS)}.")
    return name, length

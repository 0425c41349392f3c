"""Points in time as people give them: an age such as `2h`, or an ISO 8601 time."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

__all__ = ["read_time"]

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST_SHOWN: Final = 60


def read_time(value: str | datetime | timedelta, *, now: datetime) -> datetime:
    """Return the point in time that is meant, in UTC.

    Args:
        value: An age (`90s`, `30m`, `2h`, `7d`, or a timedelta), an ISO 8601 text, or a datetime. Without a time zone
            UTC is assumed.
        now: What an age is counted back from (aware).

    Raises:
        ValueError: It is none of these, or lies outside the calendar.
    """
    try:
        if isinstance(value, timedelta):
            return (now - value).astimezone(UTC)
        if isinstance(value, str):
            if age := re.fullmatch(r"(\d{1,9})([smhd])", value.strip(), re.ASCII):
                return now - timedelta(seconds=int(age[1]) * _UNITS[age[2]])
            value = datetime.fromisoformat(value.strip())
        return (value.replace(tzinfo=UTC) if value.tzinfo is None else value).astimezone(UTC)
    except (ValueError, OverflowError):
        shown = "".join(each if each.isprintable() else "?" for each in str(value)[:_LONGEST_SHOWN])
        raise ValueError(f"{shown!r} is neither an age such as 2h or 7d nor an ISO 8601 time.") from None

"""Points in time and durations as people give them: an age such as `2h`, or an ISO 8601 time."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from schemas.printable import printable_line

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST_SHOWN: Final = 60
_AMOUNT: Final = re.compile(r"(\d{1,9})([smhd])", re.ASCII)


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
            if age := _AMOUNT.fullmatch(value.strip()):
                return now - _seconds(age)
            value = datetime.fromisoformat(value.strip())
        return (value.replace(tzinfo=UTC) if value.tzinfo is None else value).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{_shown(value)!r} is neither an age such as 2h or 7d nor an ISO 8601 time.") from None


def read_duration(value: str | timedelta) -> timedelta:
    """Return the duration that is meant.

    Args:
        value: `90s`, `30m`, `2h`, `7d`, or a timedelta.

    Raises:
        ValueError: It is none of these, or not above zero.
    """
    length = value if isinstance(value, timedelta) else timedelta()
    if isinstance(value, str) and (amount := _AMOUNT.fullmatch(value.strip())):
        length = _seconds(amount)
    if length <= timedelta():
        raise ValueError(f"{_shown(value)!r} is no duration such as 90s, 30m, 2h or 7d.")
    return length


def _seconds(amount: re.Match[str]) -> timedelta:
    return timedelta(seconds=int(amount[1]) * _UNITS[amount[2]])


def _shown(value: object) -> str:
    return printable_line(str(value)[:_LONGEST_SHOWN])

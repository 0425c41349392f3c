"""Periods as an administrator names them: `today`, `7d`, `2026-11`, `FROM..TO`."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from fleet_cli.errors import CommandError
from fleet_cli.tables import cell
from fleet_runtime.times import read_time

__all__ = ["Period", "read_period"]

_DAY: Final = timedelta(days=1)
_MONTH: Final = re.compile(r"(\d{4})-(\d{2})", re.ASCII)
_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_HELP: Final = "today, yesterday, this-week, last-week, this-month, last-month, 2026-11, 2026-11-03, 7d, or FROM..TO"


@dataclass(frozen=True, slots=True)
class Period:
    """A time from `since` until, but not including, `until` (UTC).

    Attributes:
        name: As it was given.
        since: Its beginning.
        until: Its end.
    """

    name: str
    since: datetime
    until: datetime

    @property
    def hours(self) -> float:
        """Its length."""
        return (self.until - self.since) / timedelta(hours=1)


def read_period(text: str, *, now: datetime) -> Period:
    """Return the period that is meant; none ends after `now`.

    Args:
        text: Its name; the parts of `FROM..TO` are ages or ISO 8601 times, TO may be `now`.
        now: The time (aware).

    Raises:
        CommandError: It is none.
    """
    since, until = _limits(text.strip(), now.astimezone(UTC))
    until = min(until, now)
    if since >= until:
        raise CommandError(f"The period {cell(text)!r} is empty or has not begun; take {_HELP}.")
    return Period(text.strip(), since, until)


def _limits(text: str, now: datetime) -> tuple[datetime, datetime]:
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    week, month = today - today.weekday() * _DAY, today.replace(day=1)
    named = {
        "today": (today, now),
        "yesterday": (today - _DAY, today),
        "this-week": (week, now),
        "last-week": (week - 7 * _DAY, week),
        "this-month": (month, now),
        "last-month": ((month - _DAY).replace(day=1), month),
    }
    if text in named:
        return named[text]
    try:
        if found := _MONTH.fullmatch(text):
            begin = datetime(int(found[1]), int(found[2]), 1, tzinfo=UTC)
            return begin, (begin + 31 * _DAY).replace(day=1)
        if _DATE.fullmatch(text):
            begin = datetime.fromisoformat(text).replace(tzinfo=UTC)
            return begin, begin + _DAY
        begin_text, dots, end_text = text.partition("..")
        end = now if not dots or end_text in {"", "now"} else read_time(end_text, now=now)
        return read_time(begin_text, now=now), end
    except (ValueError, OverflowError):
        raise CommandError(f"{cell(text)!r} is no period: take {_HELP}.") from None

"""Periods as an administrator names them: `today`, `7d`, `2026-11`, `FROM..TO`."""

import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Final

from fleet_cli.errors import CommandError
from fleet_cli.tables import cell
from fleet_common.validation import read_time

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
        until: Its end, or now if it goes on.
        goes_on: Whether it has a later end.
    """

    name: str
    since: datetime
    until: datetime
    goes_on: bool = False

    @property
    def hours(self) -> float:
        return (self.until - self.since) / timedelta(hours=1)


def read_period(text: str, *, now: datetime) -> Period:
    """Return the period that is meant; none ends after `now`.

    Args:
        text: Its name; the parts of `FROM..TO` are ages or ISO 8601 times, TO may be `now`.
        now: The time (aware).

    Raises:
        CommandError: It is none.
    """
    since, end = _limits(text.strip(), now.astimezone(UTC))
    until = min(end, now)
    if since >= until:
        raise CommandError(f"The period {cell(text)!r} is empty or has not begun; take {_HELP}.")
    return Period(text.strip(), since, until, goes_on=end > now)


def equal_parts(one: Period, other: Period) -> tuple[Period, Period]:
    """Cut a period that is over to the length of one that goes on, so that last week ends where this week has come."""
    if one.goes_on and not other.goes_on:
        return one, _cut(other, one.until - one.since)
    if other.goes_on and not one.goes_on:
        return _cut(one, other.until - other.since), other
    return one, other


def _cut(period: Period, length: timedelta) -> Period:
    return replace(period, until=min(period.until, period.since + length))


def _limits(text: str, now: datetime) -> tuple[datetime, datetime]:
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    week, month = today - today.weekday() * _DAY, today.replace(day=1)
    named = {
        "today": (today, today + _DAY),
        "yesterday": (today - _DAY, today),
        "this-week": (week, week + 7 * _DAY),
        "last-week": (week - 7 * _DAY, week),
        "this-month": (month, (month + 31 * _DAY).replace(day=1)),
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

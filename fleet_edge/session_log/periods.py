"""Minutes, hours, days and months in UTC."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


class Grain(StrEnum):
    MINUTE = "minute"
    FIVE_MINUTES = "5-minutes"
    HOUR = "hour"
    DAY = "day"
    MONTH = "month"


MINUTES: Mapping[Grain, timedelta] = {Grain.MINUTE: timedelta(minutes=1), Grain.FIVE_MINUTES: timedelta(minutes=5)}
"""Grains that are not rolled up: they are read from segments."""

_LENGTHS: Mapping[Grain, timedelta] = {**MINUTES, Grain.HOUR: HOUR, Grain.DAY: DAY}


def floor(grain: Grain, at: datetime) -> datetime:
    begun = at.astimezone(UTC)
    if grain is Grain.MONTH:
        return begun.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return begun - (begun - BEGINNING) % _LENGTHS[grain]


def following(grain: Grain, start: datetime) -> datetime:
    return (start + timedelta(days=32)).replace(day=1) if grain is Grain.MONTH else start + _LENGTHS[grain]


def ceiling(grain: Grain, at: datetime) -> datetime:
    begun = floor(grain, at)
    return begun if begun == at else following(grain, begun)


BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
"""Earlier than any session."""

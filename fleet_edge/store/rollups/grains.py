"""Grains of time that rollups are made by: hour, day and month, each beginning in UTC."""

from datetime import UTC, datetime, timedelta
from enum import StrEnum

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)


class Grain(StrEnum):
    """A length of time."""

    HOUR = "hour"
    DAY = "day"
    MONTH = "month"


def floor(grain: Grain, at: datetime) -> datetime:
    """Return when the hour, day or month of a time (aware) has begun, in UTC."""
    begun = at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    if grain is Grain.HOUR:
        return begun
    return begun.replace(hour=0) if grain is Grain.DAY else begun.replace(hour=0, day=1)


def following(grain: Grain, start: datetime) -> datetime:
    """Return when the hour, day or month after the one that begins at `start` begins."""
    if grain is Grain.HOUR:
        return start + HOUR
    if grain is Grain.DAY:
        return start + DAY
    return (start + timedelta(days=32)).replace(day=1)


def ceiling(grain: Grain, at: datetime) -> datetime:
    """Return the first beginning of an hour, day or month at or after a time."""
    begun = floor(grain, at)
    return begun if begun == at else following(grain, begun)

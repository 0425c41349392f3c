"""A segment's number is the instant of its Open, in UTC microseconds: it orders, dates and keys at once."""

from datetime import UTC, datetime, timedelta
from typing import Final

__all__ = ["segment_number", "segment_time"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


def segment_number(at: datetime) -> int:
    """Return a segment's number: UTC microseconds at its Open."""
    return (at - _EPOCH) // _MICROSECOND


def segment_time(segment: int) -> datetime:
    """Return when a segment was opened (UTC)."""
    return _EPOCH + segment * _MICROSECOND

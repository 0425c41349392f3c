"""Segment records: what an edge counts of a session between an Open and the next, its rounds, and how it left it.

A segment's number is the instant of its Open, in UTC microseconds: it orders, dates and keys at once.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final

from fleet_edge.counters import SegmentCounters

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


def segment_number(at: datetime) -> int:
    """Return a segment's number: UTC microseconds at its Open."""
    return (at - _EPOCH) // _MICROSECOND


def segment_time(segment: int) -> datetime:
    """Return when a segment was opened (UTC)."""
    return _EPOCH + segment * _MICROSECOND


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentProgress(SegmentCounters):
    """What the edge has counted in a segment so far. Absolute values that never fall.

    Attributes:
        session: As opened.
        segment: As opened.
        at: When this was so (UTC, aware).
        device: As opened.
        first_token_ms: From the Open to the first committed token, once there is one.
        gap_p95_ms: 95th percentile of the time between two tokens, once there are two verdicts.
    """

    session: str
    segment: int
    device: str
    at: datetime
    first_token_ms: float | None = None
    gap_p95_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundJudged:
    """One verdict, for traced sessions only; of what a device asks the edge to write, the first of each request.

    Attributes:
        session: As opened.
        segment: As opened.
        round: Number of the draft.
        base: Tokens committed before it.
        drafted: Tokens in the draft.
        tested: Of these, accepted or rejected.
        accepted: Of these, accepted.
        batch: Sessions verified in the same step, this one counted in.
        uplink_bytes: Payload of the draft.
        downlink_bytes: Payload of the verdict.
        form: What `next` of the verdict was: `token`, `sparse`, `samples`, `dense`, or None for nothing; `written`
            where the edge writes by itself.
        queue_ms: From arrival to the step, less `prefill_ms`.
        compute_ms: Of the step.
        at: When (UTC, aware).
        prefill_ms: From arrival to the step, spent in steps that computed the session's own prompt or text.
        device: As opened.
    """

    session: str
    segment: int
    device: str
    round: int
    base: int
    drafted: int
    tested: int
    accepted: int
    batch: int
    uplink_bytes: int
    downlink_bytes: int
    form: str | None
    queue_ms: float
    compute_ms: float
    at: datetime
    prefill_ms: float


class LeaveReason(StrEnum):
    """Why a segment ended although its session did not."""

    HANDED_OVER = "handed-over"  # the edge shut down; the device resumes elsewhere, or here when the edge is back
    RESUMED = "resumed"  # the device has opened the session again


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentLeft:
    """A segment ended, and the session goes on: it stays open until a later segment closes it.

    Attributes:
        session: As opened.
        segment: As opened.
        reason: Why.
        at: When (UTC, aware). Of several ends of one segment the latest wins.
        device: As opened.
    """

    session: str
    segment: int
    device: str
    reason: LeaveReason
    at: datetime

"""Records: what an edge writes to the session log.

A record is the values that one happening gives to rows of some tables, and its time (UTC, aware). It is merged by the
rules of the tables' columns, idempotently and in any order (see `merge`), so it can be spooled and replayed freely: a
counter is absolute, a state carries its time, a round has its key.

A session is identified by its id together with its device, so that no device can create, change or end another's
session. It has one *segment* for each time that an edge opened or resumed it. Counters belong to the segment; a
restarted edge starts a new one from zero, and totals are sums. A segment's number is the instant of its Open, in UTC
microseconds.
"""

import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from fleet_edge.session_log.event_codes import Severity, severity_of
from fleet_edge.session_log.periods import BEGINNING
from fleet_edge.session_log.rules import Values
from fleet_edge.session_log.views import DeviceCounters, QuarantineView
from schemas.reasons import EndReason

ADMINISTRATOR: Final = "the administrator"
"""Author of a quarantine that no edge has imposed. No edge can have this name, because it contains spaces."""


SESSIONS_DAYS: Final = 365.0
"""Default retention of sessions, in days."""

FOR_GOOD: Final = 2**63 - 1
"""Segment that ends a session by its device: no later one opens it again, whatever the clocks of edges say."""

_MICROSECOND: Final = timedelta(microseconds=1)


def segment_number(at: datetime) -> int:
    return (at - BEGINNING) // _MICROSECOND


def segment_time(segment: int) -> datetime:
    return BEGINNING + segment * _MICROSECOND


def minute_of(at: datetime) -> int:
    """Return the number of a time's minute since 1970."""
    return (at - BEGINNING) // timedelta(minutes=1)


class LeaveReason(StrEnum):
    """Why a segment ended although its session did not."""

    HANDED_OVER = "handed-over"  # the edge shut down; the device resumes elsewhere, or here when the edge is back
    RESUMED = "resumed"  # the device has opened the session again


@dataclass(frozen=True, slots=True)
class Record:
    """Values of rows by table, with their keys. `at` also says when their device and edge were heard."""

    at: datetime
    rows: Mapping[str, Values] = field(hash=False)


def loading_record(edge: str, percent: int, at: datetime) -> Record:
    """Return the record of an edge that loads its target model; how its last run ended stays."""
    return Record(at, {"edges": {"edge": edge, "loading": percent, "loading_at": at}})


_OF_SEGMENT: Final = ("edge", "app", "draft_model", "quantization", "target", "target_id")


def open_record(key: Values, at: datetime, *, resumed_tokens: int, open_bytes: int, **described: Any) -> Record:  # noqa: ANN401
    """Return the record of a granted Open or resume: a segment begins, and its session if it is the first.

    `described` are columns of `sessions`.
    """
    own = {name: described[name] for name in _OF_SEGMENT}
    of_session: dict[str, Any] = {"described_by": key["segment"], "edge_segment": key["segment"], **described}
    return Record(
        at,
        {
            "segments": {**key, **own, "resumed_tokens": resumed_tokens, "open_bytes": open_bytes},
            "sessions": {"session": key["session"], "device": key["device"], **of_session},
        },
    )


def close_record(
    key: Values,
    at: datetime,
    *,
    reason: EndReason,
    tokens: int,
    counters: DeviceCounters | None,
    code: str | None = None,
    sentence: str | None = None,
) -> Record:
    """Return the record of a session's end: with its segment, unless a later one exists, or by its device for good.

    `tokens` are of the whole session, as its device closed it, or as the edge has committed it. `counters` are the
    device's own; None if no Close came.
    """
    end: dict[str, Any] = {"end_segment": key["segment"] if counters is None else FOR_GOOD, "closed_at": at}
    end |= _end(reason=reason, tokens=tokens, counters=counters, code=code, sentence=sentence)
    return Record(
        at,
        {
            "segments": {**key, "reason": reason, "closed_at": at},
            "sessions": {"session": key["session"], "device": key["device"], **end},
        },
    )


def report_record(
    session: str,
    device: str,
    at: datetime,
    *,
    reason: EndReason,
    tokens: int,
    counters: DeviceCounters,
    code: str | None = None,
    sentence: str | None = None,
    app: str | None = None,
) -> Record:
    """Return the record of a Close of a session that the edge does not serve, having restarted, or that never existed.

    It ends the device's session of that id for good, if one was granted. Until then it waits in a table of its own and
    creates no session; only a sequence that the device generated without an edge is a session at once.
    """
    row: dict[str, Any] = {"session": session, "device": device, "closed_at": at}
    row |= _end(reason=reason, tokens=tokens, counters=counters, code=code, sentence=sentence)
    if not counters.unverified:
        return Record(at, {"reported_closes": row})
    opened_at = at - timedelta(milliseconds=counters.wall_ms)
    more = {"opened_at": opened_at, "last_at": at, "end_segment": FOR_GOOD, "described_by": FOR_GOOD, "app": app}
    return Record(at, {"sessions": row | more})


def _end(
    *, reason: EndReason, tokens: int, counters: DeviceCounters | None, code: str | None, sentence: str | None
) -> dict[str, Any]:
    why: dict[str, Any] = {"reason": reason, "tokens": tokens, "end_code": code, "end_sentence": sentence}
    return why | ({} if counters is None else {f"device_{name}": value for name, value in asdict(counters).items()})


def event_record(
    at: datetime,
    *,
    kind: str,
    code: str,
    sentence: str,
    id: str = "",  # noqa: A002 - as the column
    edge: str = ADMINISTRATOR,
    device: str | None = None,
    session: str | None = None,
    count: int = 1,
    last_at: datetime | None = None,
    who: str | None = None,
    severity: Severity | None = None,
) -> Record:
    """Return the record of an event that has happened `count` times; `event_codes` lists kinds and codes.

    `id` is unique for good, by default random, so that a replay adds nothing. Records of one id differ only in `count`
    and `last_at`, and the greatest of each is kept. What all edges see has the same id from each of them. `session` is
    the first that it concerns, `severity` by default that of `event_codes`.
    """
    row: dict[str, Any] = {
        "id": id or uuid.uuid4().hex,
        "edge": edge,
        "device": device,
        "session": session,
        "kind": kind,
        "code": code,
    }
    row |= {"sentence": sentence, "at": at, "count": count, "last_at": last_at or at, "who": who}
    return Record(at, {"events": row | {"severity": severity or severity_of(kind, code)}})


def quarantine_record(quarantine: QuarantineView) -> Record:
    """Return the record of a quarantine. The latest by one `by` counts; of several `by`, the one that ends last."""
    return Record(quarantine.since_at, {"quarantines": asdict(quarantine)})


def lift_record(device: str, by: str, at: datetime) -> Record:
    """Return the record of a lift: all quarantines of a device, by any edge, that begin at `at` or before are over."""
    return Record(at, {"quarantine_lifts": {"device": device, "lifted_at": at, "lifted_by": by}})

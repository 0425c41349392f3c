"""Housekeeping of the session log: purges, lost sessions; jobs call these regularly.

A wrong clock must delete nothing: `read_log_time` says by which time rows are old. All of it may run twice, in two
processes, or be interrupted: the next run does the rest. Rows are deleted in short transactions with pauses between
them, so that a writer never waits for long. The database reuses what they free.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Final

from sqlalchemy import ColumnElement, Engine, Table, and_, delete, func, or_, select, tuple_

from fleet_edge.session_log.database import Store
from fleet_edge.session_log.engine import CLOCKS_DIFFER, database_now, insert_into, replacing
from fleet_edge.session_log.periods import BEGINNING, Grain, ceiling
from fleet_edge.session_log.records import close_record, minute_of
from fleet_edge.session_log.tables import (
    DISTRIBUTIONS,
    EDGE_LOADS,
    PURGES,
    QUARANTINE_LIFTS,
    QUARANTINES,
    REPORTED_CLOSES,
    ROLLUPS,
    SEGMENTS,
    SESSIONS,
)
from schemas.reasons import EndReason

_STEP_S: Final = (
    0.03  # meant for one transaction: a third of what a writer may wait, on a machine that does other things
)
_MIN_REST_S: Final = 0.03  # SQLite's waiting writer looks again every 25 ms at first
_MIN_CHUNK: Final = 20
_KEPT_MINUTE: Final = 10  # each tenth minute's load of an edge is kept

_SETTLED: Final = timedelta(days=30)
"""Age of a gap in the log from which it counts as time that has passed. A clock that is wrong is noticed before."""

_LONG: Final = timedelta(days=7)  # a gap that is reported as long as it counts; one of a weekend only at first

_AWAKE: Final = timedelta(minutes=5)  # edges report their load every ten seconds


@dataclass(frozen=True, slots=True)
class LogTime:
    """The time as the log knows it.

    Attributes:
        at: Time by which rows are old; None if nothing may be deleted.
        awake: An edge has reported its load within minutes before the clock's time.
        doubt: Why the clock may be wrong, and what to do; empty if nothing says so.
    """

    at: datetime | None
    awake: bool = True
    doubt: str = ""


def read_log_time(engine: Engine, *, now: datetime) -> LogTime:
    """Compare this machine's clock (`now`, aware) with the database's and with the records.

    A clock that was set forward and edges that were off for as long leave the same gap in the log. So the time of a gap
    does not count as passed before edges have run for `_SETTLED` after it. Records after `now` are left out: they are
    of a clock that was ahead, and a purge by the earlier time deletes less.
    """
    minute, since = EDGE_LOADS.c.minute, minute_of(now - _SETTLED)
    with engine.connect() as connection:
        database = database_now(connection)
        minutes = set(connection.scalars(select(minute).distinct().where(minute > since, minute <= minute_of(now))))
        minutes.add(connection.scalar(select(func.max(minute)).where(minute <= since)))
        ended = connection.scalar(select(func.max(SESSIONS.c.last_at)).where(SESSIONS.c.last_at <= now))
        latest = connection.scalar(select(func.max(minute)))
    if database is not None and abs(now - database) > CLOCKS_DIFFER:
        return LogTime(None, doubt=f"{_says(now)} and the database's {_time(database)}; {_SET} {_NOTHING}")
    points = sorted({BEGINNING + timedelta(minutes=each) for each in minutes if each is not None} | {ended or now, now})
    points = points[max(0, sum(each <= now - _SETTLED for each in points) - 1) :]  # from the last one of before
    gaps = [(begin, end) for begin, end in pairwise(points) if end - begin > CLOCKS_DIFFER]
    at = now - sum((end - begin for begin, end in gaps), timedelta())
    awake = len(points) == 1 or now - points[-2] < _AWAKE
    if latest is not None and (ahead := BEGINNING + timedelta(minutes=latest)) - now > CLOCKS_DIFFER:
        return LogTime(at, awake, f"{_says(now)} and the log has records of {_time(ahead)}; {_SET}")
    reported = [(begin, end) for begin, end in gaps if end - begin > _LONG or now - end < CLOCKS_DIFFER]
    if not reported:
        return LogTime(at, awake)
    begin, end = reported[-1]
    doubt = (
        f"{_says(now)} and the log has no records between {_time(begin)} and {_time(end)}; if edges ran then, {_SET} "
        f"Until {_time(end + _SETTLED)} that time does not count as passed when old rows are deleted."
    )
    return LogTime(at, awake, doubt)


_SET: Final = "set the clock that is wrong (timedatectl)."
_NOTHING: Final = "Nothing is deleted until they agree."


def _says(now: datetime) -> str:
    return f"The clock of the edge's machine says {_time(now)}"


def _time(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def rest_not(seconds: float) -> None:
    """Continue at once: nothing else is being written."""
    del seconds


@dataclass(frozen=True, slots=True)
class Pace:
    """Size of the transactions of a purge, and when it pauses or ends.

    At most `chunk` rows in one transaction, fewer where that takes long. Between transactions, `enough` says whether to
    leave the rest to the next run, and `pause` waits for a number of seconds, or until stopped.
    """

    chunk: int
    enough: Callable[[], bool] = lambda: False
    pause: Callable[[float], object] = rest_not


def delete_rows(engine: Engine, table: Table, condition: ColumnElement[bool], pace: Pace) -> int:
    """Delete the rows of a table that meet a condition; return their number."""
    key = list(table.primary_key)
    total, size = 0, pace.chunk if pace.pause is rest_not else min(pace.chunk, 5 * _MIN_CHUNK)
    while True:
        begun = time.perf_counter()
        old = select(*key).where(condition).limit(size)
        with engine.begin() as connection:
            deleted = connection.execute(delete(table).where(tuple_(*key).in_(old))).rowcount
        taken = time.perf_counter() - begun
        total += deleted
        if deleted < size or pace.enough():
            return total
        if pace.pause is not rest_not:
            wanted = int(min(_STEP_S / max(taken, 1e-3), 2.0) * size)
            size = min(max(wanted, _MIN_CHUNK), pace.chunk)
            pace.pause(max(taken, _MIN_REST_S))


def close_abandoned(store: Store, *, now: datetime, abandoned_after: timedelta, limit: int = 1000) -> int:
    """Close as `lost` what an edge left open when it died, and no device resumed; return the number."""
    old = (
        select(SESSIONS.c.session, SESSIONS.c.device, SESSIONS.c.end_segment.label("segment"), SESSIONS.c.last_at)
        .where(SESSIONS.c.reason.is_(None), SESSIONS.c.last_at < now - abandoned_after)
        .limit(limit)
    )
    with store.engine.connect() as connection:
        found = connection.execute(old).all()
        counted = select(SEGMENTS.c.session, SEGMENTS.c.segment, SEGMENTS.c.resumed_tokens, SEGMENTS.c.tokens)
        segments = connection.execute(counted.where(SEGMENTS.c.session.in_([row.session for row in found])))
        positions = {(row.session, row.segment): (row.resumed_tokens or 0) + row.tokens for row in segments}
    # Dated by the last record, so that the true end wins if it is only late.
    store.apply(
        [
            close_record(
                {"session": row.session, "segment": row.segment, "device": row.device},
                row.last_at,
                reason=EndReason.LOST,
                tokens=positions.get((row.session, row.segment), 0),
                counters=None,
                code="abandoned",
                sentence="No edge has recorded anything about the session for "
                f"{abandoned_after / timedelta(hours=1):g} hours.",
            )
            for row in found
        ]
    )
    return len(found)


def purge(engine: Engine, table: Table, *, before: datetime, pace: Pace) -> int:
    """Delete the old rows of a table that nothing else refers to: of rounds, events or commands."""
    return delete_rows(engine, table, table.c.at < before, pace)


def purge_loads(engine: Engine, *, thin_before: datetime, before: datetime, pace: Pace) -> int:
    """Delete old loads of edges, and of those before `thin_before` all but every tenth minute; return the number."""
    minute = EDGE_LOADS.c.minute
    thin = and_(minute < minute_of(thin_before), minute % _KEPT_MINUTE != 0)
    return delete_rows(engine, EDGE_LOADS, or_(minute < minute_of(before), thin), pace)


def purge_sessions(engine: Engine, *, before: datetime, pace: Pace) -> int:
    """Delete sessions without a record since `before`, with segments and rounds; return the number of sessions."""
    with engine.begin() as connection:
        insert = insert_into(PURGES, engine.dialect.name)
        rising = replacing(insert, where=insert.excluded.before > PURGES.c.before)
        connection.execute(rising, {"what": "segments", "before": ceiling(Grain.HOUR, before)})
    return delete_rows(engine, SESSIONS, SESSIONS.c.last_at < before, pace)


def purge_rollups(engine: Engine, *, before: datetime, pace: Pace) -> int:
    """Delete rollups of old hours and days; return the number."""
    return sum(delete_rows(engine, table, table.c.start < before, pace) for table in (ROLLUPS, DISTRIBUTIONS))


def purge_reported(engine: Engine, *, before: datetime, most: int, pace: Pace) -> int:
    """Delete old reported closes, and of each device all but the latest `most`; return the number."""
    deleted = delete_rows(engine, REPORTED_CLOSES, REPORTED_CLOSES.c.closed_at < before, pace)
    device = REPORTED_CLOSES.c.device
    with engine.connect() as connection:
        crowded = connection.scalars(select(device).group_by(device).having(func.count() > most)).all()
        for name in crowded:
            latest = select(REPORTED_CLOSES.c.closed_at).where(device == name)
            last = connection.scalar(latest.order_by(REPORTED_CLOSES.c.closed_at.desc()).offset(most - 1).limit(1))
            surplus = and_(device == name, REPORTED_CLOSES.c.closed_at < last)
            deleted += delete_rows(engine, REPORTED_CLOSES, surplus, pace)
    return deleted


def purge_quarantines(engine: Engine, *, before: datetime, pace: Pace) -> int:
    """Delete quarantines that ended or were lifted before a time, then lifts that nothing needs; return the number.

    A lift stays as long as a quarantine that it lifted.
    """
    lift = select(QUARANTINE_LIFTS.c.device).where(QUARANTINE_LIFTS.c.device == QUARANTINES.c.device)
    lifted = lift.where(
        QUARANTINE_LIFTS.c.lifted_at >= QUARANTINES.c.since_at, QUARANTINE_LIFTS.c.lifted_at < before
    ).exists()
    quarantines = delete_rows(engine, QUARANTINES, or_(QUARANTINES.c.until_at < before, lifted), pace)
    needed = select(QUARANTINES.c.device).where(QUARANTINES.c.device == QUARANTINE_LIFTS.c.device).exists()
    unneeded = and_(QUARANTINE_LIFTS.c.lifted_at < before, ~needed)
    return quarantines + delete_rows(engine, QUARANTINE_LIFTS, unneeded, pace)

"""Queries of an administrator on the session log.

Reads only. Every query is served by an index and bounded by a limit, but for `devices`, which has a row for each. What
adds up is in `totals`.
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from itertools import islice
from operator import attrgetter, itemgetter
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    Label,
    RowMapping,
    Select,
    Text,
    and_,
    cast,
    func,
    literal_column,
    or_,
    select,
    text,
)

from fleet_edge.store import totals
from fleet_edge.store.errors import NotFound, StoreError
from fleet_edge.store.event_codes import EventKind, Severity
from fleet_edge.store.periods import BEGINNING, DAY, HOUR, MINUTES, Grain, floor
from fleet_edge.store.quarantines import read_quarantines
from fleet_edge.store.records import minute_of, segment_time
from fleet_edge.store.rollups import SUMMED, Dimension, Scope
from fleet_edge.store.steering import read_labels
from fleet_edge.store.tables import (
    DEVICES,
    EDGE_LOADS,
    EDGES,
    EVENTS,
    ROLLUPS,
    ROUNDS,
    SEGMENTS,
    SESSIONS,
)
from fleet_edge.store.totals import by_row, tally
from fleet_edge.store.views import (
    DeviceColumns,
    DeviceView,
    EdgeColumns,
    EdgeView,
    EventCount,
    EventView,
    HourView,
    LoadView,
    MachineState,
    RoundView,
    SegmentColumns,
    SegmentView,
    SessionColumns,
    SessionView,
    Tally,
    device_state,
    edge_state,
)

_ID_LENGTH: Final = 16
_ALL: Final = 2**31
"""More rows than there are: SQLite has no OFFSET without LIMIT."""

_OF_DEVICE: Final = tuple(DEVICES.c[field.name] for field in fields(DeviceColumns))
_OF_EDGE: Final = tuple(EDGES.c[field.name] for field in fields(EdgeColumns))
_OF_SESSION: Final = tuple(field.name for field in fields(SessionColumns))
_OF_SEGMENT: Final = tuple(field.name for field in fields(SegmentColumns))


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionFilter:
    """Conditions on sessions, with aware times; fields left out admit all. `edge` is any that served the session."""

    devices: tuple[str, ...] = ()
    edge: str | None = None
    reason: str | None = None
    mode: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    open: bool = False
    draft_model: str | None = None


def devices(connection: Connection, *, now: datetime, counted: bool = True) -> list[DeviceView]:
    query = _devices().order_by(DEVICES.c.device)
    return _device_views(connection, query, now=now, names=None if counted else ())


def device(connection: Connection, name: str, *, now: datetime) -> DeviceView:
    """Return one device; raises `NotFound`."""
    found = _device_views(connection, _devices().where(DEVICES.c.device == name), now=now, names=(name,))
    if not found:
        raise NotFound(f"There is no device {name!r} in the session log; 'devices' lists those there are.")
    return found[0]


def sessions(connection: Connection, chosen: SessionFilter, *, limit: int) -> list[SessionView]:
    query = select(SESSIONS).where(*_conditions(chosen)).order_by(SESSIONS.c.opened_at.desc()).limit(limit)
    if chosen.edge is None:
        return _session_views(connection, connection.execute(query).mappings().all())
    # One index has the sessions that the edge served last, another the few that moved to other edges.
    last = connection.execute(query.where(SESSIONS.c.edge == chosen.edge)).mappings().all()
    own = (SEGMENTS.c.session == SESSIONS.c.session, by_row(SEGMENTS.c.device) == SESSIONS.c.device)
    served = select(SEGMENTS.c.session).where(*own, by_row(SEGMENTS.c.edge) == chosen.edge).exists()
    left = query.where(text("sessions.moved"), SESSIONS.c.edge != chosen.edge, served)
    both = heapq.merge(last, connection.execute(left).mappings().all(), key=itemgetter("opened_at"), reverse=True)
    return _session_views(connection, list(islice(both, limit)))


def session(connection: Connection, prefix: str, *, device: str | None = None) -> SessionView:
    """Return the session whose id begins with `prefix`; `device` is needed where two devices use the same id.

    Raises `NotFound` if there is none, `StoreError` if there are several.
    """
    wanted = prefix.lower()
    if not wanted or len(wanted) > _ID_LENGTH or set(wanted) - set("0123456789abcdef"):
        raise NotFound(f"{prefix[:40]!r} is not the beginning of a session id: 1 to 16 hexadecimal characters.")
    # "g" follows every hexadecimal digit; a range uses the key's index where LIKE does not.
    within = (SESSIONS.c.session >= wanted, SESSIONS.c.session < wanted + "g")
    query = select(SESSIONS).where(*within).order_by(SESSIONS.c.session, SESSIONS.c.device).limit(2)
    if device is not None:
        query = query.where(SESSIONS.c.device == device)
    rows = connection.execute(query).mappings().all()
    if not rows:
        raise NotFound(f"There is no session {prefix} in the session log; 'sessions' lists the latest.")
    if len(rows) > 1 and rows[0]["session"] == rows[1]["session"]:
        raise StoreError(f"Several devices have named a session {rows[0]['session']}; name the device.")
    if len(rows) > 1:
        raise StoreError(f"Several sessions begin with {prefix}; give more of its characters.")
    return _session_views(connection, rows)[0]


def ends(
    connection: Connection, reasons: Sequence[str], *, since: datetime | None = None, until: datetime | None = None
) -> dict[str, int]:
    """Return the number of sessions opened within a time by the reason of their end, of those that are kept."""
    found = {}
    for reason in reasons:  # one range of an index each
        query = select(func.count()).select_from(SESSIONS)
        of_time = _conditions(SessionFilter(reason=reason, since=since, until=until))
        found[reason] = int(connection.scalar(query.where(*of_time)) or 0)
    return found


def segments(connection: Connection, session: str, *, device: str) -> list[SegmentView]:
    """Return the segments of a device's session (full id), in order."""
    own = (SEGMENTS.c.session == session, SEGMENTS.c.device == device)
    query = select(SEGMENTS).where(*own).order_by(SEGMENTS.c.segment)
    return [
        SegmentView(
            opened_at=segment_time(row["segment"]),
            counted=tally(row, sessions=1, segments=1),
            **{name: row[name] for name in _OF_SEGMENT},
        )
        for row in connection.execute(query).mappings()
    ]


def rounds(
    connection: Connection, session: str, *, device: str, skip: int = 0, limit: int | None = None
) -> list[RoundView]:
    """Return the rounds of a device's session (full id), in order."""
    own = select(SEGMENTS.c.segment).where(SEGMENTS.c.session == session, SEGMENTS.c.device == device)
    chosen = (ROUNDS.c.session == session, ROUNDS.c.segment.in_(own))
    query = select(ROUNDS).where(*chosen).order_by(ROUNDS.c.segment, ROUNDS.c.round)
    if skip or limit is not None:
        query = query.offset(skip).limit(_ALL if limit is None else limit)
    return [
        RoundView(**{name: value for name, value in row.items() if name != "session"})
        for row in connection.execute(query).mappings()
    ]


def hours(connection: Connection, device: str, *, limit: int) -> list[HourView]:
    """Return what a device did in the latest hours in which it did something, the latest first."""
    rolled = select(ROLLUPS.c.start).where(ROLLUPS.c.device == device, ROLLUPS.c.scope == Scope.DETAIL)
    starts = connection.scalars(rolled.distinct().order_by(ROLLUPS.c.start.desc()).limit(limit)).all()
    first = starts[-1] if len(starts) == limit else None
    period = totals.UsageFilter(since=first, chosen={Dimension.DEVICE: (device,)})
    found = totals.usage(connection, period=period, grain=Grain.HOUR)
    views = [HourView(hour=view.start, counted=view.counted) for view in found if view.start is not None]
    return sorted(views, key=attrgetter("hour"), reverse=True)[:limit]


def latest(connection: Connection) -> datetime | None:
    heard = (SESSIONS.c.last_at, DEVICES.c.seen_at, EVENTS.c.at)
    times = (connection.scalar(select(func.max(column))) for column in heard)
    return max((each for each in times if each is not None), default=None)


def _devices() -> Select[Any]:
    of_device = SESSIONS.c.device == DEVICES.c.device
    columns: list[Any] = [
        *_OF_DEVICE,
        select(func.max(SESSIONS.c.opened_at)).where(of_device).scalar_subquery().label("last_session_at"),
        select(func.max(SESSIONS.c.last_at)).where(of_device).scalar_subquery().label("last_verdict_at"),
        select(SESSIONS.c.edge)
        .where(of_device)
        .order_by(SESSIONS.c.opened_at.desc())
        .limit(1)
        .scalar_subquery()
        .label("last_edge"),
    ]
    return select(*columns)


def _device_views(
    connection: Connection, query: Select[Any], *, now: datetime, names: Sequence[str] | None
) -> list[DeviceView]:
    """Complete devices by their latest sums, for those of `names` (None: all)."""

    def counted(since: datetime | None, *columns: str) -> dict[str | None, Tally]:
        if names is not None and not names:
            return {}
        period = totals.UsageFilter(since=since, chosen=None if names is None else {Dimension.DEVICE: names})
        found = totals.usage(connection, period=period, by=(Dimension.DEVICE,), columns=columns)
        return {view.device: view.counted for view in found}

    ever, today = counted(None), counted(floor(Grain.DAY, now), "tokens")
    hour, day = (counted(now - age, "tested", "accepted") for age in (HOUR, DAY))
    quarantines, labels = read_quarantines(connection, now=now).active, read_labels(connection)
    views = []
    for row in connection.execute(query).mappings():
        name = row["device"]
        last_sign = max(filter(None, (row["seen_at"], row["telemetry_at"], row["last_verdict_at"])))
        state = device_state(
            row["presence"],
            since_last_sign=now - last_sign,
            quarantined=name in quarantines,
            retired=row["retired_at"] is not None,
        )
        since = {
            MachineState.QUARANTINED: quarantines[name].since_at if name in quarantines else None,
            MachineState.RETIRED: row["retired_at"],
            MachineState.LATE: last_sign,
            MachineState.SILENT: last_sign,
        }
        views.append(
            DeviceView(
                state=state,
                state_since=since.get(state, row["presence_since"]),
                last_sign_at=last_sign,
                labels=labels.get(name, ()),
                sessions=ever[name].sessions if name in ever else 0,
                acceptance_1h=hour[name].acceptance if name in hour else None,
                acceptance_24h=day[name].acceptance if name in day else None,
                tokens_today=today[name].tokens if name in today else 0,
                **row,
            )
        )
    return views


def _conditions(chosen: SessionFilter) -> list[ColumnElement[bool]]:
    """Return the conditions, except that on the edge."""
    equal = {"reason": chosen.reason, "mode": chosen.mode, "draft_model": chosen.draft_model}
    conditions = [SESSIONS.c[name] == value for name, value in equal.items() if value is not None]
    if chosen.devices:
        conditions.append(SESSIONS.c.device.in_(chosen.devices))
    if chosen.since is not None:
        conditions.append(SESSIONS.c.opened_at >= chosen.since)
    if chosen.until is not None:
        conditions.append(SESSIONS.c.opened_at < chosen.until)
    if chosen.open:
        conditions.append(SESSIONS.c.reason.is_(None))
    return conditions


def _session_views(connection: Connection, rows: Sequence[RowMapping]) -> list[SessionView]:
    found = select(SEGMENTS).where(SEGMENTS.c.session.in_([row["session"] for row in rows]))
    by_session: dict[tuple[str, str], list[RowMapping]] = {}
    for segment in connection.execute(found.order_by(SEGMENTS.c.segment)).mappings():
        by_session.setdefault((segment["session"], segment["device"]), []).append(segment)
    views = []
    for row in rows:
        own = by_session.get((row["session"], row["device"]), [])
        sums: dict[str, Any] = {name: sum(segment[name] for segment in own) for name in SUMMED}
        views.append(
            SessionView(
                final_tokens=row["tokens"],
                counted=Tally(sessions=1, segments=len(own), **sums),
                first_token_ms=next((s["first_token_ms"] for s in own if s["first_token_ms"] is not None), None),
                gap_p95_ms=max(own, key=itemgetter("tokens"))["gap_p95_ms"] if own else None,
                **{name: row[name] for name in _OF_SESSION},
            )
        )
    return views


def edge(connection: Connection, name: str, *, now: datetime) -> EdgeView | None:
    row = connection.execute(select(*_OF_EDGE).where(EDGES.c.edge == name)).mappings().one_or_none()
    return None if row is None else _edge_view(row, now)


def edges(connection: Connection, *, now: datetime) -> list[EdgeView]:
    query = select(*_OF_EDGE).order_by(EDGES.c.edge)
    return [_edge_view(row, now) for row in connection.execute(query).mappings()]


def _edge_view(row: RowMapping, now: datetime) -> EdgeView:
    since_load = None if row["load_at"] is None else now - row["load_at"]
    return EdgeView(state=edge_state(row["presence"], since_load=since_load), **row)


def loads(
    connection: Connection, *, since: datetime, grain: Grain, edge: str | None = None
) -> dict[datetime, dict[str, LoadView]]:
    """Return the mean loads of edges, by time and edge."""
    length = MINUTES.get(grain, HOUR if grain is Grain.HOUR else DAY)
    number: ColumnElement[int] = literal_column(f"edge_loads.minute / {length // timedelta(minutes=1)}")
    names = [field.name for field in fields(LoadView)]
    means = (func.avg(EDGE_LOADS.c[name]) for name in names)
    query = select(number, EDGE_LOADS.c.edge, *means).where(EDGE_LOADS.c.minute >= minute_of(since))
    if edge is not None:
        query = query.where(EDGE_LOADS.c.edge == edge)
    found: dict[datetime, dict[str, list[Sequence[Any]]]] = {}
    for place, name, *values in connection.execute(query.group_by(number, EDGE_LOADS.c.edge)):
        # Months differ in length: they are means of their days.
        found.setdefault(floor(grain, BEGINNING + place * length), {}).setdefault(name, []).append(values)
    return {
        start: {name: LoadView(*map(_mean, zip(*rows, strict=True))) for name, rows in own.items()}
        for start, own in found.items()
    }


def _mean(values: Sequence[Any]) -> float | None:
    # PostgreSQL's means of integers are decimals.
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


class EventGrouping(StrEnum):
    KIND = "kind"
    CODE = "code"
    SEVERITY = "severity"
    EDGE = "edge"
    DEVICE = "device"
    DAY = "day"


@dataclass(frozen=True, slots=True, kw_only=True)
class EventFilter:
    """Conditions on events, with aware times; fields left out admit all. `severity`: at least this severe."""

    since: datetime | None = None
    until: datetime | None = None
    devices: tuple[str, ...] = ()
    edge: str | None = None
    session: str | None = None
    kind: str | None = None
    code: str | None = None
    severity: Severity | None = None
    who: str | None = None


_GRAVEST: Final = tuple(Severity)
_LONGEST: Final = timedelta(minutes=1)
_DAY_LENGTH: Final = 10  # of a date in ISO 8601
_HOUR_LENGTH: Final = 13
_MINUTE_LENGTH: Final = 16


def events(connection: Connection, chosen: EventFilter, *, limit: int) -> list[EventView]:
    query = select(EVENTS).where(*_event_conditions(chosen)).order_by(EVENTS.c.at.desc(), EVENTS.c.id).limit(limit)
    return [EventView(**row) for row in connection.execute(query).mappings()]


def event_counts(
    connection: Connection, chosen: EventFilter, *, by: Sequence[EventGrouping], limit: int
) -> list[EventCount]:
    """Return how often what happened, the most frequent first; by day, the latest first."""
    day_of = _begin_of_time(_DAY_LENGTH, dialect=connection.dialect.name)
    names: dict[EventGrouping, Label[Any]] = {
        group: (day_of if group is EventGrouping.DAY else EVENTS.c[group]).label(group.value) for group in by
    }
    times = func.sum(EVENTS.c.count).label("times")
    counted = (func.count().label("events"), times, func.max(EVENTS.c.last_at).label("last_at"))
    query = select(*names.values(), *counted).where(*_event_conditions(chosen)).limit(limit)
    if names:
        query = query.group_by(*(name.element for name in names.values()))
    day = names.get(EventGrouping.DAY)
    query = query.order_by(*(() if day is None else (day.desc(),)), times.desc())
    unasked = {group.value: None for group in EventGrouping}
    rows = connection.execute(query).mappings()
    return [EventCount(**{**unasked, **row, "times": int(row["times"])}) for row in rows if row["events"]]


def _begin_of_time(length: int, *, dialect: str) -> ColumnElement[str]:
    """Return the first characters of an event's time in ISO 8601, UTC."""
    at: ColumnElement[Any] = EVENTS.c.at
    if dialect == "postgresql":
        at = func.timezone(literal_column("'UTC'"), at)
    return func.substr(cast(at, Text), literal_column("1"), literal_column(str(length)))


def failures(connection: Connection, chosen: EventFilter, *, grain: Grain) -> dict[datetime, Counter[str]]:
    """Return how often sessions failed or were lost, and devices were refused or at fault, by time and code."""
    length = _MINUTE_LENGTH if grain in MINUTES else _HOUR_LENGTH
    time = _begin_of_time(length, dialect=connection.dialect.name)
    row = EVENTS.c
    of_sessions = and_(row.kind == EventKind.SESSION, row.code.in_(("failed", "lost", "abandoned")))
    query = select(time, row.kind, row.code, func.sum(row.count)).where(*_event_conditions(chosen))
    query = query.where(or_(row.kind.in_((EventKind.REFUSED, EventKind.FAULT)), of_sessions))
    query = query.group_by(time, row.kind, row.code)
    found: dict[datetime, Counter[str]] = {}
    for at, kind, code, times in connection.execute(query):
        start = floor(grain, datetime.fromisoformat(at).replace(tzinfo=UTC))
        found.setdefault(start, Counter())[f"{kind} {code}"] += int(times)
    return found


def _event_conditions(chosen: EventFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if chosen.since is not None:
        # An event lasts a minute at most; the index has its beginning.
        conditions += [EVENTS.c.at >= chosen.since - _LONGEST, EVENTS.c.last_at >= chosen.since]
    if chosen.until is not None:
        conditions.append(EVENTS.c.at < chosen.until)
    if chosen.devices:
        conditions.append(EVENTS.c.device.in_(chosen.devices))
    if chosen.severity is not None:
        conditions.append(EVENTS.c.severity.in_(_GRAVEST[_GRAVEST.index(chosen.severity) :]))
    equal = {name: getattr(chosen, name) for name in ("edge", "session", "kind", "code", "who")}
    return conditions + [EVENTS.c[name] == value for name, value in equal.items() if value is not None]

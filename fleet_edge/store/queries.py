"""Queries of an administrator on the session log.

Reads only. Every query is served by an index and bounded by a limit, but for `devices`, which has a row for each. What
adds up is in `totals`.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from operator import attrgetter, itemgetter
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    Select,
    func,
    select,
    text,
)

from fleet_edge.store import totals
from fleet_edge.store.errors import NotFound, StoreError
from fleet_edge.store.fences import read_fences
from fleet_edge.store.models import DeviceRow, EventRow, RollupRow, RoundRow, SegmentRow, SessionRow
from fleet_edge.store.records.segments import segment_time
from fleet_edge.store.rollups.grains import DAY, HOUR, Grain, floor
from fleet_edge.store.rollups.marks import Mark, Marks
from fleet_edge.store.rollups.sums import Dimension, by_row
from fleet_edge.store.states import MachineState, device_state
from fleet_edge.store.steering.labels import read_labels
from fleet_edge.store.totals import SUMMED, tally
from fleet_edge.store.views import DeviceView, HourView, RoundView, SegmentView, SessionView, Tally

_ID_LENGTH: Final = 16
_ALL: Final = 2**31
"""Rows, more than there are: SQLite has no OFFSET without LIMIT."""

_OF_DEVICE: Final = (
    "device",
    "presence",
    "software",
    "draft_model",
    "quantization",
    "first_seen_at",
    "seen_at",
    "retired_at",
    "presence_since",
    "certificate_until",
    "telemetry_at",
    "plan",
    "round_trip_ms",
    "told_acceptance",
    "draft_ms_per_token",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionFilter:
    """Which sessions; everything left out admits all.

    Attributes:
        devices: Of one of these devices.
        edge: Served, at least once, by this edge.
        reason: Ended so.
        mode: Verified so.
        since: Opened at or after (aware).
        until: Opened before (aware).
        open: True for those that have not ended.
        draft_model: Drafted with this model.
    """

    devices: tuple[str, ...] = ()
    edge: str | None = None
    reason: str | None = None
    mode: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    open: bool = False
    draft_model: str | None = None


def devices(connection: Connection, *, now: datetime, counted: bool = True) -> list[DeviceView]:
    """Return all devices, by name.

    Args:
        connection: To the database.
        now: From which the last hours are counted back (aware).
        counted: Whether to add up what each came to.
    """
    query = _devices().order_by(DeviceRow.device)
    return _device_views(connection, query, now=now, names=None if counted else ())


def device(connection: Connection, name: str, *, now: datetime) -> DeviceView:
    """Return one device; otherwise as `devices`.

    Raises:
        NotFound: There is none of that name.
    """
    found = _device_views(connection, _devices().where(DeviceRow.device == name), now=now, names=(name,))
    if not found:
        raise NotFound(f"There is no device {name!r} in the session log; 'devices' lists those there are.")
    return found[0]


def sessions(connection: Connection, chosen: SessionFilter, *, limit: int) -> list[SessionView]:
    """Return sessions, the latest opened first."""
    query = select(SessionRow).where(*_conditions(chosen)).order_by(SessionRow.opened_at.desc()).limit(limit)
    if chosen.edge is None:
        return _session_views(connection, connection.execute(query).mappings().all())
    # Those that it has served last are in an index, and those few that went on elsewhere in another.
    last = connection.execute(query.where(SessionRow.edge == chosen.edge)).mappings().all()
    own = (SegmentRow.session == SessionRow.session, by_row(SegmentRow.device) == SessionRow.device)
    served = select(SegmentRow.session).where(*own, by_row(SegmentRow.edge) == chosen.edge).exists()
    left = query.where(text("sessions.moved"), SessionRow.edge != chosen.edge, served)
    both = heapq.merge(last, connection.execute(left).mappings().all(), key=itemgetter("opened_at"), reverse=True)
    return _session_views(connection, list(islice(both, limit)))


def session(connection: Connection, prefix: str, *, device: str | None = None) -> SessionView:
    """Return the session whose id begins with `prefix`.

    Args:
        connection: To the database.
        prefix: Of the id.
        device: Whose it is; only needed where two devices have named their sessions alike.

    Raises:
        NotFound: There is none.
        StoreError: There are several.
    """
    wanted = prefix.lower()
    if not wanted or len(wanted) > _ID_LENGTH or set(wanted) - set("0123456789abcdef"):
        raise NotFound(f"{prefix[:40]!r} is not the beginning of a session id: 1 to 16 hexadecimal characters.")
    # "g" follows every hexadecimal digit; a range uses the key's index where LIKE does not.
    within = (SessionRow.session >= wanted, SessionRow.session < wanted + "g")
    query = select(SessionRow).where(*within).order_by(SessionRow.session, SessionRow.device).limit(2)
    if device is not None:
        query = query.where(SessionRow.device == device)
    rows = connection.execute(query).mappings().all()
    if not rows:
        raise NotFound(f"There is no session {prefix} in the session log; 'sessions' lists the latest.")
    if len(rows) > 1 and rows[0]["session"] == rows[1]["session"]:
        raise StoreError(f"Several devices have named a session {rows[0]['session']}; say whose you mean.")
    if len(rows) > 1:
        raise StoreError(f"Several sessions begin with {prefix}; give more of its characters.")
    return _session_views(connection, rows)[0]


def ends(
    connection: Connection, reasons: Sequence[str], *, since: datetime | None = None, until: datetime | None = None
) -> dict[str, int]:
    """Return how many sessions of those that are kept were opened within a time and ended so, by reason."""
    found = {}
    for reason in reasons:  # one range of an index each
        query = select(func.count()).select_from(SessionRow)
        of_time = _conditions(SessionFilter(reason=reason, since=since, until=until))
        found[reason] = int(connection.scalar(query.where(*of_time)) or 0)
    return found


def segments(connection: Connection, session: str, *, device: str) -> list[SegmentView]:
    """Return the segments of a device's session (full id), in order."""
    own = (SegmentRow.session == session, SegmentRow.device == device)
    query = select(SegmentRow).where(*own).order_by(SegmentRow.segment)
    views = []
    for row in connection.execute(query).mappings():
        told = ("segment", "device", "edge", "draft_model", "quantization", "target", "resumed_tokens")
        views.append(
            SegmentView(
                opened_at=segment_time(row["segment"]),
                counted=tally(row, sessions=1, segments=1),
                **{
                    name: row[name]
                    for name in (*told, "open_bytes", "reason", "closed_at", "first_token_ms", "gap_p95_ms")
                },
            )
        )
    return views


def rounds(
    connection: Connection, session: str, *, device: str, skip: int = 0, limit: int | None = None
) -> list[RoundView]:
    """Return the rounds of a device's session (full id), in order; none unless it was traced.

    Args:
        connection: To the database.
        session: Its id.
        device: Whose it is.
        skip: So many of the first are left out.
        limit: At most so many; None: all.
    """
    own = select(SegmentRow.segment).where(SegmentRow.session == session, SegmentRow.device == device)
    chosen = (RoundRow.session == session, RoundRow.segment.in_(own))
    query = select(RoundRow).where(*chosen).order_by(RoundRow.segment, RoundRow.round)
    if skip or limit is not None:
        query = query.offset(skip).limit(_ALL if limit is None else limit)
    return [
        RoundView(**{name: value for name, value in row.items() if name != "session"})
        for row in connection.execute(query).mappings()
    ]


def hours(connection: Connection, device: str, *, limit: int) -> list[HourView]:
    """Return what a device did in the latest hours in which it did something, the latest first."""
    rolled = select(RollupRow.start).where(RollupRow.device == device, RollupRow.grain == Grain.HOUR)
    starts = connection.scalars(rolled.distinct().order_by(RollupRow.start.desc()).limit(limit)).all()
    first = starts[-1] if len(starts) == limit else Marks.read(connection).at[Mark.HOURS_FROM]
    period = totals.Period(since=first, chosen={Dimension.DEVICE: (device,)})
    found = totals.usage(connection, period=period, grain=Grain.HOUR)
    views = [HourView(hour=view.start, counted=view.counted) for view in found if view.start is not None]
    return sorted(views, key=attrgetter("hour"), reverse=True)[:limit]


def latest(connection: Connection) -> datetime | None:
    """Return when the log last heard of anything."""
    heard = (SessionRow.last_at, DeviceRow.seen_at, EventRow.at)
    times = (connection.scalar(select(func.max(column))) for column in heard)
    return max((each for each in times if each is not None), default=None)


def _devices() -> Select[Any]:
    of_device = SessionRow.device == DeviceRow.device
    columns: list[Any] = [
        *(getattr(DeviceRow, name) for name in _OF_DEVICE),
        select(func.max(SessionRow.opened_at)).where(of_device).scalar_subquery().label("last_session_at"),
        select(func.max(SessionRow.last_at)).where(of_device).scalar_subquery().label("last_verdict_at"),
        select(SessionRow.edge)
        .where(of_device)
        .order_by(SessionRow.opened_at.desc())
        .limit(1)
        .scalar_subquery()
        .label("last_edge"),
    ]
    return select(*columns)


def _device_views(
    connection: Connection, query: Select[Any], *, now: datetime, names: Sequence[str] | None
) -> list[DeviceView]:
    """Add to each device what it came to of late.

    Args:
        connection: To the database.
        query: For devices.
        now: The time.
        names: Of those that this is added up for; None: of all.
    """

    def counted(since: datetime | None, *columns: str) -> dict[str | None, Tally]:
        if names is not None and not names:
            return {}
        period = totals.Period(since=since, chosen=None if names is None else {Dimension.DEVICE: names})
        found = totals.usage(connection, period=period, by=(Dimension.DEVICE,), columns=columns)
        return {view.device: view.counted for view in found}

    ever, today = counted(None), counted(floor(Grain.DAY, now), "tokens")
    hour, day = (counted(now - age, "tested", "accepted") for age in (HOUR, DAY))
    fences, labels = read_fences(connection, now=now).active, read_labels(connection)
    views = []
    for row in connection.execute(query).mappings():
        name = row["device"]
        last_sign = max(filter(None, (row["seen_at"], row["telemetry_at"], row["last_verdict_at"])))
        state = device_state(
            row["presence"],
            since_last_sign=now - last_sign,
            fenced=name in fences,
            retired=row["retired_at"] is not None,
        )
        since = {
            MachineState.FENCED: fences[name].since_at if name in fences else None,
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
    """Return what is asked for, but for the edge."""
    conditions: list[ColumnElement[bool]] = []
    if chosen.devices:
        conditions.append(SessionRow.device.in_(chosen.devices))
    if chosen.reason is not None:
        conditions.append(SessionRow.reason == chosen.reason)
    if chosen.mode is not None:
        conditions.append(SessionRow.mode == chosen.mode)
    if chosen.draft_model is not None:
        conditions.append(SessionRow.draft_model == chosen.draft_model)
    if chosen.since is not None:
        conditions.append(SessionRow.opened_at >= chosen.since)
    if chosen.until is not None:
        conditions.append(SessionRow.opened_at < chosen.until)
    if chosen.open:
        conditions.append(SessionRow.reason.is_(None))
    return conditions


def _session_views(connection: Connection, rows: Sequence[RowMapping]) -> list[SessionView]:
    """Add to each session what its segments sum to."""
    found = select(SegmentRow).where(SegmentRow.session.in_([row["session"] for row in rows]))
    by_session: dict[tuple[str, str], list[RowMapping]] = {}
    for segment in connection.execute(found.order_by(SegmentRow.segment)).mappings():
        by_session.setdefault((segment["session"], segment["device"]), []).append(segment)
    unlike = {"last_segment", "described_by", "device_counted_at", "tokens", "edge_segment", "moved"}
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
                **{name: value for name, value in row.items() if name not in unlike},
            )
        )
    return views

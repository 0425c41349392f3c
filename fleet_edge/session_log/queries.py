"""Views of devices, sessions and edges, as the session log's queries return them.

What adds up is in `totals`.
"""

from collections.abc import Sequence
from datetime import datetime
from operator import itemgetter
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, case, func, or_, select

from fleet_edge.session_log import totals
from fleet_edge.session_log.errors import NotFound, StoreError
from fleet_edge.session_log.periods import DAY, HOUR, Grain, floor
from fleet_edge.session_log.quarantines import read_quarantines
from fleet_edge.session_log.records import segment_time
from fleet_edge.session_log.rollups import SUMMED, Dimension
from fleet_edge.session_log.rules import stored
from fleet_edge.session_log.steering import read_labels
from fleet_edge.session_log.tables import DEVICES, EDGES, SEGMENTS, SESSIONS
from fleet_edge.session_log.totals import tally
from fleet_edge.session_log.views import (
    DeviceSigns,
    DeviceView,
    EdgeView,
    MachineState,
    SegmentView,
    SessionView,
    Tally,
    device_state,
    edge_state,
)
from schemas.control import Presence

_ID_LENGTH: Final = 16
_OF_DEVICE: Final = tuple(DEVICES.c[name] for name in stored(DeviceView))
_OF_EDGE: Final = tuple(EDGES.c[name] for name in stored(EdgeView))
_OF_SESSION: Final = tuple(stored(SessionView))
_OF_SEGMENT: Final = tuple(stored(SegmentView))
_BY_DEVICE: Final = SESSIONS.c.device == DEVICES.c.device
_LAST_VERDICT: Final = select(func.max(SESSIONS.c.last_at)).where(_BY_DEVICE).scalar_subquery()


def read_devices(
    connection: Connection,
    *,
    now: datetime,
    counted: bool = True,
    only: str | None = None,
) -> list[DeviceView]:
    """Return all devices by name, or `only` one. Without `counted`, no sums are read."""
    columns: list[Any] = [
        *_OF_DEVICE,
        select(func.max(SESSIONS.c.opened_at)).where(_BY_DEVICE).scalar_subquery().label("last_session_at"),
        _LAST_VERDICT.label("last_verdict_at"),
        _last_sign(connection.dialect.name),
        select(SESSIONS.c.edge)
        .where(_BY_DEVICE)
        .order_by(SESSIONS.c.opened_at.desc())
        .limit(1)
        .scalar_subquery()
        .label("last_edge"),
    ]
    query = select(*columns).order_by(DEVICES.c.device)
    if only is not None:
        query = query.where(DEVICES.c.device == only)

    def sums(since: datetime | None, *columns: str) -> dict[str | None, Tally]:
        if not counted:
            return {}
        period = totals.UsageFilter(since=since, chosen={} if only is None else {Dimension.DEVICE: (only,)})
        found = totals.usage(connection, now=now, period=period, by=(Dimension.DEVICE,), columns=columns)
        return {view.device: view.counted for view in found}

    ever, today = sums(None), sums(floor(Grain.DAY, now), "tokens")
    hour, day = (sums(now - age, "tested", "accepted") for age in (HOUR, DAY))
    quarantines, labels = read_quarantines(connection, now=now).active, read_labels(connection)
    at_edges = read_edges(connection, now=now)
    observed = not at_edges or any(each.state not in _AWAY for each in at_edges)
    observed_until = max((each.seen_at for each in at_edges), default=None)
    views = []
    for row in connection.execute(query).mappings():
        name = row["device"]
        state = device_state(
            row["presence"],
            quarantined=name in quarantines,
            retired=row["retired_at"] is not None,
            observed=observed,
        )
        since = {
            MachineState.QUARANTINED: quarantines[name].since_at if name in quarantines else None,
            MachineState.RETIRED: row["retired_at"],
            MachineState.UNKNOWN: observed_until if row["presence"] else None,
        }
        views.append(
            DeviceView(
                state=state,
                state_since=since.get(state, row["presence_since"]),
                labels=labels.get(name, ()),
                sessions=ever[name].sessions if name in ever else 0,
                acceptance_1h=hour[name].acceptance if name in hour else None,
                acceptance_24h=day[name].acceptance if name in day else None,
                tokens_today=today[name].tokens if name in today else 0,
                **row,
            )
        )
    return views


_AWAY: Final = (MachineState.OFFLINE, MachineState.SILENT)
"""States of an edge that does not observe the broker now, as far as the log knows."""


def offline_or_expiring(connection: Connection, *, now: datetime, until: datetime) -> list[DeviceSigns]:
    """Return the devices in service that are offline, or whose certificate ends before `until`, by name."""
    presence, ends = DEVICES.c.presence, DEVICES.c.certificate_until
    concerned = or_(presence == Presence.OFFLINE.value, ends < until)
    query = select(DEVICES.c.device, presence, _last_sign(connection.dialect.name), ends)
    query = query.where(DEVICES.c.retired_at.is_(None), concerned).order_by(DEVICES.c.device)
    quarantined = read_quarantines(connection, now=now).active.keys()
    return [
        DeviceSigns(name, of_broker == Presence.OFFLINE and name not in quarantined, last_sign_at, certificate_until)
        for name, of_broker, last_sign_at, certificate_until in connection.execute(query).all()
    ]


def _last_sign(dialect: str) -> ColumnElement[datetime]:
    """Return the column `last_sign_at`: when a device was last heard.

    An edge that starts receives the retained state of an offline device, and records that it has seen the device.
    """
    greatest = func.max if dialect == "sqlite" else func.greatest
    presence, since, telemetry_at = (DEVICES.c[name] for name in ("presence", "presence_since", "telemetry_at"))
    gone = and_(presence.in_((Presence.OFFLINE.value, Presence.CLOSED.value)), since.is_not(None))
    sign = case((gone, since), else_=DEVICES.c.seen_at)
    signs = sign, func.coalesce(telemetry_at, sign), func.coalesce(_LAST_VERDICT, sign)
    return greatest(*signs, type_=sign.type).label("last_sign_at")


def find_session(connection: Connection, prefix: str, *, device: str | None = None) -> RowMapping:
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
    return rows[0]


def session_views(connection: Connection, rows: Sequence[RowMapping]) -> list[SessionView]:
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


def segment_view(row: RowMapping) -> SegmentView:
    return SegmentView(
        opened_at=segment_time(row["segment"]),
        counted=tally(row, sessions=1, segments=1),
        **{name: row[name] for name in _OF_SEGMENT},
    )


def read_edges(connection: Connection, *, now: datetime, only: str | None = None) -> list[EdgeView]:
    """Return all edges by name, or `only` one."""
    query = select(*_OF_EDGE).order_by(EDGES.c.edge)
    if only is not None:
        query = query.where(EDGES.c.edge == only)

    def state(row: RowMapping) -> MachineState:
        since_loading = None if row["loading"] is None else now - row["loading_at"]
        return edge_state(row["presence"], since_last_sign=now - row["seen_at"], since_loading=since_loading)

    return [EdgeView(state=state(row), **row) for row in connection.execute(query).mappings()]

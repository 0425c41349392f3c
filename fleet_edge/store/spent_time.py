"""Spent time: what the sessions of a device or an edge took, as devices and edges have counted it."""

from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, and_, func, select

from fleet_edge.store.records import DeviceCounters
from fleet_edge.store.rollups import SUMMED, Dimension
from fleet_edge.store.tables import SEGMENTS, SESSIONS
from fleet_edge.store.totals import by_row, tally
from fleet_edge.store.views import Tally

_MOST: Final = 20_000
"""Sessions that are read, so that a page of a large fleet takes a fraction of a second."""

_COUNTERS: Final = {field.name: float if field.type is float else int for field in fields(DeviceCounters)}


@dataclass(frozen=True, slots=True)
class SpentTime:
    """Sums over the same sessions: what their devices and what their edges counted."""

    reported: DeviceCounters
    counted: Tally


def spent_times(connection: Connection, *, by: Dimension, since: datetime) -> dict[str, SpentTime]:
    """Add up the latest ended sessions by device, or by the edge that they were at last.

    Sessions that went on without an edge are left out.
    """
    own = SESSIONS.c[by]
    counters = [SESSIONS.c[f"device_{name}"] for name in _COUNTERS]
    columns: list[Any] = [SESSIONS.c.session, SESSIONS.c.device.label("owner"), own.label("name"), *counters]
    query = select(*columns).where(SESSIONS.c.opened_at >= since, own.is_not(None))
    query = query.where(SESSIONS.c.device_wall_ms > 0.0, SESSIONS.c.device_unverified == 0)
    latest = query.order_by(SESSIONS.c.opened_at.desc()).limit(_MOST).subquery()
    reported = [func.coalesce(func.sum(latest.c[f"device_{name}"]), 0) for name in _COUNTERS]
    of_devices = select(*[latest.c.name, func.count(), *reported]).group_by(latest.c.name)
    counted = [func.sum(SEGMENTS.c[name]).label(name) for name in SUMMED]
    same = and_(SEGMENTS.c.session == latest.c.session, by_row(SEGMENTS.c.device) == latest.c.owner)
    of_edges = select(*[latest.c.name, func.count().label("segments"), *counted]).join_from(latest, SEGMENTS, same)
    at_edges = {row["name"]: row for row in connection.execute(of_edges.group_by(latest.c.name)).mappings()}
    found = {}
    for name, sessions, *sums in connection.execute(of_devices):
        if (row := at_edges.get(name)) is not None:
            # PostgreSQL sums integers to decimals.
            values: dict[str, Any] = {
                key: kind(value) for (key, kind), value in zip(_COUNTERS.items(), sums, strict=True)
            }
            counted_there = tally(row, sessions=sessions, segments=int(row["segments"]))
            found[name] = SpentTime(DeviceCounters(**values), counted_there)
    return found

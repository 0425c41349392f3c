"""Queries on events: which there were, and how often."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Label, Text, cast, func, literal_column, select

from fleet_edge.store.event_codes import Severity
from fleet_edge.store.models import EventRow
from fleet_edge.store.views import EventCount, EventView


class EventGrouping(StrEnum):
    """What events are counted by."""

    KIND = "kind"
    CODE = "code"
    SEVERITY = "severity"
    EDGE = "edge"
    DEVICE = "device"
    DAY = "day"


@dataclass(frozen=True, slots=True, kw_only=True)
class EventFilter:
    """Which events; everything left out admits all.

    Attributes:
        since: That went on at or after this (aware).
        until: That began before (aware).
        devices: Of one of these devices.
        edge: Logged by this edge.
        session: Of this session (full id).
        kind: What it is about.
        code: What it is.
        severity: At least so grave.
        who: Done by this person.
    """

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
_VIEWED: Final = ("id", "at", "last_at", "count", "edge", "device", "session", "kind", "code", "severity", "who")
_LONGEST: Final = timedelta(minutes=1)
_DAY_LENGTH: Final = 10  # of a date in ISO 8601


def events(connection: Connection, chosen: EventFilter, *, limit: int) -> list[EventView]:
    columns = (getattr(EventRow, name) for name in (*_VIEWED, "sentence"))
    query = select(*columns).where(*_conditions(chosen)).order_by(EventRow.at.desc(), EventRow.id).limit(limit)
    return [EventView(**row) for row in connection.execute(query).mappings()]


def event_counts(
    connection: Connection, chosen: EventFilter, *, by: Sequence[EventGrouping], limit: int
) -> list[EventCount]:
    """Return how often what happened, the most frequent first; by day, the latest first."""
    names = {group: _name(group, dialect=connection.dialect.name) for group in by}
    times = func.sum(EventRow.count).label("times")
    counted = (func.count().label("events"), times, func.max(EventRow.last_at).label("last_at"))
    query = select(*names.values(), *counted).where(*_conditions(chosen)).limit(limit)
    if names:
        query = query.group_by(*(name.element for name in names.values()))
    day = names.get(EventGrouping.DAY)
    query = query.order_by(*(() if day is None else (day.desc(),)), times.desc())
    unasked = {group.value: None for group in EventGrouping}
    found = []
    for row in connection.execute(query).mappings():
        fields = {**unasked, **row}
        if fields["events"]:
            found.append(EventCount(**{**fields, "times": int(fields["times"])}))
    return found


def _name(group: EventGrouping, *, dialect: str) -> Label[Any]:
    if group is not EventGrouping.DAY:
        return getattr(EventRow, group.value).label(group.value)  # type: ignore[no-any-return]
    at: ColumnElement[Any] = EventRow.__table__.c.at
    if dialect == "postgresql":
        at = func.timezone(literal_column("'UTC'"), at)
    text = cast(at, Text)
    return func.substr(text, literal_column("1"), literal_column(str(_DAY_LENGTH))).label("day")


def _conditions(chosen: EventFilter) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if chosen.since is not None:
        # An event lasts a minute at most; its beginning is what the index knows.
        conditions += [EventRow.at >= chosen.since - _LONGEST, EventRow.last_at >= chosen.since]
    if chosen.until is not None:
        conditions.append(EventRow.at < chosen.until)
    if chosen.devices:
        conditions.append(EventRow.device.in_(chosen.devices))
    if chosen.severity is not None:
        conditions.append(EventRow.severity.in_(_GRAVEST[_GRAVEST.index(chosen.severity) :]))
    told = {name: getattr(chosen, name) for name in ("edge", "session", "kind", "code", "who")}
    return conditions + [getattr(EventRow, name) == value for name, value in told.items() if value is not None]

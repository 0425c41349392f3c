"""Facts that the rules look at, read from the session log: few queries, each served by an index and bounded."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import Connection, func, select

from fleet_admin.alerts.settings import AlertSettings
from fleet_edge.store import edge_queries, queries, totals
from fleet_edge.store.event_codes import EventKind
from fleet_edge.store.models import EventRow, RoundRow, SegmentRow
from fleet_edge.store.rollups.sums import Dimension
from fleet_edge.store.states import MachineState
from fleet_edge.store.views import DeviceView

_MOST_ROUNDS: Final = 2000
"""Of an edge: enough for a 95th percentile, and few enough to be read every few seconds."""

_RECENT: Final = timedelta(minutes=5)
_LONGEST_CODE: Final = 64
_HOUR, _DAY = timedelta(hours=1), timedelta(hours=24)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """A device.

    Attributes:
        name: Its own.
        state: As `fleet_edge.store.states` defines it.
        seen_at: When something last came from it.
        certificate_until: End of its certificate, if known.
    """

    name: str
    state: MachineState
    seen_at: datetime
    certificate_until: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeFacts:
    """An edge.

    Attributes:
        name: Its own.
        state: As `fleet_edge.store.states` defines it.
        seen_at: When the log last had something of it.
        load_at: When it last told its load; None if it never has.
        certificate_until: End of its certificate, if known.
        kv_usage: Share of its memory for keys and values.
        spooled_records: In its spool.
        queue_ms: Of the latest verdicts, in no order.
        step_ms: Likewise.
    """

    name: str
    state: MachineState
    seen_at: datetime
    load_at: datetime | None = None
    certificate_until: datetime | None = None
    kv_usage: float | None = None
    spooled_records: int | None = None
    queue_ms: Sequence[float] = ()
    step_ms: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Draft tokens of a device, tested and accepted, in the latest hour and in the 24 before."""

    tested_hour: int
    accepted_hour: int
    tested_day: int
    accepted_day: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known at one moment.

    Attributes:
        now: That moment (aware).
        devices: All that are in service.
        edges: Likewise.
        acceptance: By device.
        refusals: Refused sessions by edge and code, within the window.
        faults: Likewise.
        skews: Devices whose clock was found wrong within the window, with the sentence about it.
    """

    now: datetime
    devices: Sequence[DeviceFacts] = ()
    edges: Sequence[EdgeFacts] = ()
    acceptance: Mapping[str, Acceptance] = field(default_factory=dict)
    refusals: Mapping[tuple[str, str], int] = field(default_factory=dict)
    faults: Mapping[tuple[str, str], int] = field(default_factory=dict)
    skews: Mapping[str, str] = field(default_factory=dict)


def read_facts(connection: Connection, settings: AlertSettings, *, now: datetime) -> Facts:
    """Return the facts at `now` (aware)."""
    window = now - timedelta(minutes=settings.window_min)
    known = queries.devices(connection, now=now, counted=False)
    return Facts(
        now=now,
        devices=[_device(view) for view in known if view.state is not MachineState.RETIRED],
        edges=list(_edges(connection, now)),
        acceptance=_acceptance(connection, now),
        refusals=_counts(connection, EventKind.REFUSED, window),
        faults=_counts(connection, EventKind.FAULT, window),
        skews=_skews(connection, window),
    )


def _device(view: DeviceView) -> DeviceFacts:
    return DeviceFacts(
        name=view.device, state=view.state, seen_at=view.last_sign_at, certificate_until=view.certificate_until
    )


def _edges(connection: Connection, now: datetime) -> Iterator[EdgeFacts]:
    for view in edge_queries.edges(connection, now=now):
        latest = (
            select(RoundRow.queue_ms, RoundRow.compute_ms)
            .join(SegmentRow, (SegmentRow.session == RoundRow.session) & (SegmentRow.segment == RoundRow.segment))
            .where(RoundRow.at >= now - _RECENT, SegmentRow.edge == view.edge, RoundRow.batch > 0)
            .order_by(RoundRow.at.desc())
            .limit(_MOST_ROUNDS)
        )
        rounds = connection.execute(latest).all()
        yield EdgeFacts(
            name=view.edge,
            state=view.state,
            seen_at=view.seen_at,
            load_at=view.load_at,
            certificate_until=view.certificate_until,
            kv_usage=view.kv_usage,
            spooled_records=view.spooled_records,
            queue_ms=[each.queue_ms for each in rounds],
            step_ms=[each.compute_ms for each in rounds],
        )


def _acceptance(connection: Connection, now: datetime) -> dict[str, Acceptance]:
    day, hour = _tested(connection, now - _DAY), _tested(connection, now - _HOUR)
    return {
        device: Acceptance(*hour[device], tested - hour[device][0], accepted - hour[device][1])
        for device, (tested, accepted) in day.items()
        if device in hour
    }


def _tested(connection: Connection, since: datetime) -> dict[str, tuple[int, int]]:
    period = totals.Period(since=since)
    found = totals.usage(connection, period=period, by=(Dimension.DEVICE,), columns=("tested", "accepted"))
    return {view.device: (view.counted.tested, view.counted.accepted) for view in found if view.device is not None}


def _counts(connection: Connection, kind: EventKind, since: datetime) -> dict[tuple[str, str], int]:
    found = (
        select(EventRow.edge, EventRow.code, func.sum(EventRow.count))
        .where(EventRow.at >= since, EventRow.kind == kind.value)
        .group_by(EventRow.edge, EventRow.code)
    )
    counts = Counter[tuple[str, str]]()
    for edge, code, count in connection.execute(found):
        counts[edge, code[:_LONGEST_CODE]] += int(count)
    return counts


def _skews(connection: Connection, since: datetime) -> dict[str, str]:
    found = (
        select(EventRow.device, EventRow.sentence)
        .where(
            EventRow.at >= since,
            EventRow.kind == EventKind.DEVICE.value,
            EventRow.code == "clock-wrong",
            EventRow.device.is_not(None),
        )
        .order_by(EventRow.at)
    )
    return {str(device): sentence for device, sentence in connection.execute(found)}

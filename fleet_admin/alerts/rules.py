"""Rules of alerts, and the facts that they read from the session log by a few bounded, indexed queries.

A rule reads a value of each of its subjects. A value beyond the threshold is wrong; it is right again only when it is
clearly on the other side, so that a value at the threshold makes one alert, not many.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import Connection, func, select

from fleet_admin.alerts.alerts import AlertSeverity
from fleet_admin.alerts.settings import AlertSettings
from fleet_edge.counters import share
from fleet_edge.store import queries, totals
from fleet_edge.store.event_codes import EventKind
from fleet_edge.store.models import EventRow, RoundRow, SegmentRow
from fleet_edge.store.totals import Dimension
from fleet_edge.store.views import DeviceView, MachineState

_MOST_ROUNDS: Final = 2000
"""Of an edge: enough for a 95th percentile, and few enough to be read every few seconds."""

_RECENT: Final = timedelta(minutes=5)
_LONGEST_CODE: Final = 64
_HOUR, _DAY = timedelta(hours=1), timedelta(hours=24)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    name: str
    state: MachineState
    seen_at: datetime
    certificate_until: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeFacts:
    """An edge; `queue_ms` and `step_ms` are of its latest verdicts, unordered."""

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
class AcceptanceWindow:
    """Tested and accepted draft tokens of a device, in the latest hour and in the 24 hours before."""

    tested_hour: int
    accepted_hour: int
    tested_day: int
    accepted_day: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Devices and edges in service at `now`; refusals and faults of the window by edge and code."""

    now: datetime
    devices: Sequence[DeviceFacts] = ()
    edges: Sequence[EdgeFacts] = ()
    acceptance: Mapping[str, AcceptanceWindow] = field(default_factory=dict)
    refusals: Mapping[tuple[str, str], int] = field(default_factory=dict)
    faults: Mapping[tuple[str, str], int] = field(default_factory=dict)
    skews: Mapping[str, str] = field(default_factory=dict)


def read_facts(connection: Connection, settings: AlertSettings, *, now: datetime) -> Facts:
    window = now - timedelta(minutes=settings.window_min)
    known = queries.devices(connection, now=now, counted=False)
    return Facts(
        now=now,
        devices=[_device(view) for view in known if view.state is not MachineState.RETIRED],
        edges=list(_read_edges(connection, now)),
        acceptance=_read_acceptance(connection, now),
        refusals=_counts(connection, EventKind.REFUSED, window),
        faults=_counts(connection, EventKind.FAULT, window),
        skews=_skews(connection, window),
    )


def _device(view: DeviceView) -> DeviceFacts:
    return DeviceFacts(
        name=view.device, state=view.state, seen_at=view.last_sign_at, certificate_until=view.certificate_until
    )


def _read_edges(connection: Connection, now: datetime) -> Iterator[EdgeFacts]:
    for view in queries.edges(connection, now=now):
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


def _read_acceptance(connection: Connection, now: datetime) -> dict[str, AcceptanceWindow]:
    day, hour = _tested(connection, now - _DAY), _tested(connection, now - _HOUR)
    return {
        device: AcceptanceWindow(*hour[device], tested - hour[device][0], accepted - hour[device][1])
        for device, (tested, accepted) in day.items()
        if device in hour
    }


def _tested(connection: Connection, since: datetime) -> dict[str, tuple[int, int]]:
    period = totals.UsageFilter(since=since)
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


_FEWEST_ROUNDS: Final = 20
"""With fewer a percentile is meaningless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleReading:
    """What a rule finds about one subject. If neither `wrong` nor `right`, the alert stays as it is."""

    subject: str
    sentence: str
    wrong: bool
    right: bool
    severity: AlertSeverity = AlertSeverity.WARNING
    value: float | None = None
    threshold: float | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True)
class AlertRule:
    """A rule. Its `name` is in the log, in messages and in metrics, and never changes."""

    name: str
    meaning: str
    read: Callable[[Facts, AlertSettings], Iterable[RuleReading]]


def readings(facts: Facts, settings: AlertSettings) -> Iterator[tuple[str, RuleReading]]:
    for rule in RULES:
        for reading in rule.read(facts, settings):
            yield rule.name, reading


def _above(value: float, threshold: float, slack: float) -> tuple[bool, bool]:
    """Return whether a value is too high, and whether it is clearly not."""
    return value > threshold, value <= threshold * (1.0 - slack)


def _silent(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    for device in facts.devices:
        offline = device.state is MachineState.OFFLINE
        # An idle device is silent too, and the broker reports one whose connection is gone within seconds.
        hours = settings.offline_min / 60.0 if offline else settings.silent_h
        if not hours or not _belongs(device, facts.now, settings):
            continue
        threshold, age = timedelta(hours=hours), facts.now - device.seen_at
        how = "is offline" if offline else "is connected, and nothing comes from it"
        wrong = age > threshold and (offline or device.state is MachineState.SILENT)
        yield RuleReading(
            subject=device.name,
            sentence=f"The device {device.name} {how} since {_when(device.seen_at)}: look at its power, its network, "
            "and `fleet device doctor` there.",
            wrong=wrong,
            right=not wrong,
            value=age.total_seconds(),
            threshold=threshold.total_seconds(),
            device=device.name,
        )


def _acceptance_low(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    if not settings.acceptance_share:
        return
    for device, counted in facts.acceptance.items():
        hour = share(counted.accepted_hour, counted.tested_hour)
        day = share(counted.accepted_day, counted.tested_day)
        if hour is None or day is None or min(counted.tested_hour, counted.tested_day) < settings.acceptance_tokens:
            continue
        threshold = settings.acceptance_share * day
        yield RuleReading(
            subject=device,
            sentence=f"Of the draft tokens of {device} {hour:.0%} were accepted in the latest hour, and {day:.0%} in "
            "the day before: its texts or its draft model have changed.",
            wrong=hour < threshold,
            right=hour >= threshold + settings.slack * (day - threshold),
            value=hour,
            threshold=threshold,
            device=device,
        )


def _clock_wrong(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    if not settings.clocks:
        return
    for device, sentence in facts.skews.items():
        yield RuleReading(subject=device, sentence=sentence, wrong=True, right=False, device=device)


def _edge_away(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    if not settings.edge_away_s:
        return
    for edge in facts.edges:
        age = facts.now - edge.seen_at
        if _belongs(edge, facts.now, settings):
            offline = edge.state is MachineState.OFFLINE
            yield RuleReading(
                subject=edge.name,
                sentence=f"The edge {edge.name} is offline since {_when(edge.seen_at)}: its service's log says why "
                "(journalctl -u fleet-edge).",
                wrong=offline and age > timedelta(seconds=settings.edge_away_s),
                right=not offline,
                severity=AlertSeverity.CRITICAL,
                value=age.total_seconds(),
                threshold=settings.edge_away_s,
            )


def _queue_long(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    sentence = "Drafts wait {value:.0f} ms for a step at {edge} (95th percentile): it has more devices than it serves "
    for edge in facts.edges:
        yield from _percentile(edge, edge.queue_ms, settings.queue_p95_ms, sentence + "in time.", settings)


def _step_long(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    sentence = "A step of {edge} takes {value:.0f} ms (95th percentile): something else uses its machine, or batches "
    for edge in facts.edges:
        yield from _percentile(edge, edge.step_ms, settings.step_p95_ms, sentence + "are too large.", settings)


def _percentile(
    edge: EdgeFacts, values: Sequence[float], threshold: float, sentence: str, settings: AlertSettings
) -> Iterator[RuleReading]:
    if not threshold or len(values) < _FEWEST_ROUNDS:
        return
    value = sorted(values)[math.ceil(0.95 * len(values)) - 1]
    wrong, right = _above(value, threshold, settings.slack)
    yield RuleReading(
        subject=edge.name,
        sentence=sentence.format(value=value, edge=edge.name),
        wrong=wrong,
        right=right,
        value=value,
        threshold=threshold,
    )


def _kv_full(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    for edge in facts.edges:
        if settings.kv_share and edge.kv_usage is not None and _online(edge):
            wrong, right = _above(edge.kv_usage, settings.kv_share, settings.slack)
            yield RuleReading(
                subject=edge.name,
                sentence=f"Sessions hold {edge.kv_usage:.0%} of the memory for keys and values of {edge.name}: raise "
                "`kv_bytes`, or add an edge.",
                wrong=wrong,
                right=right,
                value=edge.kv_usage,
                threshold=settings.kv_share,
            )


def _spool_grows(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    for edge in facts.edges:
        if settings.spool_records and edge.spooled_records is not None:
            wrong, right = _above(edge.spooled_records, settings.spool_records - 1, settings.slack)
            yield RuleReading(
                subject=edge.name,
                sentence=f"{edge.spooled_records} records of {edge.name} wait in its spool: its database does not keep "
                "up, or was away.",
                wrong=wrong,
                right=right,
                value=edge.spooled_records,
                threshold=settings.spool_records,
            )


def _database_lags(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    for edge in facts.edges:
        if settings.lag_s and edge.load_at is not None and _online(edge) and _belongs(edge, facts.now, settings):
            lag_s = (facts.now - edge.load_at).total_seconds()
            wrong, right = _above(lag_s, settings.lag_s, settings.slack)
            yield RuleReading(
                subject=edge.name,
                sentence=f"{edge.name} is online, and the database has nothing of it since {_when(edge.load_at)}: what "
                "it writes waits in its spool; look at the way from it to the database.",
                wrong=wrong,
                right=right,
                severity=AlertSeverity.CRITICAL,
                value=lag_s,
                threshold=settings.lag_s,
            )


def _certificate_ends(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    machines: list[DeviceFacts | EdgeFacts] = [*facts.edges, *facts.devices]
    for machine in machines:
        name, until = machine.name, machine.certificate_until
        if until is None or not settings.certificate_days or not _belongs(machine, facts.now, settings):
            continue
        days = (until - facts.now) / timedelta(days=1)
        wrong = days < settings.certificate_days
        when = f"has ended on {until:%Y-%m-%d}" if days < 0 else f"ends in {math.floor(days)} days, on {until:%Y-%m-%d}"
        yield RuleReading(
            subject=name,
            sentence=f"The certificate of {name} {when}: renew it, by playbooks/rotate_certs.yml or `fleet broker "
            "renew`.",
            wrong=wrong,
            right=not wrong,
            severity=AlertSeverity.CRITICAL if days < settings.certificate_critical_days else AlertSeverity.WARNING,
            value=days,
            threshold=settings.certificate_days,
            device=name if isinstance(machine, DeviceFacts) else None,
        )


def _refusals(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    for (edge, code), count in facts.refusals.items():
        if settings.refusals:
            wrong, right = _above(count, settings.refusals - 1, settings.slack)
            yield RuleReading(
                subject=f"{edge} {code}",
                sentence=f"{edge} has refused {count} sessions as {code!r} within {settings.window_min:g} minutes: "
                f"`fleet admin events --edge {edge} --code {code}` says whose.",
                wrong=wrong,
                right=right,
                value=count,
                threshold=settings.refusals,
            )


def _faults(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    for (edge, code), count in facts.faults.items():
        if settings.faults:
            wrong, right = _above(count, settings.faults - 1, settings.slack)
            yield RuleReading(
                subject=f"{edge} {code}",
                sentence=f"{edge} could not serve {count} messages, with the code {code!r}, within "
                f"{settings.window_min:g} minutes: `fleet admin events --edge {edge} --code {code}` says whose.",
                wrong=wrong,
                right=right,
                value=count,
                threshold=settings.faults,
            )


def _belongs(machine: DeviceFacts | EdgeFacts, now: datetime, settings: AlertSettings) -> bool:
    """Return whether a machine still counts as part of the fleet."""
    return now - machine.seen_at <= timedelta(days=settings.gone_days)


def _online(edge: EdgeFacts) -> bool:
    return edge.state is not MachineState.OFFLINE


def _when(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"


RULES: Final = (
    AlertRule("device-silent", "A device is offline, or connected and silent for long.", _silent),
    AlertRule("acceptance-low", "A device's acceptance rate is far below its own of the day before.", _acceptance_low),
    AlertRule("clock-wrong", "A device's clock is ahead, or has gone back.", _clock_wrong),
    AlertRule("edge-offline", "An edge is offline.", _edge_away),
    AlertRule("queue-long", "Drafts wait long for a step.", _queue_long),
    AlertRule("step-long", "Steps take long.", _step_long),
    AlertRule("kv-full", "Open sessions hold nearly all memory for keys and values.", _kv_full),
    AlertRule("spool-grows", "Records of the session log wait in an edge's spool.", _spool_grows),
    AlertRule("database-lags", "The database has nothing new of an edge that is online.", _database_lags),
    AlertRule("certificate-ends", "A certificate ends soon, or has ended.", _certificate_ends),
    AlertRule("refusals", "An edge refuses many sessions with one code.", _refusals),
    AlertRule("faults", "An edge meets many faults of one code.", _faults),
)
"""All rules, in the order in which they are evaluated."""

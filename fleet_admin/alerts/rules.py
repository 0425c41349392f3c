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

from fleet_admin.alerts.alerts import AlertSeverity, RuleReading
from fleet_admin.alerts.settings import AlertSettings
from fleet_edge.counters import share
from fleet_edge.store import queries, totals
from fleet_edge.store.event_codes import EventKind
from fleet_edge.store.models import EventRow, RoundRow, SegmentRow
from fleet_edge.store.totals import Dimension
from fleet_edge.store.views import DeviceView, EdgeView, MachineState

_MOST_ROUNDS: Final = 2000
"""Of an edge: enough for a 95th percentile, and few enough to be read every few seconds."""

_RECENT: Final = timedelta(minutes=5)
_LONGEST_CODE: Final = 64
_HOUR, _DAY = timedelta(hours=1), timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class AcceptanceWindow:
    """Tested and accepted draft tokens of a device, in the latest hour and in the 24 hours before."""

    tested_hour: int
    accepted_hour: int
    tested_day: int
    accepted_day: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Devices and edges in service at `now`; refusals and faults of the window by edge and code.

    `rounds` has the waits and the steps of an edge's latest verdicts (ms), unordered.
    """

    now: datetime
    devices: Sequence[DeviceView] = ()
    edges: Sequence[EdgeView] = ()
    rounds: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    acceptance: Mapping[str, AcceptanceWindow] = field(default_factory=dict)
    refusals: Mapping[tuple[str, str], int] = field(default_factory=dict)
    faults: Mapping[tuple[str, str], int] = field(default_factory=dict)
    skews: Mapping[str, str] = field(default_factory=dict)


def read_facts(connection: Connection, settings: AlertSettings, *, now: datetime) -> Facts:
    window = now - timedelta(minutes=settings.window_min)
    known, edges = queries.devices(connection, now=now, counted=False), queries.edges(connection, now=now)
    return Facts(
        now=now,
        devices=[view for view in known if view.state is not MachineState.RETIRED],
        edges=edges,
        rounds={edge.edge: _read_rounds(connection, edge.edge, now) for edge in edges},
        acceptance=_read_acceptance(connection, now),
        refusals=_counts(connection, EventKind.REFUSED, window),
        faults=_counts(connection, EventKind.FAULT, window),
        skews=_skews(connection, window),
    )


def _read_rounds(connection: Connection, edge: str, now: datetime) -> tuple[Sequence[float], Sequence[float]]:
    latest = (
        select(RoundRow.queue_ms, RoundRow.compute_ms)
        .join(SegmentRow, (SegmentRow.session == RoundRow.session) & (SegmentRow.segment == RoundRow.segment))
        .where(RoundRow.at >= now - _RECENT, SegmentRow.edge == edge, RoundRow.batch > 0)
        .order_by(RoundRow.at.desc())
        .limit(_MOST_ROUNDS)
    )
    rounds = connection.execute(latest).all()
    return [each.queue_ms for each in rounds], [each.compute_ms for each in rounds]


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
        .where(EventRow.at >= since, EventRow.kind == EventKind.DEVICE.value, EventRow.code == "clock-wrong")
        .where(EventRow.device.is_not(None))
        .order_by(EventRow.at)
    )
    return {str(device): sentence for device, sentence in connection.execute(found)}


_FEWEST_ROUNDS: Final = 20
"""With fewer a percentile is meaningless."""


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


def _above(
    subject: str,
    value: float,
    threshold: float,
    sentence: str,
    settings: AlertSettings,
    *,
    counts: bool = False,
    severity: AlertSeverity = AlertSeverity.WARNING,
) -> RuleReading:
    """Return whether a value is above its threshold, or clearly not; a value that `counts` may not reach it."""
    most = threshold - 1 if counts else threshold
    return RuleReading(
        subject=subject,
        sentence=sentence,
        wrong=value > most,
        right=value <= most * (1.0 - settings.slack),
        severity=severity,
        value=value,
        threshold=threshold,
    )


def _silent(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    for device in facts.devices:
        offline = device.state is MachineState.OFFLINE
        # An idle device is silent too, and the broker reports one whose connection is gone within seconds.
        hours = settings.offline_min / 60.0 if offline else settings.silent_h
        if not hours or not _belongs(device, facts.now, settings):
            continue
        threshold, age = timedelta(hours=hours), facts.now - device.last_sign_at
        how = "is offline" if offline else "is connected but sends nothing"
        wrong = age > threshold and (offline or device.state is MachineState.SILENT)
        yield RuleReading(
            subject=device.device,
            sentence=f"The device {device.device} {how} since {_when(device.last_sign_at)}: check its power, its "
            "network, and `fleet device doctor` there.",
            wrong=wrong,
            right=not wrong,
            value=age.total_seconds(),
            threshold=threshold.total_seconds(),
            device=device.device,
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
            "the day before: its requests or its draft model have changed.",
            wrong=hour < threshold,
            right=hour >= threshold + settings.slack * (day - threshold),
            value=hour,
            threshold=threshold,
            device=device,
        )


def _clock_wrong(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    for device, sentence in facts.skews.items() if settings.clocks else ():
        yield RuleReading(subject=device, sentence=sentence, device=device)


def _edge_away(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    for edge in facts.edges if settings.edge_away_s else ():
        age = facts.now - edge.seen_at
        if _belongs(edge, facts.now, settings):
            offline = edge.state is MachineState.OFFLINE
            yield RuleReading(
                subject=edge.edge,
                sentence=f"The edge {edge.edge} is offline since {_when(edge.seen_at)}: its service's log says why "
                "(journalctl -u fleet-edge).",
                wrong=offline and age > timedelta(seconds=settings.edge_away_s),
                right=not offline,
                severity=AlertSeverity.CRITICAL,
                value=age.total_seconds(),
                threshold=settings.edge_away_s,
            )


def _queue_long(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    for edge, (queues, _) in facts.rounds.items():
        if (value := _percentile(queues)) is not None and settings.queue_p95_ms:
            sentence = (
                f"Drafts wait {value:.0f} ms for a step at {edge} (95th percentile): it has more devices than it "
                "serves in time."
            )
            yield _above(edge, value, settings.queue_p95_ms, sentence, settings)


def _step_long(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    for edge, (_, steps) in facts.rounds.items():
        if (value := _percentile(steps)) is not None and settings.step_p95_ms:
            sentence = (
                f"A step of {edge} takes {value:.0f} ms (95th percentile): another program uses its "
                "machine, or batches "
                "are too large."
            )
            yield _above(edge, value, settings.step_p95_ms, sentence, settings)


def _percentile(values: Sequence[float]) -> float | None:
    return sorted(values)[math.ceil(0.95 * len(values)) - 1] if len(values) >= _FEWEST_ROUNDS else None


_NO_LOAD: Final = (MachineState.OFFLINE, MachineState.SILENT)
"""States in which an edge's last load is outdated."""


def _kv_full(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    for edge in facts.edges:
        if settings.kv_share and edge.kv_usage is not None and edge.state not in _NO_LOAD:
            sentence = (
                f"Sessions hold {edge.kv_usage:.0%} of the memory for keys and values of {edge.edge}: raise "
                "`kv_bytes`, or add an edge."
            )
            yield _above(edge.edge, edge.kv_usage, settings.kv_share, sentence, settings)


def _spool_grows(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    for edge in facts.edges:
        if settings.spool_records and edge.spooled_records is not None:
            sentence = (
                f"{edge.spooled_records} records of {edge.edge} wait in its spool: its database does not keep up, or "
                "was away."
            )
            yield _above(edge.edge, edge.spooled_records, settings.spool_records, sentence, settings, counts=True)


def _database_lags(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    for edge in facts.edges:
        connected = edge.state is not MachineState.OFFLINE and _belongs(edge, facts.now, settings)
        if settings.lag_s and edge.load_at is not None and connected:
            sentence = (
                f"{edge.edge} is connected, and the database has nothing of it since {_when(edge.load_at)}: what it "
                "writes waits in its spool; check its connection to the database."
            )
            lag_s = (facts.now - edge.load_at).total_seconds()
            yield _above(edge.edge, lag_s, settings.lag_s, sentence, settings, severity=AlertSeverity.CRITICAL)


def _certificate_ends(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    machines: list[DeviceView | EdgeView] = [*facts.edges, *facts.devices]
    for machine in machines:
        device = machine.device if isinstance(machine, DeviceView) else None
        name = machine.edge if isinstance(machine, EdgeView) else machine.device
        until = machine.certificate_until
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
            device=device,
        )


def _refusals(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    for (edge, code), count in facts.refusals.items() if settings.refusals else ():
        what = f"{edge} has refused {count} sessions as {code!r}"
        yield _too_many(edge, code, count, settings.refusals, what, settings)


def _faults(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    for (edge, code), count in facts.faults.items() if settings.faults else ():
        what = f"{edge} could not serve {count} messages, with the code {code!r},"
        yield _too_many(edge, code, count, settings.faults, what, settings)


def _too_many(edge: str, code: str, count: int, most: int, what: str, settings: AlertSettings) -> RuleReading:
    command = f"fleet admin events --edge {edge} --code {code}"
    sentence = f"{what} within {settings.window_min:g} minutes: `{command}` says whose."
    return _above(f"{edge} {code}", count, most, sentence, settings, counts=True)


def _belongs(machine: DeviceView | EdgeView, now: datetime, settings: AlertSettings) -> bool:
    """Return whether a machine still counts as part of the fleet."""
    last = machine.last_sign_at if isinstance(machine, DeviceView) else machine.seen_at
    return now - last <= timedelta(days=settings.gone_days)


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

"""Rules of alerts, and the facts that they read from the session log by a few bounded, indexed queries.

Six conditions for fleets without Prometheus; `monitoring/prometheus/alerts.yml` has the rest. A rule reads a value of
each of its subjects. A value beyond the threshold is wrong; it is right again only when it is clearly on the other
side, so that a value at the threshold makes one alert, not many.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import Connection, func, select

from fleet_edge.alerts.alerts import AlertSeverity, RuleReading
from fleet_edge.alerts.settings import AlertSettings
from fleet_edge.store import queries
from fleet_edge.store.event_codes import EventKind
from fleet_edge.store.tables import EVENTS
from fleet_edge.store.views import DeviceView, EdgeView, MachineState

_LONGEST_CODE: Final = 64

_SILENT: Final = timedelta(hours=24)  # an idle device is silent too
_GONE: Final = timedelta(days=14)  # silence after which a machine no longer belongs to the fleet
_EDGE_OFFLINE: Final = timedelta(minutes=1)
_KV_SHARE: Final = 0.9
_LAG_S: Final = 120.0
_CERTIFICATE_DAYS: Final = 30.0
_CRITICAL_DAYS: Final = 7.0
_REFUSALS: Final = 20  # of one code at one edge
_WINDOW: Final = timedelta(minutes=15)
_SLACK: Final = 0.1
"""Share of a threshold by which a value must be below it to count as normal again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Devices and edges in service at `now`; refusals of the latest minutes by edge and code."""

    now: datetime
    devices: Sequence[DeviceView] = ()
    edges: Sequence[EdgeView] = ()
    refusals: Mapping[tuple[str, str], int] = field(default_factory=dict)


def read_facts(connection: Connection, *, now: datetime) -> Facts:
    known = queries.devices(connection, now=now, counted=False)
    return Facts(
        now=now,
        devices=[view for view in known if view.state is not MachineState.RETIRED],
        edges=queries.edges(connection, now=now),
        refusals=_counts(connection, EventKind.REFUSED, now - _WINDOW),
    )


def _counts(connection: Connection, kind: EventKind, since: datetime) -> dict[tuple[str, str], int]:
    found = (
        select(EVENTS.c.edge, EVENTS.c.code, func.sum(EVENTS.c.count))
        .where(EVENTS.c.at >= since, EVENTS.c.kind == kind.value)
        .group_by(EVENTS.c.edge, EVENTS.c.code)
    )
    counts = Counter[tuple[str, str]]()
    for edge, code, count in connection.execute(found):
        counts[edge, code[:_LONGEST_CODE]] += int(count)
    return counts


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
    subject: str, value: float, threshold: float, sentence: str, *, severity: AlertSeverity = AlertSeverity.WARNING
) -> RuleReading:
    """Return whether a value is above its threshold, or clearly not."""
    return RuleReading(
        subject=subject,
        sentence=sentence,
        wrong=value > threshold,
        right=value <= threshold * (1.0 - _SLACK),
        severity=severity,
        value=value,
        threshold=threshold,
    )


def _silent(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    for device in facts.devices:
        offline = device.state is MachineState.OFFLINE
        # An idle device is silent too, and the broker reports one whose connection is gone within seconds.
        threshold = timedelta(minutes=settings.offline_min) if offline else _SILENT
        if not _belongs(device, facts.now):
            continue
        age = facts.now - device.last_sign_at
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


def _edge_away(facts: Facts, _settings: AlertSettings) -> Iterator[RuleReading]:
    for edge in facts.edges:
        age = facts.now - edge.seen_at
        if _belongs(edge, facts.now):
            offline = edge.state is MachineState.OFFLINE
            yield RuleReading(
                subject=edge.edge,
                sentence=f"The edge {edge.edge} is offline since {_when(edge.seen_at)}: its service's log says why "
                "(journalctl -u fleet-edge).",
                wrong=offline and age > _EDGE_OFFLINE,
                right=not offline,
                severity=AlertSeverity.CRITICAL,
                value=age.total_seconds(),
                threshold=_EDGE_OFFLINE.total_seconds(),
            )


_NO_LOAD: Final = (MachineState.OFFLINE, MachineState.SILENT)
"""States in which an edge's last load is outdated."""


def _kv_full(facts: Facts, _settings: AlertSettings) -> Iterator[RuleReading]:
    for edge in facts.edges:
        if edge.kv_usage is not None and edge.state not in _NO_LOAD:
            sentence = (
                f"Sessions hold {edge.kv_usage:.0%} of the memory for keys and values of {edge.edge}: raise "
                "`kv_bytes`, or add an edge."
            )
            yield _above(edge.edge, edge.kv_usage, _KV_SHARE, sentence)


def _database_lags(facts: Facts, _settings: AlertSettings) -> Iterator[RuleReading]:
    for edge in facts.edges:
        connected = edge.state is not MachineState.OFFLINE and _belongs(edge, facts.now)
        if edge.load_at is not None and connected:
            sentence = (
                f"{edge.edge} is connected, and the database has nothing of it since {_when(edge.load_at)}: what it "
                "writes waits in its spool; check its connection to the database."
            )
            lag_s = (facts.now - edge.load_at).total_seconds()
            yield _above(edge.edge, lag_s, _LAG_S, sentence, severity=AlertSeverity.CRITICAL)


def _certificate_ends(facts: Facts, _settings: AlertSettings) -> Iterator[RuleReading]:
    machines: list[DeviceView | EdgeView] = [*facts.edges, *facts.devices]
    for machine in machines:
        device = machine.device if isinstance(machine, DeviceView) else None
        name = machine.edge if isinstance(machine, EdgeView) else machine.device
        until = machine.certificate_until
        if until is None or not _belongs(machine, facts.now):
            continue
        days = (until - facts.now) / timedelta(days=1)
        wrong = days < _CERTIFICATE_DAYS
        when = f"has ended on {until:%Y-%m-%d}" if days < 0 else f"ends in {math.floor(days)} days, on {until:%Y-%m-%d}"
        yield RuleReading(
            subject=name,
            sentence=f"The certificate of {name} {when}: renew it, by playbooks/rotate_certs.yml or `fleet broker "
            "renew`.",
            wrong=wrong,
            right=not wrong,
            severity=AlertSeverity.CRITICAL if days < _CRITICAL_DAYS else AlertSeverity.WARNING,
            value=days,
            threshold=_CERTIFICATE_DAYS,
            device=device,
        )


def _refusals(facts: Facts, _settings: AlertSettings) -> Iterator[RuleReading]:
    for (edge, code), count in facts.refusals.items():
        sentence = (
            f"{edge} has refused {count} sessions as {code!r} within {_WINDOW // timedelta(minutes=1)} minutes: `fleet "
            f"admin events --edge {edge} --code {code}` says whose."
        )
        yield _above(f"{edge} {code}", count, _REFUSALS - 1, sentence)


def _belongs(machine: DeviceView | EdgeView, now: datetime) -> bool:
    """Return whether a machine still counts as part of the fleet."""
    last = machine.last_sign_at if isinstance(machine, DeviceView) else machine.seen_at
    return now - last <= _GONE


def _when(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"


RULES: Final = (
    AlertRule("device-silent", "A device is offline, or connected and silent for long.", _silent),
    AlertRule("edge-offline", "An edge is offline.", _edge_away),
    AlertRule("kv-full", "Open sessions hold nearly all memory for keys and values.", _kv_full),
    AlertRule("database-lags", "The database has nothing new of an edge that is online.", _database_lags),
    AlertRule("certificate-ends", "A certificate ends soon, or has ended.", _certificate_ends),
    AlertRule("refusals", "An edge refuses many sessions with one code.", _refusals),
)
"""All rules, in the order in which they are evaluated."""

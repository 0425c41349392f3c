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
from fleet_edge.store.views import AlertView, DeviceSigns, EdgeView, MachineState
from schemas.control import Alert, AlertState

_LONGEST_CODE: Final = 64

_DAY: Final = timedelta(days=1)
_GONE: Final = timedelta(days=14)  # absence after which a machine no longer belongs to the fleet
_EDGE_AWAY: Final = timedelta(minutes=1)
_KV_SHARE: Final = 0.9
_CERTIFICATE_DAYS: Final = 30.0
_CRITICAL_DAYS: Final = 7.0
_REFUSALS: Final = 20  # of one code at one edge
_WINDOW: Final = timedelta(minutes=15)
_SLACK: Final = 0.1
"""Share of a threshold by which a value must be below it to count as normal again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Edges and devices in service at `now`, and refusals of the latest minutes by edge and code.

    Devices are left out to which no rule can apply.
    """

    now: datetime
    devices: Sequence[DeviceSigns] = ()
    edges: Sequence[EdgeView] = ()
    refusals: Mapping[tuple[str, str], int] = field(default_factory=dict)


def read_facts(connection: Connection, *, now: datetime) -> Facts:
    until = now + _CERTIFICATE_DAYS * _DAY
    return Facts(
        now=now,
        devices=queries.offline_or_expiring(connection, now=now, until=until),
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
    """A rule. Its `name` is in the log and in messages, and never changes.

    `several` is the sentence about a `{number}` of open alerts, `over` that about one of a `{subject}` that is over:
    the problem has ended, or the subject has left the fleet.
    """

    name: str
    several: str
    over: str
    read: Callable[[Facts, AlertSettings], Iterable[RuleReading]]


def readings(facts: Facts, settings: AlertSettings) -> Iterator[tuple[str, RuleReading]]:
    for rule in RULES:
        for reading in rule.read(facts, settings):
            yield rule.name, reading


def _above(subject: str, value: float, threshold: float, sentence: str) -> RuleReading:
    """Wrong above the threshold, right only clearly below it, so that an alert does not flap."""
    return RuleReading(
        subject=subject,
        sentence=sentence,
        wrong=value > threshold,
        right=value <= threshold * (1.0 - _SLACK),
        value=value,
        threshold=threshold,
    )


def _device_offline(facts: Facts, settings: AlertSettings) -> Iterator[RuleReading]:
    threshold = timedelta(minutes=settings.offline_min)
    for device in facts.devices:
        if not _belongs(device, facts.now):
            continue
        age = facts.now - device.last_sign_at
        wrong = device.offline and age > threshold
        yield RuleReading(
            subject=device.device,
            sentence=f"The device {device.device} is offline since {_when(device.last_sign_at)}: check its power, its "
            "network, and `fleet device doctor` there.",
            wrong=wrong,
            right=not wrong,
            value=age.total_seconds(),
            threshold=threshold.total_seconds(),
            device=device.device,
            since=device.last_sign_at,
        )


def _edge_offline(facts: Facts, _settings: AlertSettings) -> Iterator[RuleReading]:
    sentence = "The edge {} is offline since {}: its service's log says why (journalctl -u fleet-edge)."
    yield from _edges_away(facts, MachineState.OFFLINE, sentence)


def _edge_silent(facts: Facts, _settings: AlertSettings) -> Iterator[RuleReading]:
    sentence = (
        "The database has nothing of the edge {} since {}: it has died, or it cannot reach the database and keeps what "
        "it writes in its spool; look at its service's log (journalctl -u fleet-edge)."
    )
    yield from _edges_away(facts, MachineState.SILENT, sentence)


def _edges_away(facts: Facts, state: MachineState, sentence: str) -> Iterator[RuleReading]:
    for edge in facts.edges:
        age = facts.now - edge.seen_at
        if _belongs(edge, facts.now):
            yield RuleReading(
                subject=edge.edge,
                sentence=sentence.format(edge.edge, _when(edge.seen_at)),
                wrong=edge.state is state and age > _EDGE_AWAY,
                right=edge.state is not state,
                severity=AlertSeverity.CRITICAL,
                value=age.total_seconds(),
                threshold=_EDGE_AWAY.total_seconds(),
                since=edge.seen_at,
            )


def _kv_full(facts: Facts, _settings: AlertSettings) -> Iterator[RuleReading]:
    for edge in facts.edges:
        if edge.kv_usage is not None and edge.state not in (MachineState.OFFLINE, MachineState.SILENT):
            sentence = (
                f"Sessions hold {edge.kv_usage:.0%} of the memory for keys and values of {edge.edge}: raise "
                "`kv_bytes`, or add an edge."
            )
            yield _above(edge.edge, edge.kv_usage, _KV_SHARE, sentence)


def _certificate_ends(facts: Facts, _settings: AlertSettings) -> Iterator[RuleReading]:
    machines: list[DeviceSigns | EdgeView] = [*facts.edges, *facts.devices]
    for machine in machines:
        device = machine.device if isinstance(machine, DeviceSigns) else None
        name = machine.edge if isinstance(machine, EdgeView) else machine.device
        until = machine.certificate_until
        if until is None or not _belongs(machine, facts.now):
            continue
        days = (until - facts.now) / _DAY
        wrong = days < _CERTIFICATE_DAYS
        when = f"has ended on {until.date()}" if days < 0 else f"ends in {math.floor(days)} days, on {until.date()}"
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
            since=until - _CERTIFICATE_DAYS * _DAY,
        )


def _refusals(facts: Facts, _settings: AlertSettings) -> Iterator[RuleReading]:
    for (edge, code), count in facts.refusals.items():
        sentence = (
            f"{edge} has refused {count} sessions as {code!r} within {_WINDOW // timedelta(minutes=1)} minutes: `fleet "
            f"admin events --edge {edge} --code {code}` says whose."
        )
        yield _above(f"{edge} {code}", count, _REFUSALS - 1, sentence)


def _belongs(machine: DeviceSigns | EdgeView, now: datetime) -> bool:
    """A machine that was not heard for long is no longer part of the fleet."""
    last = machine.last_sign_at if isinstance(machine, DeviceSigns) else machine.seen_at
    return now - last <= _GONE


def _when(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"


RULES: Final = (
    AlertRule(
        "device-offline",
        "{number} devices are offline: check their power and their network, then `fleet device doctor` there.",
        "The device {subject} no longer counts as offline.",
        _device_offline,
    ),
    AlertRule(
        "edge-offline",
        "{number} edges are offline: the logs of their services say why (journalctl -u fleet-edge).",
        "The edge {subject} no longer counts as offline.",
        _edge_offline,
    ),
    AlertRule(
        "edge-silent",
        "The database has nothing new of {number} edges: they have died, or cannot reach the database; look at the "
        "logs of their services (journalctl -u fleet-edge).",
        "The edge {subject} no longer counts as silent.",
        _edge_silent,
    ),
    AlertRule(
        "kv-full",
        "Sessions hold nearly all memory for keys and values of {number} edges: raise `kv_bytes`, or add an edge.",
        "Sessions no longer hold nearly all memory for keys and values of {subject}.",
        _kv_full,
    ),
    AlertRule(
        "certificate-ends",
        f"{{number}} certificates end within {_CERTIFICATE_DAYS:g} days, or have ended: renew them, by "
        "playbooks/rotate_certs.yml or `fleet broker renew`.",
        "The certificate of {subject} no longer counts as ending soon.",
        _certificate_ends,
    ),
    AlertRule(
        "refusals",
        "Edges refuse many sessions, with {number} codes or at as many edges: `fleet admin events --count edge,code "
        "--kind refused` says which.",
        "There are no longer many refusals: {subject}.",
        _refusals,
    ),
)
"""All rules, in the order in which they are evaluated."""

_RULES: Final = {rule.name: rule for rule in RULES}
_NAMED: Final = 3


@dataclass(frozen=True, slots=True)
class AlertGroup:
    """The alerts of one rule that are open, as one line for people."""

    rule: str
    alerts: Sequence[AlertView]

    @property
    def critical(self) -> int:
        return sum(each.severity == AlertSeverity.CRITICAL for each in self.alerts)

    @property
    def severity(self) -> str:
        return AlertSeverity.CRITICAL if self.critical else AlertSeverity.WARNING

    @property
    def since_at(self) -> datetime:
        return min(each.since_at for each in self.alerts)

    @property
    def subjects(self) -> str:
        names = [each.subject for each in self.alerts]
        rest = len(names) - _NAMED
        return ", ".join(names if rest <= 1 else [*names[:_NAMED], f"and {rest} more"])

    @property
    def sentence(self) -> str:
        return sentence_about(self.alerts)


def sentence_about(alerts: Sequence[AlertView] | Sequence[Alert]) -> str:
    """Return one sentence about alerts of one rule."""
    number = len(alerts)
    if number == 1:
        return alerts[0].sentence
    rule = _RULES.get(alerts[0].rule)
    if rule is None:
        return f"{number} alerts of a rule that this release does not have."
    if not _is_open(alerts[0]):
        return f"{number} alerts of the rule {rule.name} are over."
    critical = sum(each.severity == AlertSeverity.CRITICAL for each in alerts)
    return rule.several.format(number=number) + (f" {critical} are critical." if 0 < critical < number else "")


def _is_open(alert: AlertView | Alert) -> bool:
    return alert.open if isinstance(alert, AlertView) else alert.state is not AlertState.CLEARED


def sentence_when_over(alert: AlertView) -> str:
    rule = _RULES.get(alert.rule)
    return f"The alert about {alert.subject} is over." if rule is None else rule.over.format(subject=alert.subject)


def grouped(alerts: Iterable[AlertView]) -> list[AlertGroup]:
    """Group open alerts by rule: first those with critical ones, then the largest."""
    by_rule: dict[str, list[AlertView]] = {}
    for alert in alerts:
        by_rule.setdefault(alert.rule, []).append(alert)
    groups = [
        AlertGroup(rule, sorted(own, key=lambda each: (each.severity != AlertSeverity.CRITICAL, each.subject)))
        for rule, own in by_rule.items()
    ]
    return sorted(groups, key=lambda each: (not each.critical, -len(each.alerts), each.rule))

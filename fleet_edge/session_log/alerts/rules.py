"""Rules of alerts: conditions on facts that a few bounded, indexed queries read from the session log.

Six conditions for fleets without Prometheus; `monitoring/prometheus/alerts.yml` has the rest.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final, NamedTuple

from sqlalchemy import Connection, func, select

from fleet_edge.session_log import queries
from fleet_edge.session_log.event_codes import EventKind
from fleet_edge.session_log.tables import EVENTS
from fleet_edge.session_log.views import AlertSeverity, AlertView, DeviceSigns, EdgeView, MachineState

if TYPE_CHECKING:
    from fleet_edge.session_log.alerts.settings import AlertSettings

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


class AlertProblem(NamedTuple):
    """Finding of a rule about one subject.

    `value` was measured, `threshold` is its limit, `device` the subject if it is a device. `since` is the begin if the
    log has it. A problem that is only `near` keeps its alert open and opens none, so that a value at the threshold
    makes one alert, not many.
    """

    subject: str
    sentence: str
    severity: AlertSeverity = AlertSeverity.WARNING
    value: float | None = None
    threshold: float | None = None
    device: str | None = None
    since: datetime | None = None
    near: bool = False


Problems = Mapping[tuple[str, str], AlertProblem]
"""By rule and subject."""


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
    refused = (
        select(EVENTS.c.edge, EVENTS.c.code, func.sum(EVENTS.c.count))
        .where(EVENTS.c.at >= now - _WINDOW, EVENTS.c.kind == EventKind.REFUSED.value)
        .group_by(EVENTS.c.edge, EVENTS.c.code)
    )
    refusals = Counter[tuple[str, str]]()
    for edge, code, count in connection.execute(refused):
        refusals[edge, code[:_LONGEST_CODE]] += int(count)
    return Facts(
        now=now,
        devices=queries.offline_or_expiring(connection, now=now, until=now + _CERTIFICATE_DAYS * _DAY),
        edges=queries.read_edges(connection, now=now),
        refusals=refusals,
    )


@dataclass(frozen=True, slots=True)
class AlertRule:
    """A rule. Its `name` is in the log and in messages, and never changes.

    `several` is the sentence about a `{number}` of open alerts, `over` that about one of a `{subject}` that is over:
    the problem has ended, or the subject has left the fleet.
    """

    name: str
    several: str
    over: str
    find: "Callable[[Facts, AlertSettings], Iterable[AlertProblem]]"


def find_problems(facts: Facts, settings: "AlertSettings") -> Problems:
    return {(rule.name, each.subject): each for rule in RULES for each in rule.find(facts, settings)}


def _above(subject: str, value: float, threshold: float, sentence: str) -> Iterator[AlertProblem]:
    if value > threshold * (1.0 - _SLACK):
        yield AlertProblem(subject, sentence, value=value, threshold=threshold, near=value <= threshold)


def _device_offline(facts: Facts, settings: "AlertSettings") -> Iterator[AlertProblem]:
    threshold = timedelta(minutes=settings.offline_min)
    for device in facts.devices:
        age = facts.now - device.last_sign_at
        if device.offline and threshold < age <= _GONE:
            yield AlertProblem(
                device.device,
                f"The device {device.device} is offline since {_when(device.last_sign_at)}: check its power, its "
                "network, and `fleet device doctor` there.",
                value=age.total_seconds(),
                threshold=threshold.total_seconds(),
                device=device.device,
                since=device.last_sign_at,
            )


def _edge_offline(facts: Facts, _settings: "AlertSettings") -> Iterator[AlertProblem]:
    sentence = "The edge {} is offline since {}: its service's log says why (journalctl -u fleet-edge)."
    return _edges_away(facts, MachineState.OFFLINE, sentence)


def _edge_silent(facts: Facts, _settings: "AlertSettings") -> Iterator[AlertProblem]:
    sentence = (
        "The database has nothing of the edge {} since {}: it has died, or it cannot reach the database and keeps what "
        "it writes in its spool; look at its service's log (journalctl -u fleet-edge)."
    )
    return _edges_away(facts, MachineState.SILENT, sentence)


def _edges_away(facts: Facts, state: MachineState, sentence: str) -> Iterator[AlertProblem]:
    for edge in facts.edges:
        age = facts.now - edge.seen_at
        if edge.state is state and age <= _GONE:
            yield AlertProblem(
                edge.edge,
                sentence.format(edge.edge, _when(edge.seen_at)),
                severity=AlertSeverity.CRITICAL,
                value=age.total_seconds(),
                threshold=_EDGE_AWAY.total_seconds(),
                since=edge.seen_at,
                near=age <= _EDGE_AWAY,
            )


_AWAY: Final = (MachineState.OFFLINE, MachineState.SILENT, MachineState.LOADING)


def _kv_full(facts: Facts, _settings: "AlertSettings") -> Iterator[AlertProblem]:
    for edge in facts.edges:
        if edge.kv_usage is not None and edge.state not in _AWAY:
            sentence = (
                f"Sessions hold {edge.kv_usage:.0%} of the memory for keys and values of {edge.edge}: raise "
                "`kv_bytes`, or add an edge."
            )
            yield from _above(edge.edge, edge.kv_usage, _KV_SHARE, sentence)


def _certificate_ends(facts: Facts, _settings: "AlertSettings") -> Iterator[AlertProblem]:
    machines = [(each.edge, None, each.seen_at, each.certificate_until) for each in facts.edges] + [
        (each.device, each.device, each.last_sign_at, each.certificate_until) for each in facts.devices
    ]
    for name, device, last_sign_at, until in machines:
        if until is None or facts.now - last_sign_at > _GONE:
            continue
        days = (until - facts.now) / _DAY
        if days >= _CERTIFICATE_DAYS:
            continue
        when = f"has ended on {until.date()}" if days < 0 else f"ends in {math.floor(days)} days, on {until.date()}"
        yield AlertProblem(
            name,
            f"The certificate of {name} {when}: renew it, by playbooks/rotate_certs.yml or `fleet broker renew`.",
            severity=AlertSeverity.CRITICAL if days < _CRITICAL_DAYS else AlertSeverity.WARNING,
            value=days,
            threshold=_CERTIFICATE_DAYS,
            device=device,
            since=until - _CERTIFICATE_DAYS * _DAY,
        )


def _refusals(facts: Facts, _settings: "AlertSettings") -> Iterator[AlertProblem]:
    for (edge, code), count in facts.refusals.items():
        sentence = (
            f"{edge} has refused {count} sessions as {code!r} within {_WINDOW // timedelta(minutes=1)} minutes: `fleet "
            f"admin events edge={edge} code={code}` says whose."
        )
        yield from _above(f"{edge} {code}", count, _REFUSALS - 1, sentence)


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
        "kind=refused` says which.",
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
        number, rule = len(self.alerts), _RULES.get(self.rule)
        if number == 1:
            return self.alerts[0].sentence
        if rule is None:
            return f"{number} alerts of a rule that this release does not have."
        if not self.alerts[0].open:
            return f"{number} alerts of the rule {rule.name} are over."
        some = f" {self.critical} are critical." if 0 < self.critical < number else ""
        return rule.several.format(number=number) + some


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

"""Rules: what of the facts is wrong, and what is right again. Pure; no clock, no database.

A rule reads a value of each of its subjects. It is wrong on one side of a threshold, right when it is clearly on the
other, and between the two it stays what it was: so a value that wavers at its threshold makes one alert, not many.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from fleet_admin.alerts.facts import DeviceFacts, EdgeFacts, Facts
from fleet_admin.alerts.settings import AlertSettings
from fleet_admin.alerts.views import AlertSeverity
from fleet_edge.counters import share
from fleet_edge.store.states import MachineState

_FEWEST_ROUNDS: Final = 20
"""Below them a percentile says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a rule says of one subject.

    Attributes:
        subject: Of whom.
        sentence: What is wrong, and what to do; for when it is.
        wrong: Whether it is on the wrong side of the threshold.
        right: Whether it is clearly on the other. Neither: it stays what it was.
        severity: How soon somebody has to look.
        value: What was measured, if it is a number.
        threshold: What it is held against.
        device: The subject, if it is a device.
    """

    subject: str
    sentence: str
    wrong: bool
    right: bool
    severity: AlertSeverity = AlertSeverity.WARNING
    value: float | None = None
    threshold: float | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule.

    Attributes:
        name: Stands in the log, in what is told, and in the metrics' world; stays for good.
        meaning: One sentence.
        read: Returns a reading for each subject of which something can be said. Of whom nothing can be said, nothing is
            wrong.
    """

    name: str
    meaning: str
    read: Callable[[Facts, AlertSettings], Iterable[Reading]]


def readings(facts: Facts, settings: AlertSettings) -> Iterator[tuple[str, Reading]]:
    """Yield what all rules say, each with its rule's name."""
    for rule in RULES:
        for reading in rule.read(facts, settings):
            yield rule.name, reading


def _above(value: float, threshold: float, slack: float) -> tuple[bool, bool]:
    """Return whether a value is too high, and whether it is clearly not."""
    return value > threshold, value <= threshold * (1.0 - slack)


# Devices


def _silent(facts: Facts, settings: AlertSettings) -> Iterator[Reading]:
    for device in facts.devices:
        offline = device.state is MachineState.OFFLINE
        # An idle device is silent too, and the broker reports one whose connection is gone within seconds.
        hours = settings.offline_min / 60.0 if offline else settings.silent_h
        if not hours or not _belongs(device, facts.now, settings):
            continue
        threshold, age = timedelta(hours=hours), facts.now - device.seen_at
        how = "is offline" if offline else "is connected, and nothing comes from it"
        wrong = age > threshold and (offline or device.state is MachineState.SILENT)
        yield Reading(
            subject=device.name,
            sentence=f"The device {device.name} {how} since {_when(device.seen_at)}: look at its power, its network, "
            "and `fleet device doctor` there.",
            wrong=wrong,
            right=not wrong,
            value=age.total_seconds(),
            threshold=threshold.total_seconds(),
            device=device.name,
        )


def _acceptance_low(facts: Facts, settings: AlertSettings) -> Iterator[Reading]:
    if not settings.acceptance_share:
        return
    for device, counted in facts.acceptance.items():
        hour = share(counted.accepted_hour, counted.tested_hour)
        day = share(counted.accepted_day, counted.tested_day)
        if hour is None or day is None or min(counted.tested_hour, counted.tested_day) < settings.acceptance_tokens:
            continue
        threshold = settings.acceptance_share * day
        yield Reading(
            subject=device,
            sentence=f"Of the draft tokens of {device} {hour:.0%} were accepted in the latest hour, and {day:.0%} in "
            "the day before: its texts or its draft model have changed.",
            wrong=hour < threshold,
            right=hour >= threshold + settings.slack * (day - threshold),
            value=hour,
            threshold=threshold,
            device=device,
        )


def _clock_wrong(facts: Facts, settings: AlertSettings) -> Iterator[Reading]:
    if not settings.clocks:
        return
    for device, sentence in facts.skews.items():
        yield Reading(subject=device, sentence=sentence, wrong=True, right=False, device=device)


# Edges


def _edge_away(facts: Facts, settings: AlertSettings) -> Iterator[Reading]:
    if not settings.edge_away_s:
        return
    for edge in facts.edges:
        age = facts.now - edge.seen_at
        if _belongs(edge, facts.now, settings):
            offline = edge.state is MachineState.OFFLINE
            yield Reading(
                subject=edge.name,
                sentence=f"The edge {edge.name} is offline since {_when(edge.seen_at)}: its service's log says why "
                "(journalctl -u fleet-edge).",
                wrong=offline and age > timedelta(seconds=settings.edge_away_s),
                right=not offline,
                severity=AlertSeverity.CRITICAL,
                value=age.total_seconds(),
                threshold=settings.edge_away_s,
            )


def _queue_long(facts: Facts, settings: AlertSettings) -> Iterator[Reading]:
    sentence = "Drafts wait {value:.0f} ms for a step at {edge} (95th percentile): it has more devices than it serves "
    for edge in facts.edges:
        yield from _percentile(edge, edge.queue_ms, settings.queue_p95_ms, sentence + "in time.", settings)


def _step_long(facts: Facts, settings: AlertSettings) -> Iterator[Reading]:
    sentence = "A step of {edge} takes {value:.0f} ms (95th percentile): something else uses its machine, or batches "
    for edge in facts.edges:
        yield from _percentile(edge, edge.step_ms, settings.step_p95_ms, sentence + "are too large.", settings)


def _percentile(
    edge: EdgeFacts, values: Sequence[float], threshold: float, sentence: str, settings: AlertSettings
) -> Iterator[Reading]:
    if not threshold or len(values) < _FEWEST_ROUNDS:
        return
    value = sorted(values)[math.ceil(0.95 * len(values)) - 1]
    wrong, right = _above(value, threshold, settings.slack)
    yield Reading(
        subject=edge.name,
        sentence=sentence.format(value=value, edge=edge.name),
        wrong=wrong,
        right=right,
        value=value,
        threshold=threshold,
    )


def _kv_full(facts: Facts, settings: AlertSettings) -> Iterator[Reading]:
    for edge in facts.edges:
        if settings.kv_share and edge.kv_usage is not None and _online(edge):
            wrong, right = _above(edge.kv_usage, settings.kv_share, settings.slack)
            yield Reading(
                subject=edge.name,
                sentence=f"Sessions hold {edge.kv_usage:.0%} of the memory for keys and values of {edge.name}: raise "
                "`kv_bytes`, or add an edge.",
                wrong=wrong,
                right=right,
                value=edge.kv_usage,
                threshold=settings.kv_share,
            )


def _spool_grows(facts: Facts, settings: AlertSettings) -> Iterator[Reading]:
    for edge in facts.edges:
        if settings.spool_records and edge.spooled_records is not None:
            wrong, right = _above(edge.spooled_records, settings.spool_records - 1, settings.slack)
            yield Reading(
                subject=edge.name,
                sentence=f"{edge.spooled_records} records of {edge.name} wait in its spool: its database does not keep "
                "up, or was away.",
                wrong=wrong,
                right=right,
                value=edge.spooled_records,
                threshold=settings.spool_records,
            )


def _database_lags(facts: Facts, settings: AlertSettings) -> Iterator[Reading]:
    for edge in facts.edges:
        if settings.lag_s and edge.load_at is not None and _online(edge) and _belongs(edge, facts.now, settings):
            lag_s = (facts.now - edge.load_at).total_seconds()
            wrong, right = _above(lag_s, settings.lag_s, settings.slack)
            yield Reading(
                subject=edge.name,
                sentence=f"{edge.name} is online, and the database has nothing of it since {_when(edge.load_at)}: what "
                "it writes waits in its spool; look at the way from it to the database.",
                wrong=wrong,
                right=right,
                severity=AlertSeverity.CRITICAL,
                value=lag_s,
                threshold=settings.lag_s,
            )


# Certificates


def _certificate_ends(facts: Facts, settings: AlertSettings) -> Iterator[Reading]:
    machines: list[DeviceFacts | EdgeFacts] = [*facts.edges, *facts.devices]
    for machine in machines:
        name, until = machine.name, machine.certificate_until
        if until is None or not settings.certificate_days or not _belongs(machine, facts.now, settings):
            continue
        days = (until - facts.now) / timedelta(days=1)
        wrong = days < settings.certificate_days
        when = f"has ended on {until:%Y-%m-%d}" if days < 0 else f"ends in {math.floor(days)} days, on {until:%Y-%m-%d}"
        yield Reading(
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


# Refusals and faults


def _refusals(facts: Facts, settings: AlertSettings) -> Iterator[Reading]:
    for (edge, code), count in facts.refusals.items():
        if settings.refusals:
            wrong, right = _above(count, settings.refusals - 1, settings.slack)
            yield Reading(
                subject=f"{edge} {code}",
                sentence=f"{edge} has refused {count} sessions as {code!r} within {settings.window_min:g} minutes: "
                f"`fleet admin events --edge {edge} --code {code}` says whose.",
                wrong=wrong,
                right=right,
                value=count,
                threshold=settings.refusals,
            )


def _faults(facts: Facts, settings: AlertSettings) -> Iterator[Reading]:
    for (edge, code), count in facts.faults.items():
        if settings.faults:
            wrong, right = _above(count, settings.faults - 1, settings.slack)
            yield Reading(
                subject=f"{edge} {code}",
                sentence=f"{edge} could not serve {count} messages, with the code {code!r}, within "
                f"{settings.window_min:g} minutes: `fleet admin events --edge {edge} --code {code}` says whose.",
                wrong=wrong,
                right=right,
                value=count,
                threshold=settings.faults,
            )


def _belongs(machine: DeviceFacts | EdgeFacts, now: datetime, settings: AlertSettings) -> bool:
    """Whether a machine is still taken for one of the fleet."""
    return now - machine.seen_at <= timedelta(days=settings.gone_days)


def _online(edge: EdgeFacts) -> bool:
    return edge.state is not MachineState.OFFLINE


def _when(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"


RULES: Final = (
    Rule("device-silent", "A device is offline, or connected and silent for long.", _silent),
    Rule("acceptance-low", "A device's acceptance rate is far below its own of the day before.", _acceptance_low),
    Rule("clock-wrong", "A device's clock is ahead, or has gone back.", _clock_wrong),
    Rule("edge-offline", "An edge is offline.", _edge_away),
    Rule("queue-long", "Drafts wait long for a step.", _queue_long),
    Rule("step-long", "Steps take long.", _step_long),
    Rule("kv-full", "Open sessions hold nearly all memory for keys and values.", _kv_full),
    Rule("spool-grows", "Records of the session log wait in an edge's spool.", _spool_grows),
    Rule("database-lags", "The database has nothing new of an edge that is online.", _database_lags),
    Rule("certificate-ends", "A certificate ends soon, or has ended.", _certificate_ends),
    Rule("refusals", "An edge refuses many sessions with one code.", _refusals),
    Rule("faults", "An edge meets many faults of one code.", _faults),
)
"""All rules, in the order in which they are evaluated."""

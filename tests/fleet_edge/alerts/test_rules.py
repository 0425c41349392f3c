from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from fleet_edge.alerts.alerts import AlertSeverity, RuleReading
from fleet_edge.alerts.rules import RULES, Facts, readings
from fleet_edge.alerts.settings import AlertSettings
from fleet_edge.store.views import DeviceSigns, EdgeView, MachineState
from tests.fleet_edge.store import samples

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
SETTINGS = AlertSettings()

DEVICE = DeviceSigns("gateway-1", offline=False, last_sign_at=NOW, certificate_until=None)
EDGE = samples.view(EdgeView, edge="edge-1", state=MachineState.ONLINE, seen_at=NOW)


def read(rule: str, facts: Facts, settings: AlertSettings = SETTINGS) -> RuleReading | None:
    found = [reading for name, reading in readings(facts, settings) if name == rule]
    assert len(found) <= 1
    return found[0] if found else None


def device(**changed: Any) -> Facts:
    return Facts(now=NOW, devices=[DEVICE._replace(**changed)])


def edge(**changed: Any) -> Facts:
    return Facts(now=NOW, edges=[replace(EDGE, **changed)])


def refused(count: int) -> Facts:
    return Facts(now=NOW, refusals={("edge-1", "busy"): count})


WRONG = {
    "device-offline": [device(offline=True, last_sign_at=NOW - 16 * MINUTE)],
    "edge-offline": [edge(state=MachineState.OFFLINE, seen_at=NOW - 2 * MINUTE)],
    "edge-silent": [edge(state=MachineState.SILENT, seen_at=NOW - 2 * MINUTE)],
    "kv-full": [edge(kv_usage=0.91)],
    "certificate-ends": [
        edge(certificate_until=NOW + 29 * DAY),
        device(certificate_until=NOW + 6 * DAY),
        device(certificate_until=NOW - DAY),
    ],
    "refusals": [refused(20)],
}
RIGHT = {
    "device-offline": [
        device(),
        device(offline=True, last_sign_at=NOW - 14 * MINUTE),
        device(last_sign_at=NOW - 3 * DAY),  # connected and idle
    ],
    "edge-offline": [edge(), edge(state=MachineState.DRAINING), edge(state=MachineState.SILENT, seen_at=NOW - DAY)],
    "edge-silent": [edge(), edge(state=MachineState.OFFLINE, seen_at=NOW - DAY)],
    "kv-full": [edge(kv_usage=0.8)],
    "certificate-ends": [device(certificate_until=NOW + 31 * DAY)],
    "refusals": [refused(5)],
}
BETWEEN = {
    "edge-offline": [edge(state=MachineState.OFFLINE, seen_at=NOW - MINUTE / 2)],
    "edge-silent": [edge(state=MachineState.SILENT, seen_at=NOW - MINUTE / 2)],
    "kv-full": [edge(kv_usage=0.88)],
    "refusals": [refused(18)],
}
NO_READING = {
    "device-offline": [device(offline=True, last_sign_at=NOW - 15 * DAY)],
    "edge-offline": [edge(state=MachineState.OFFLINE, seen_at=NOW - 15 * DAY)],
    "edge-silent": [edge(state=MachineState.SILENT, seen_at=NOW - 15 * DAY)],
    "kv-full": [edge(), edge(kv_usage=1.0, state=MachineState.OFFLINE)],
    "certificate-ends": [device(), device(certificate_until=NOW, last_sign_at=NOW - 15 * DAY)],
}


def each(table: dict[str, list[Facts]]) -> pytest.MarkDecorator:
    cases = [(rule, facts) for rule, found in table.items() for facts in found]
    return pytest.mark.parametrize(("rule", "facts"), cases, ids=[rule for rule, _ in cases])


def test_every_rule_is_held_here() -> None:
    names = [rule.name for rule in RULES]
    assert names == list(WRONG) == list(RIGHT)


@each(WRONG)
def test_it_is_wrong_and_says_so_in_a_sentence(rule: str, facts: Facts) -> None:
    reading = read(rule, facts)
    assert (reading.wrong, reading.right) == (True, False)
    assert reading.sentence.endswith(".")
    assert reading.subject.split()[0] in {"edge-1", "gateway-1"}
    assert (reading.device is not None) == (reading.subject == "gateway-1")


@pytest.mark.parametrize(("table", "right"), [(RIGHT, True), (BETWEEN, False)], ids=["right", "stays what it was"])
def test_it_is_not_wrong(table: dict[str, list[Facts]], right: bool) -> None:
    for rule, found in table.items():
        for facts in found:
            reading = read(rule, facts)
            assert (rule, reading.wrong, reading.right) == (rule, False, right)


@each(NO_READING)
def test_nothing_can_be_said(rule: str, facts: Facts) -> None:
    assert read(rule, facts) is None


def test_a_certificate_in_its_last_week_is_critical() -> None:
    for days, severity in ((8, AlertSeverity.WARNING), (6, AlertSeverity.CRITICAL), (-1, AlertSeverity.CRITICAL)):
        reading = read("certificate-ends", device(certificate_until=NOW + days * DAY))
        assert reading.severity is severity
    assert "has ended" in reading.sentence


def test_a_hostile_name_or_code_stays_what_it_is() -> None:
    hostile = "x'; DROP TABLE alerts; --\n\x1b[31m{value}"
    reading = read("refusals", Facts(now=NOW, refusals={("edge-1", hostile): 100}))
    assert repr(hostile) in reading.sentence

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from fleet_edge.session_log.alerts.rules import RULES, AlertProblem, Facts, find_problems, grouped
from fleet_edge.session_log.alerts.settings import AlertSettings
from fleet_edge.session_log.views import AlertSeverity, AlertView, DeviceSigns, EdgeView, MachineState
from tests.fleet_edge.store import samples

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)
SETTINGS = AlertSettings()

DEVICE = DeviceSigns("gateway-1", offline=False, last_sign_at=NOW, certificate_until=None)
EDGE = samples.view(EdgeView, edge="edge-1", state=MachineState.ONLINE, seen_at=NOW)


def read(rule: str, facts: Facts, settings: AlertSettings = SETTINGS) -> AlertProblem | None:
    found = [problem for (name, _), problem in find_problems(facts, settings).items() if name == rule]
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
        device(offline=True, last_sign_at=NOW - 15 * DAY),
    ],
    "edge-offline": [
        edge(),
        edge(state=MachineState.DRAINING),
        edge(state=MachineState.SILENT, seen_at=NOW - DAY),
        edge(state=MachineState.OFFLINE, seen_at=NOW - 15 * DAY),
    ],
    "edge-silent": [
        edge(),
        edge(state=MachineState.OFFLINE, seen_at=NOW - DAY),
        edge(state=MachineState.SILENT, seen_at=NOW - 15 * DAY),
    ],
    "kv-full": [edge(), edge(kv_usage=0.8), edge(kv_usage=1.0, state=MachineState.OFFLINE)],
    "certificate-ends": [
        device(),
        device(certificate_until=NOW + 31 * DAY),
        device(certificate_until=NOW, last_sign_at=NOW - 15 * DAY),
    ],
    "refusals": [refused(5)],
}
NEAR = {
    "edge-offline": [edge(state=MachineState.OFFLINE, seen_at=NOW - MINUTE / 2)],
    "edge-silent": [edge(state=MachineState.SILENT, seen_at=NOW - MINUTE / 2)],
    "kv-full": [edge(kv_usage=0.88)],
    "refusals": [refused(18)],
}


def test_every_rule_is_held_here() -> None:
    names = [rule.name for rule in RULES]
    assert names == list(WRONG) == list(RIGHT)


@pytest.mark.parametrize(("rule", "facts"), [(rule, facts) for rule, found in WRONG.items() for facts in found])
def test_it_is_wrong_and_says_so_in_a_sentence(rule: str, facts: Facts) -> None:
    problem = read(rule, facts)
    assert not problem.near
    assert problem.sentence.endswith(".")
    assert problem.subject.split()[0] in {"edge-1", "gateway-1"}
    assert (problem.device is not None) == (problem.subject == "gateway-1")


def test_what_is_near_or_right_is_no_problem_yet() -> None:
    for table, near in ((NEAR, True), (RIGHT, None)):
        for rule, found in table.items():
            for facts in found:
                problem = read(rule, facts)
                assert (rule, problem and problem.near) == (rule, near)


def test_a_certificate_in_its_last_week_is_critical() -> None:
    for days, severity in ((8, AlertSeverity.WARNING), (6, AlertSeverity.CRITICAL), (-1, AlertSeverity.CRITICAL)):
        problem = read("certificate-ends", device(certificate_until=NOW + days * DAY))
        assert problem.severity is severity
    assert "has ended" in problem.sentence


def test_a_hostile_name_or_code_stays_what_it_is() -> None:
    hostile = "x'; DROP TABLE alerts; --\n\x1b[31m{value}"
    problem = read("refusals", Facts(now=NOW, refusals={("edge-1", hostile): 100}))
    assert repr(hostile) in problem.sentence


def test_alerts_of_one_rule_are_one_line_the_critical_ones_first() -> None:
    def alert(rule: str, subject: str, severity: AlertSeverity, *, minutes: int) -> AlertView:
        return samples.view(AlertView, rule=rule, subject=subject, severity=severity, since_at=NOW - minutes * MINUTE)

    kv = [alert("kv-full", f"edge-{number}", AlertSeverity.WARNING, minutes=number) for number in (2, 5, 1)]
    ends = [
        alert("certificate-ends", "gateway-1", AlertSeverity.WARNING, minutes=9),
        alert("certificate-ends", "gateway-2", AlertSeverity.CRITICAL, minutes=3),
    ]
    found = [
        (each.rule, each.severity, each.critical, each.since_at, [one.subject for one in each.alerts])
        for each in grouped([*kv, *ends])
    ]
    assert found == [
        ("certificate-ends", AlertSeverity.CRITICAL, 1, NOW - 9 * MINUTE, ["gateway-2", "gateway-1"]),
        ("kv-full", AlertSeverity.WARNING, 0, NOW - 5 * MINUTE, ["edge-1", "edge-2", "edge-5"]),
    ]

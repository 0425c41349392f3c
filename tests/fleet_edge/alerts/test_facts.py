from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from fleet_edge.session_log.alerts.evaluator import RunningAlerts
from fleet_edge.session_log.alerts.rules import AlertProblem, Facts, read_facts
from fleet_edge.session_log.alerts.settings import AlertSettings
from fleet_edge.session_log.database import Store, transaction
from fleet_edge.session_log.log import SessionLog
from fleet_edge.session_log.quarantines import quarantine_device
from fleet_edge.session_log.records import Record, event_record
from fleet_edge.session_log.steering import retire
from fleet_edge.session_log.views import AlertSeverity
from schemas.control import Presence
from tests.fleet_edge.store import samples

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
SETTINGS = AlertSettings(hold_s=0)


def facts(store: Store, *records: Record) -> Facts:
    store.apply(records)
    with store.engine.connect() as connection:
        return read_facts(connection, now=NOW)


def event(kind: str, code: str, count: int, *, at: datetime = NOW - MINUTE, device: str = "sensor-1") -> Record:
    return event_record(
        at,
        id=f"{kind}-{code}-{device}-{at.timestamp()}",
        edge="edge-1",
        device=device,
        session=None,
        kind=kind,
        code=code,
        sentence=f"{device}: {code}.",
        count=count,
    )


def test_devices_and_edges_with_their_certificates_and_load(store: Store) -> None:
    until = NOW + timedelta(days=3)
    found = facts(
        store,
        samples.device_seen(at=NOW - HOUR, presence=Presence.OFFLINE, certificate_until=until),
        samples.edge_seen(at=NOW - MINUTE, certificate_until=until),
        samples.edge_load(at=NOW - MINUTE, kv_usage=0.95, spooled_records=7),
    )
    (device,), (edge,) = found.devices, found.edges
    assert (device.device, device.offline, device.last_sign_at) == ("sensor-1", True, NOW - HOUR)
    assert device.certificate_until == edge.certificate_until == until
    assert (edge.edge, edge.kv_usage, edge.spooled_records, edge.load_at) == ("edge-1", 0.95, 7, NOW - MINUTE)


def test_refusals_by_code_within_the_window(store: Store) -> None:
    found = facts(
        store,
        event("refused", "busy", 12),
        event("refused", "busy", 9, device="sensor-2"),
        event("refused", "busy", 1000, at=NOW - HOUR),
        event("fault", "malformed", 3),
    )
    assert found.refusals == {("edge-1", "busy"): 21}


def evaluator(store: Store, holder: str = "first") -> RunningAlerts:
    return RunningAlerts(partial(transaction, store.engine), SETTINGS, now=lambda: NOW, holder=holder)


def test_from_the_log_to_an_alert_and_back(store: Store, log: SessionLog) -> None:
    store.apply([samples.edge_load(at=NOW, kv_usage=0.95), samples.edge_seen(at=NOW)])
    running = evaluator(store)
    assert [(each.rule, each.subject) for each in running.step() or []] == [("kv-full", "edge-1")]
    assert running.step() == []
    store.apply([samples.edge_load(at=NOW + MINUTE, kv_usage=0.5)])
    assert [each.open for each in running.step() or []] == [False]
    assert log.alerts(open=True) == []
    assert evaluator(store, "another").step() is None


@pytest.mark.parametrize("hostile", ["'; DROP TABLE alerts; --", "%", "x" * 10_000, "é\x00"])
def test_hostile_names_in_the_log_break_nothing(store: Store, log: SessionLog, hostile: str) -> None:
    store.apply([event("refused", hostile, 100)])
    (opened,) = evaluator(store).step() or []
    assert opened.rule == "refusals"
    assert [each.id for each in log.alerts()] == [opened.id]


def test_a_device_that_is_out_of_service_is_no_alert(store: Store) -> None:
    for name in ("in-service", "retired"):
        store.apply([samples.device_seen(device=name, at=NOW, presence=Presence.OFFLINE)])
    with store.engine.begin() as connection:
        assert retire(connection, "retired", NOW)
    assert [each.device for each in facts(store).devices] == ["in-service"]


def test_a_quarantined_device_is_not_offline(store: Store) -> None:
    store.apply([samples.device_seen(device=name, at=NOW, presence=Presence.OFFLINE) for name in ("shut-out", "away")])
    with store.engine.begin() as connection:
        quarantine_device(connection, "shut-out", until=None, reason="It floods.", now=NOW - MINUTE)
    assert {each.device: each.offline for each in facts(store).devices} == {"away": True, "shut-out": False}


def test_a_device_whose_program_has_closed_it_is_not_missed(store: Store) -> None:
    store.apply([samples.device_seen(at=NOW - HOUR, presence=Presence.CLOSED)])
    assert not any(each.offline for each in facts(store).devices)


def test_an_edge_that_died_before_its_first_load_is_missed(store: Store) -> None:
    store.apply([samples.edge_seen(at=NOW - 2 * MINUTE)])
    (missed,) = evaluator(store).step() or []
    assert (missed.rule, missed.subject, missed.since_at) == ("edge-silent", "edge-1", NOW - 2 * MINUTE)


def test_what_cannot_wait_is_listed_first_while_it_is_open(store: Store, log: SessionLog) -> None:
    problems = [
        AlertProblem(subject=subject, severity=severity, sentence="It is away.", since=NOW - hours * HOUR)
        for hours, subject, severity in (
            (3, "old", AlertSeverity.CRITICAL),
            (2, "b", AlertSeverity.WARNING),
            (1, "c", AlertSeverity.WARNING),
        )
    ]
    samples.open_alerts(store, [("edge-offline", each) for each in problems], since=NOW, now=NOW)
    assert [each.subject for each in log.alerts(open=True)] == ["old", "c", "b"]


def test_only_devices_that_a_rule_may_concern_are_read(store: Store) -> None:
    ends = {"soon": NOW + timedelta(days=29), "later": NOW + timedelta(days=31)}
    for name, until in ends.items():
        store.apply([samples.device_seen(device=name, at=NOW, certificate_until=until)])
    store.apply([samples.device_seen(device="away", at=NOW, presence=Presence.OFFLINE)])
    assert [each.device for each in facts(store).devices] == ["away", "soon"]

from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from fleet_edge.session_log.alerts.evaluator import RunningAlerts
from fleet_edge.session_log.alerts.rules import AlertProblem
from fleet_edge.session_log.alerts.settings import AlertSettings
from fleet_edge.session_log.database import open_store, transaction
from schemas.control import Presence
from tests.fleet_edge.store import samples
from tests.support.command import Run, as_json


@pytest.fixture
def url(tmp_path: Path) -> str:
    url, at = f"sqlite:///{tmp_path / 'fleet.sqlite3'}", datetime.now(UTC) - timedelta(hours=1)
    with open_store(url) as store:
        store.apply(
            [samples.device_seen(presence=Presence.OFFLINE, at=at), samples.edge_seen(presence=Presence.OFFLINE, at=at)]
        )
    return url


def evaluate(url: str) -> None:
    with open_store(url) as store:
        RunningAlerts(partial(transaction, store.engine), AlertSettings(hold_s=0)).step()


def test_open_alerts_are_listed_and_those_that_are_over_on_request(admin: Run, url: str) -> None:
    code, output, complaint = admin("alerts")
    assert (code, output) == (0, "No alert is known to be open.\n")
    assert "Never evaluated" in complaint
    assert admin("alerts", "--all")[1] == "There are no alerts.\n"
    evaluate(url)
    assert admin("alerts")[2] == "", "evaluated less than a minute ago"
    found = as_json(admin("alerts", "--json"))
    assert {(each["rule"], each["subject"]) for each in found} == {
        ("device-offline", "sensor-1"),
        ("edge-offline", "edge-1"),
    }
    assert "Alerts: 2" in admin("alerts")[1]
    with open_store(url) as store:
        store.apply([samples.device_seen(presence=Presence.ONLINE, at=datetime.now(UTC))])
    evaluate(url)
    assert len(as_json(admin("alerts", "--json"))) == 1
    assert len(as_json(admin("alerts", "--all", "--json"))) == 2


def test_60_certificates_are_one_line(admin: Run, url: str) -> None:
    now = datetime.now(UTC)
    problems = [AlertProblem(subject=f"gateway-{number:02}", sentence="It ends.") for number in range(60)]
    with open_store(url) as store:
        samples.open_alerts(store, [("certificate-ends", each) for each in problems], since=now, now=now)
    _, output, _ = admin("alerts")
    (line,) = [line for line in output.splitlines() if "certificate" in line]
    assert "60 certificates" in line
    assert "gateway-00, gateway-01, gateway-02, and 57 more" in line
    _, each, _ = admin("alerts", "--each", "--limit", "60")
    assert sum("certificate-ends" in line for line in each.splitlines()) == 60


def test_thousands_of_open_alerts_are_all_counted(admin: Run, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = (f"{number:08x}" for number in count())
    monkeypatch.setattr("secrets.token_hex", lambda _bytes: next(ids))  # drawn ones may collide
    now = datetime.now(UTC)
    problems = [AlertProblem(subject=f"gateway-{number}", sentence="It ends.") for number in range(1001)]
    with open_store(url) as store:
        samples.open_alerts(store, [("certificate-ends", each) for each in problems], since=now, now=now)
    assert "Alerts: 1001, conditions: 1" in admin("alerts")[1]

import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import pytest

from fleet_edge.alerts import alerts as book
from fleet_edge.alerts.alerts import Alerts, RuleReading
from fleet_edge.store.database import open_store
from schemas.control import Presence
from tests.fleet_edge.store import samples
from tests.support.command import Run, as_json, refused


@pytest.fixture
def url(tmp_path: Path) -> str:
    url, at = f"sqlite:///{tmp_path / 'fleet.sqlite3'}", datetime.now(UTC) - timedelta(hours=1)
    with open_store(url) as store:
        store.apply(
            [samples.device_seen(presence=Presence.OFFLINE, at=at), samples.edge_seen(presence=Presence.OFFLINE, at=at)]
        )
    return url


def watch(url: str, folder: Path) -> None:
    (folder / "alerts.toml").write_text("hold_s = 0\n")
    program = [sys.executable, "-m", "fleet_cli.main", "admin", "alerts", "--watch", "--db", url]
    with subprocess.Popen(
        [*program, "--config", str(folder / "alerts.toml")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        lines = [process.stdout.readline() for _ in range(2)]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 0
    assert sorted(line.split()[4].rstrip(":") for line in lines) == ["device-offline", "edge-offline"]


def test_from_nothing_through_watching_to_acknowledged_and_cleared(admin: Run, url: str, tmp_path: Path) -> None:
    code, output, complaint = admin("alerts")
    assert (code, output) == (0, "No alert is known to be open.\n")
    assert "Never evaluated" in complaint
    assert admin("alerts", "--all")[1] == "There are no alerts.\n"
    watch(url, tmp_path)
    assert admin("alerts")[2] == "", "evaluated less than a minute ago"
    found = as_json(admin("alerts", "--json"))
    assert {(each["rule"], each["subject"]) for each in found} == {
        ("device-offline", "sensor-1"),
        ("edge-offline", "edge-1"),
    }
    assert "Alerts: 2" in admin("alerts")[1]
    alert = found[0]["id"]
    assert "ada" in admin("alerts", "--ack", alert, "--as", "ada")[1]
    assert "is cleared" in admin("alerts", "--clear", alert)[1]
    assert len(as_json(admin("alerts", "--json"))) == 1
    assert len(as_json(admin("alerts", "--all", "--json"))) == 2


def test_60_certificates_are_one_line_that_is_acknowledged_at_once(admin: Run, url: str) -> None:
    now = datetime.now(UTC)
    with Alerts(url) as alerts, alerts.connection() as connection:
        readings = [RuleReading(subject=f"gateway-{number:02}", sentence="It ends.") for number in range(60)]
        book.note_wrong(connection, [("certificate-ends", each, now) for each in readings], held={}, now=now)
    _, output, _ = admin("alerts")
    (line,) = [line for line in output.splitlines() if "certificate" in line]
    assert line.startswith("certificate-ends")
    assert "60 certificates" in line
    assert "gateway-00, gateway-01, gateway-02, and 57 more" in line
    _, each, _ = admin("alerts", "--each")
    assert sum("certificate-ends" in line for line in each.splitlines()) == 60
    reference = line.split()[0]
    assert len(admin("alerts", "--ack", reference, "--as", "ada")[1].splitlines()) == 60
    assert {each["acknowledged_by"].split()[0] for each in as_json(admin("alerts", "--json"))} == {"ada"}


def test_thousands_of_open_alerts_are_all_counted(admin: Run, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = (f"{number:08x}" for number in count())
    monkeypatch.setattr("secrets.token_hex", lambda _bytes: next(ids))  # drawn ones may collide
    now = datetime.now(UTC)
    with Alerts(url) as alerts, alerts.connection() as connection:
        readings = [RuleReading(subject=f"gateway-{number}", sentence="It ends.") for number in range(1001)]
        book.note_wrong(connection, [("certificate-ends", each, now) for each in readings], held={}, now=now)
    assert "Alerts: 1001, conditions: 1" in admin("alerts")[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--ack", "00", "--clear", "00"), "--clear"),
        (("--ack", "00"), "00"),
        (("--clear", "../x"), "alert"),
        (("--watch", "--config", "/nowhere/alerts.toml"), "alerts.toml"),
    ],
)
def test_what_is_wrong_is_a_sentence(admin: Run, arguments: tuple[str, ...], sentence: str) -> None:
    assert sentence in refused(admin("alerts", *arguments))

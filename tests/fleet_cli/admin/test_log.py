import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fleet_cli import tables
from fleet_edge.session_log.database import open_store
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.samples import OTHER, SESSION
from tests.support.command import Run, as_json, refused
from tests.support.waiting import PATIENCE_S


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'fleet.sqlite3'}"
    recent = datetime.now(UTC) - timedelta(minutes=10)
    with open_store(url) as store:
        store.apply([*samples.two_sessions(recent), samples.device_seen(draft_model="[bold]\x1b[2Jmodel")])
    return url


def test_a_label_from_a_device_can_neither_style_nor_move_the_terminal(admin: Run) -> None:
    _, output, _ = admin("devices")
    assert "last active (UTC)" in output
    assert "[bold]\ufffd[2Jmodel" in output
    assert "\x1b[2J" not in output


def test_a_device_is_shown_with_hours_sessions_and_events(admin: Run) -> None:
    _, output, _ = admin("device", "sensor-1")
    for expected in ("sensor-1", "Latest hours", SESSION, "tokens-differ", "The prefix differs."):
        assert expected in output
    shown = as_json(admin("device", "sensor-1", "--json"))
    assert set(shown) == {"device", "diagnosis", "hours", "sessions", "events"}
    assert shown["hours"][0]["counted"]["tokens"] == 20
    assert shown["sessions"][0]["counted"]["acceptance"] == 0.75


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), [OTHER, SESSION]),
        (("edge=edge-1", "--limit", "1"), [OTHER]),
        (("mode=coupled",), [OTHER]),
        (("--since", "2h"), [OTHER]),
        (("--until", "2026-03-04T12:00"), [SESSION]),
        (("--until", "2026-03-04T12:30+02:00"), []),
    ],
)
def test_sessions_are_filtered(admin: Run, arguments: tuple[str, ...], expected: list[str]) -> None:
    assert [session["session"] for session in as_json(admin("sessions", *arguments, "--json"))] == expected


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "terminal_width", lambda: 80)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("command", [("sessions",), ("devices",), ("usage",), ("devices", "state!=offline")])
def test_all_columns_are_what_a_pipe_is_given(
    admin: Run, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, wide, _ = admin(*command, "--columns", "all")
    _, narrow, _ = admin(*command)
    monkeypatch.setattr(tables, "terminal_width", lambda: None)
    _, piped, _ = admin(*command)
    assert wide == piped
    assert max(map(len, narrow.splitlines())) <= 80 < max(map(len, wide.splitlines()))


def test_a_session_is_shown_by_a_prefix_with_both_counts_and_its_rounds(admin: Run) -> None:
    _, output, _ = admin("session", SESSION[:5], "--rounds")
    for expected in (SESSION, str(2**64 - 1), "by the device", "Segments", "Rounds: 1", "sparse", "drafting"):
        assert expected in output
    _, output, _ = admin("session", OTHER[:2], "--rounds")
    assert "No rounds" in output
    shown = as_json(admin("session", SESSION[:5], "--json"))
    assert set(shown) == {"session", "segments", "events"}
    assert (shown["session"]["device_accepted"], shown["session"]["counted"]["accepted"]) == (30, 15)
    assert shown["session"]["opened_at"] == "2026-03-04T10:30:00+00:00"
    assert as_json(admin("session", SESSION, "--rounds", "--json"))["rounds"][0]["form"] == "sparse"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("device", "nobody"), "There is no device 'nobody'"),
        (("session", "abc"), "There is no session abc"),
        (("session", "zzz"), "'zzz' is not the beginning of a session id"),
        (("sessions", "--since", "yesterday"), "--since: 'yesterday' is neither an age"),
        (("sessions", "--until", "999999999d"), "--until: '999999999d' is neither an age"),
        (("usage", "--db", "sqlite:////nowhere/at/all.sqlite3"), "The folder /nowhere/at of the database"),
        (("usage", "--db", "nonsense"), "The database URL cannot be read"),
        (("quarantine", "sensor-1", "--for", "soon"), "duration: 'soon' is no duration such as 90s"),
        (("quarantine", "sensor-1", "--for", "999999999d"), "duration: The duration is too long"),
        (("quarantine", "a/b"), "'a/b' is not a valid name"),
        (("unquarantine", "+"), "'+' is not a valid name"),
        (("quarantine", "x", "--db", "sqlite:////nowhere/at/all.sqlite3"), "The folder /nowhere/at of the database"),
    ],
)
def test_what_cannot_be_done_is_exit_code_2(admin: Run, arguments: tuple[str, ...], sentence: str) -> None:
    assert sentence in refused(admin(*arguments))


@pytest.mark.parametrize(
    "command",
    ["devices", "device x", "sessions", "session ab", "usage", "quarantine x", "unquarantine x", "quarantined", "audit",
     "label a --add b", "set top_k=5 --all"],
)  # fmt: skip
def test_only_an_edge_creates_a_database(admin: Run, tmp_path: Path, command: str) -> None:
    absent = tmp_path / "absent.sqlite3"
    assert "database" in refused(admin(*command.split(), "--db", f"sqlite:///{absent}"))
    assert not absent.exists()


def test_a_device_is_quarantined_listed_and_let_in_again(admin: Run) -> None:
    code, output, complaint = admin("quarantine", "sensor-1", "--for", "1h", "--reason", "It \x1b[2J floods.")
    assert (code, complaint) == (0, "")
    assert "sensor-1 is quarantined until 20" in output
    [quarantine] = as_json(admin("quarantined", "--json"))
    assert (quarantine["device"], quarantine["by"], quarantine["strikes"]) == ("sensor-1", "the administrator", 0)
    _, output, _ = admin("quarantined")
    assert "It \ufffd[2J floods." in output
    code, output, complaint = admin("unquarantine", "sensor-1")
    assert (code, complaint) == (0, "")
    assert "by the administrator is lifted: It \ufffd[2J floods." in output
    assert as_json(admin("quarantined", "--json")) == []
    _, output, _ = admin("unquarantine", "sensor-1")
    assert "sensor-1 was not quarantined" in output
    assert [event["code"] for event in as_json(admin("device", "sensor-1", "--json"))["events"]][:2] == ["lifted"] * 2


def test_a_device_that_was_never_seen_is_quarantined_without_an_end_and_with_a_warning(admin: Run) -> None:
    code, output, complaint = admin("quarantine", "newcomer")
    assert code == 0
    assert "newcomer is quarantined until it is lifted" in output
    assert complaint == "fleet: No device newcomer has been seen yet; it is quarantined nevertheless.\n"
    [quarantine] = as_json(admin("quarantined", "--json"))
    assert (quarantine["device"], quarantine["until_at"]) == ("newcomer", None)


def test_reading_loads_nothing_that_is_heavy_and_not_needed(url: str) -> None:
    code = (
        "import sys; sys.argv = ['fleet', 'admin', 'devices', '--json', '--db', sys.argv[1]]\n"
        "from fleet_cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'apscheduler', 'cryptography', 'httpx', 'numpy', 'paho', 'psycopg', 'torch'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, url], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert json.loads(done.stdout)
    assert done.stderr == "[]\n"

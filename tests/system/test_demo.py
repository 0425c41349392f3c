import json
import os
import signal
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.prepared_models import prepared
from tests.support.waiting import until

pytestmark = [pytest.mark.broker, pytest.mark.models, pytest.mark.xdist_group("demo")]

FLEET = (sys.executable, "-m", "fleet_cli.main")
KEYS = {
    "device", "prompt_tokens", "tokens", "tokens_per_s", "acceptance", "rounds", "mean_batch",
    "uplink_bytes_per_token", "downlink_bytes_per_token", "dsd_uplink_bytes_per_token", "finish", "text",
}  # fmt: skip


def run(arguments: Sequence[str], *, timeout_s: float = 180) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*FLEET, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.fixture(scope="module")
def models_dir() -> Path:
    return prepared("target-Q8_0.gguf").parent.parent


@pytest.fixture(scope="module", params=["mosquitto", "embedded"])
def demo(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    models_dir: Path,
    forced_dtype: str | None,
) -> Any:
    folder = tmp_path_factory.mktemp("demo")
    db = f"sqlite:///{folder / 'fleet.sqlite3'}"
    done = run(
        [
            "demo", "--devices", "2", "--max-new-tokens", "20", "--seed", "3", "--db", db, "--broker", request.param,
            "--models-dir", str(models_dir), "--json", str(folder / "demo.json"), "--dtype", forced_dtype or "auto",
        ]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "device-1" in done.stdout
    return json.loads((folder / "demo.json").read_text()), db


def test_the_report_has_all_that_was_promised(demo: Any) -> None:
    report, _ = demo
    assert report["mode"] == "residual"
    assert report["broker"].split()[0] in ("mosquitto", "embedded")
    assert report["wall_s"] > 0
    assert len(report["devices"]) == 2
    assert min(report["drafting_tokens_per_s"], report["edge_only_tokens_per_s"]) > 0
    for row in report["devices"]:
        assert row.keys() >= KEYS
        assert 0 < row["tokens"] <= 20
        assert row["text"] or row["finish"] == "stop"
        assert row["dsd_uplink_bytes_per_token"] > 1000 * row["uplink_bytes_per_token"]


def test_the_database_agrees_with_the_devices(demo: Any) -> None:
    report, db = demo
    for row in report["devices"]:
        done = run(["admin", "session", row["session"], "--rounds", "--json", "--db", db])
        assert done.returncode == 0, done.stderr
        logged = json.loads(done.stdout)
        session, counted = logged["session"], logged["session"]["counted"]
        assert session["reason"] == row["finish"]
        assert session["prompt_tokens"] == row["prompt_tokens"]
        assert session["final_tokens"] == row["tokens"]
        for what in ("tokens", "rounds", "drafted", "tested", "accepted", "uplink_bytes", "downlink_bytes"):
            assert counted[what] == session[f"device_{what}"], what
        assert counted["rounds"] == row["rounds"] == len(logged["rounds"])
        for way in ("uplink", "downlink"):
            assert counted[f"{way}_bytes"] == row[f"{way}_bytes"]
            assert row[f"{way}_bytes_per_token"] == round(counted[f"{way}_bytes"] / row["tokens"], 1)
        for what in ("device_draft_ms", "device_wait_ms", "device_wall_ms"):
            assert session[what] > 0
        assert counted["compute_ms"] > 0


def reasons(database: Path) -> list[str | None]:
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            return [reason for (reason,) in connection.execute("SELECT reason FROM sessions")]
    except sqlite3.OperationalError:
        return []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_that_was_started(tmp_path: Path, models_dir: Path, number: signal.Signals) -> None:
    db = tmp_path / "fleet.sqlite3"
    command = [
        *FLEET, "demo", "--devices", "2", "--max-new-tokens", "2000", "--models-dir", str(models_dir),
        "--db", f"sqlite:///{db}",
    ]  # fmt: skip
    demo = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    assert demo.stdout is not None
    children: list[int] = []
    for line in demo.stdout:
        if ": generating" in line:
            children = [int(pid) for pid in Path(f"/proc/{demo.pid}/task/{demo.pid}/children").read_text().split()]
            break
    assert len(children) >= 3  # broker, edge, device
    until(lambda: None in reasons(db), patience_s=60)  # a session is open
    demo.send_signal(number)
    _, errors = demo.communicate(timeout=30)
    assert demo.returncode == 130
    assert "Traceback" not in errors
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert "cancelled" in reasons(db)
    assert set(reasons(db)) <= {"cancelled", "stop"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--broker", "127.0.0.1:1"], "127.0.0.1:1"),
        (["--target", "/nonexistent"], "/nonexistent"),
        (["--db", "sqlite:////proc/x.sqlite3"], "/proc"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_ends_in_a_sentence(arguments: list[str], said: str, tmp_path: Path, models_dir: Path) -> None:
    defaults = ["--db", f"sqlite:///{tmp_path / 'fleet.sqlite3'}", "--models-dir", str(models_dir)]
    done = run(["demo", "--devices", "1", "--max-new-tokens", "5", *defaults, *arguments])
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert said in last
    assert "Traceback" not in done.stderr


def test_the_dashboard_is_over_a_fleet_that_goes_on_writing(tmp_path: Path, models_dir: Path) -> None:
    command = [
        *FLEET, "demo", "--dashboard", "--devices", "1", "--max-new-tokens", "8", "--models-dir", str(models_dir),
        "--db", f"sqlite:///{tmp_path / 'fleet.sqlite3'}", "--broker", "mosquitto",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        try:
            assert demo.stdout is not None
            said = next(line for line in demo.stdout if line.startswith("The dashboard is at"))
            with urllib.request.urlopen(f"{said.split()[4]}login", timeout=30) as page:
                assert b"Log in" in page.read()

            def texts() -> int:
                with closing(sqlite3.connect(tmp_path / "fleet.sqlite3")) as connection:
                    return int(connection.execute("SELECT count(*) FROM sessions").fetchone()[0])

            until(lambda: texts() >= 5, patience_s=120)
        finally:
            demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 0

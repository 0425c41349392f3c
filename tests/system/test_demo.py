import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fleet_device import Device
from tests.support.prepared_models import prepared
from tests.support.waiting import PATIENCE_S

pytestmark = [pytest.mark.broker, pytest.mark.models, pytest.mark.xdist_group("demo")]

FLEET = (sys.executable, "-m", "fleet_cli.main")


def run(arguments: Sequence[str], *, timeout_s: float = 280) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*FLEET, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.fixture(scope="module")
def models() -> list[str]:
    """Return the options for the prepared models; a target that is named is the only one that is compared."""
    target = prepared("target-Q8_0.gguf")
    return ["--models-dir", str(target.parent.parent), "--target", str(target)]


@pytest.fixture(scope="module", params=[pytest.param("mosquitto", marks=pytest.mark.exhaustive), "embedded"])
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: list[str]) -> Any:
    folder = tmp_path_factory.mktemp("demo")
    db = f"sqlite:///{folder / 'fleet.sqlite3'}"
    done = run(
        [
            "demo", "--once", "--devices", "2", "--max-new-tokens", "20", "--db", db, "--broker", request.param,
            *models, "--json", str(folder / "demo.json"),
        ]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "device-1" in done.stdout
    return json.loads((folder / "demo.json").read_text()), db


def test_devices_answer_and_the_database_agrees(demo: Any) -> None:
    report, db = demo
    assert [row["device"] for row in report["devices"]] == ["device-1", "device-2"]
    for row in report["devices"]:
        assert 0 < row["tokens"] <= 20
        assert row["text"] or row["finish"] == "stop"
        done = run(["admin", "session", row["session"], "--json", "--db", db])
        assert done.returncode == 0, done.stderr
        session = json.loads(done.stdout)["session"]
        assert (session["reason"], session["final_tokens"]) == (row["finish"], row["tokens"])
        for way in ("uplink", "downlink"):
            assert row[f"{way}_bytes_per_token"] == round(session["counted"][f"{way}_bytes"] / row["tokens"], 1)


def test_an_answer_goes_on_after_the_edge_was_killed(demo: Any) -> None:
    interruption = demo[0]["interruption"]
    assert 0 < interruption["killed_after"] < interruption["tokens"] <= 20
    assert interruption["away_s"] > 0
    assert interruption["identical"]


def test_the_ways_to_generate_are_compared(demo: Any) -> None:
    (comparison,) = demo[0]["comparisons"]
    for way in ("edge_only", "drafting", "chosen"):
        assert min(comparison[way]["tokens_per_s"], comparison[way]["bytes_per_token"]) > 0
    assert comparison["plan"]
    assert comparison["reason"]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive)])
def test_the_fleet_stays_up_for_applications_until_a_signal(
    tmp_path: Path, models: list[str], number: signal.Signals
) -> None:
    command = [*FLEET, "demo", "--devices", "1", "--max-new-tokens", "8", "--db", "sqlite:///fleet.sqlite3", *models]
    demo = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    try:
        assert demo.stdout is not None
        lines = []
        for line in demo.stdout:
            lines.append(line)
            if line.startswith("Dashboard:"):
                break
        said = "".join(lines)
        children = [int(pid) for pid in Path(f"/proc/{demo.pid}/task/{demo.pid}/children").read_text().split()]
        assert len(children) >= 4  # broker, edge, two devices
        (curl,) = re.findall(r"^  (curl (?:.*\n){2}.*)$", said, re.MULTILINE)
        reply = subprocess.run(curl, shell=True, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
        assert json.loads(reply.stdout)["choices"][0]["message"]["content"]
        with Device.from_config(tmp_path / "device.toml") as device:
            assert device.generate("Why is the sky blue?", max_new_tokens=8).tokens
        page = said.partition("Dashboard: ")[2].split()[0]
        with urllib.request.urlopen(f"{page}login", timeout=PATIENCE_S) as login:
            assert b"Log in" in login.read()
    finally:
        demo.send_signal(number)
        _, errors = demo.communicate(timeout=PATIENCE_S)
    assert demo.returncode == 0
    assert "Traceback" not in errors
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert not (tmp_path / "device.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "/nonexistent"], "/nonexistent"),
        (["--db", "sqlite:////proc/x.sqlite3"], "/proc"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_ends_in_a_sentence(arguments: list[str], said: str, tmp_path: Path, models: list[str]) -> None:
    defaults = ["--db", f"sqlite:///{tmp_path / 'fleet.sqlite3'}", *models]
    done = run(["demo", "--once", "--devices", "1", "--max-new-tokens", "5", *defaults, *arguments])
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert said in last
    assert "Traceback" not in done.stderr

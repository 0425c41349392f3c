import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fleet_device import Device
from tests.support.prepared_models import prepared
from tests.support.waiting import PATIENCE_S

pytestmark = [pytest.mark.broker, pytest.mark.models, pytest.mark.xdist_group("demo")]

FLEET = (sys.executable, "-m", "fleet_cli.main")


def run(arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*FLEET, *arguments], capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False)


@pytest.fixture(scope="module")
def models() -> list[str]:
    """Return the options for the prepared models; a target that is named is the only one that is compared."""
    target = prepared("target-Q8_0.gguf")
    return ["--models-dir", str(target.parent.parent), "--target", str(target)]


@dataclass
class Demo:
    """A demo that stays up, until a signal."""

    process: "subprocess.Popen[str]"
    folder: Path
    said: str

    def end(self, number: signal.Signals) -> str:
        """Send a signal, wait for its end, and return its errors."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=PATIENCE_S)[1]

    @property
    def children(self) -> list[int]:
        own = self.process.pid
        return [int(pid) for pid in Path(f"/proc/{own}/task/{own}/children").read_text().split()]


@contextmanager
def staying(folder: Path, arguments: Sequence[str]) -> Iterator[Demo]:
    command = [*FLEET, "demo", *arguments, "--max-new-tokens", "20", "--db", _database(folder)]
    process = subprocess.Popen(
        [*command, "--json", "demo.json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Dashboard:"):
                break
        yield Demo(process, folder, "".join(lines))
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=PATIENCE_S)


def _database(folder: Path) -> str:
    return f"sqlite:///{folder / 'fleet.sqlite3'}"


@pytest.fixture(scope="module", params=["embedded", pytest.param("mosquitto", marks=pytest.mark.exhaustive)])
def stays(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: list[str]
) -> Iterator[tuple[Demo, signal.Signals]]:
    """Return a demo, and the signal that ends it."""
    number = signal.SIGINT if request.param == "embedded" else signal.SIGTERM
    with staying(tmp_path_factory.mktemp("demo"), ["--devices", "2", "--broker", request.param, *models]) as demo:
        yield demo, number


@pytest.fixture(scope="module")
def demo(stays: tuple[Demo, signal.Signals]) -> Any:
    """Return the report of a demo, and its database."""
    folder = stays[0].folder
    return json.loads((folder / "demo.json").read_text()), _database(folder)


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


def test_it_stays_up_for_applications_until_a_signal(stays: tuple[Demo, signal.Signals]) -> None:
    demo, number = stays
    children = demo.children
    assert len(children) >= 4  # edge, three devices
    (curl,) = re.findall(r"^  (curl (?:.*\n){2}.*)$", demo.said, re.MULTILINE)
    reply = subprocess.run(curl, shell=True, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert json.loads(reply.stdout)["choices"][0]["message"]["content"]
    with Device.from_config(demo.folder / "device.toml") as device:
        assert device.generate("Why is the sky blue?", max_new_tokens=8).tokens
    page = demo.said.partition("Dashboard: ")[2].split()[0]
    with urllib.request.urlopen(f"{page}/login", timeout=PATIENCE_S) as login:
        assert b"Log in" in login.read()
    errors = demo.end(number)
    assert demo.process.returncode == 0
    assert "Traceback" not in errors
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert not (demo.folder / "device.toml").exists()


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

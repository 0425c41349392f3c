import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleet_cli.commands import _OURS, ExitCode
from fleet_common.logs import Event
from tests.support.tiny_gguf import tiny_gguf
from tests.support.waiting import PATIENCE_S, wait_for_event

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "fleet_cli.main")


def events_of(*arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """Run a command; return exit code, events and standard error. Every line must be an event."""
    done = subprocess.run(
        [*COMMAND, *arguments, "--events"], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["edge", "run", "--target", "nowhere"], "nowhere", marks=pytest.mark.slow),
        (["device", "run", "--model", "/nowhere.gguf"], "/nowhere.gguf"),
        (["device", "generate", "hello", "--config", "/nowhere.toml"], "/nowhere.toml"),
    ],
    ids=lambda words: " ".join(words[:4]) if isinstance(words, list) else None,
)
def test_an_error_is_an_event_before_it_is_exit_code_2(arguments: list[str], said: str) -> None:
    code, events, complaint = events_of(*arguments)
    assert code == ExitCode.USER_ERROR
    sentences = [event["sentence"] for event in events if event["event"] == Event.ERROR]
    assert said in sentences[0]
    assert complaint.splitlines() == [f"fleet: {sentence}" for sentence in sentences]
    assert {event["event"] for event in events} <= {Event.LOADING, Event.ERROR}


@pytest.fixture
def device(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Run a device's service, which has no broker."""
    model = tiny_gguf(tmp_path / "tiny.gguf")
    arguments = ["--model", str(model), "--drafter", "suffix", "--port", "1", "--api-listen", ""]
    process = subprocess.Popen(
        [*COMMAND, "device", "run", "--events", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.communicate()


def test_a_service_outlives_whoever_read_its_events(device: "subprocess.Popen[str]") -> None:
    assert wait_for_event(device.stdout, Event.SERVING) is not None
    device.stdout.close()
    device.stdout = None
    device.send_signal(signal.SIGTERM)
    _, complaint = device.communicate(timeout=PATIENCE_S)
    assert "BrokenPipe" not in complaint
    assert device.returncode == 0


def test_the_page_for_operators_lists_every_event_and_every_exit_code() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    assert [event for event in Event if f"| `{event.value}` |" not in page] == []
    assert [code for code in ExitCode if f"| {code.value} |" not in page] == []


def test_every_package_of_ours_is_known_as_ours() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert packages <= _OURS

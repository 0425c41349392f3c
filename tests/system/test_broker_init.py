import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from broker_config.processes import reserved_port
from fleet_common.logs import Event
from tests.support.brokers import require_mosquitto
from tests.support.prepared_models import prepared
from tests.support.waiting import PATIENCE_S, wait_for_event

pytestmark = [pytest.mark.broker, pytest.mark.models]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    require_mosquitto()
    (tmp_path / "models").symlink_to(prepared("target").parent.parent)
    return tmp_path


def started(command: list[str], folder: Path) -> "subprocess.Popen[str]":
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PATH": path},
    )


@contextmanager
def service(command: list[str], folder: Path) -> Iterator["subprocess.Popen[str]"]:
    process = started(command, folder)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE_S)


def run(command: list[str], folder: Path, typed: str = "") -> str:
    process = started(command, folder)
    out, errors = process.communicate(typed, timeout=PATIENCE_S)
    assert process.returncode == 0, out + errors
    return out


@pytest.mark.exhaustive
def test_its_commands_run_as_printed(folder: Path) -> None:
    with ExitStack() as stack:
        ports = [f"--{name}={stack.enter_context(reserved_port())}" for name in ("port", "edge-port")]
        made = run(["fleet", "broker", "init", "own broker", "--devices", "2", *ports], folder)
        commands = [shlex.split(line) for line in made.splitlines() if line.startswith("    ")]
        broker, edge, selftest, generate, doctor, chat = commands
        assert (edge[:3], selftest[:3]) == (["fleet", "edge", "run"], ["fleet", "edge", "selftest"])
        stack.enter_context(service(broker, folder))
        running = stack.enter_context(service([*edge, "--events"], folder))
        assert running.stdout is not None
        assert wait_for_event(running.stdout, Event.ONLINE) is not None
        assert run(selftest, folder).count("ok ") == 4
        assert run(generate, folder).strip()
        assert [line.split()[0] for line in run(doctor, folder).splitlines()] == ["ok"] * 10
        assert run(chat, folder, "Say one word.\n").strip()
        assert running.poll() is None

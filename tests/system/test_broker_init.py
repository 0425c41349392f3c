import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fleet_common.logs import Event
from tests.support.brokers import require_mosquitto
from tests.support.prepared_models import prepared
from tests.support.waiting import PATIENCE_S, wait_for_event

pytestmark = [pytest.mark.broker, pytest.mark.models]


def free_ports() -> list[str]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return ["--port", str(one.getsockname()[1]), "--edge-port", str(other.getsockname()[1])]


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
    made = run(["fleet", "broker", "init", "own broker", "--devices", "2", *free_ports()], folder)
    commands = [shlex.split(line) for line in made.splitlines() if line.startswith("    ")]
    broker, edge, selftest, generate, doctor, chat = commands
    assert (edge[:3], selftest[:3]) == (["fleet", "edge", "run"], ["fleet", "edge", "selftest"])
    with ExitStack() as stack:
        stack.enter_context(service(broker, folder))
        running = stack.enter_context(service([*edge, "--events"], folder))
        assert running.stdout is not None
        assert wait_for_event(running.stdout, Event.ONLINE) is not None
        assert run(selftest, folder).count("ok ") == 4
        assert run(generate, folder).strip()
        assert [line.split()[0] for line in run(doctor, folder).splitlines()] == ["ok"] * 10
        assert run(chat, folder, "Say one word.\n").strip()
        assert running.poll() is None

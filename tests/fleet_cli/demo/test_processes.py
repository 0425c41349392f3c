import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from fleet_cli.commands import CommandError
from fleet_cli.demo_processes import device_service, edge_process

Program = Callable[[str], None]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    popen = subprocess.Popen

    def use(code: str) -> None:
        def start(_command: list[str], **options: Any) -> Any:
            return popen([sys.executable, "-c", code], **options)

        monkeypatch.setattr(subprocess, "Popen", start)

    return use


ONLINE = """import sys; print('{"event": "online", "target": "large"}', flush=True); """


def test_an_edge_is_there_when_it_says_that_it_is_online(program: Program) -> None:
    program(ONLINE + "sys.stdin.read(); import time; time.sleep(600)")
    with edge_process([]) as edge:
        assert edge.online["target"] == "large"
        assert edge.child.process.poll() is None
    assert edge.child.process.poll() is not None


def test_an_edge_that_says_why_it_cannot_start_is_quoted(program: Program) -> None:
    program(
        """import sys; print('{"event": "error", "sentence": "The port is taken."}'); """
        """print("fleet: The port is taken.", file=sys.stderr); sys.exit(2)"""
    )
    with pytest.raises(CommandError, match="port"), edge_process([]):
        pass


def test_a_device_is_there_when_it_serves(program: Program) -> None:
    program("""print('{"event": "serving"}', flush=True); import time; time.sleep(600)""")
    with device_service("device-1", []) as device:
        assert device.child.process.poll() is None
    program("import sys; sys.exit(3)")
    with pytest.raises(CommandError, match="device-1"), device_service("device-1", []):
        pass

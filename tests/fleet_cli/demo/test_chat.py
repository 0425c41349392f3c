import signal
import subprocess
from typing import Any

import pytest

from fleet_cli.demo import run_chat
from tests.support.command import Run, refused


def test_while_the_chat_runs_ctrl_c_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = signal.getsignal(signal.SIGINT), list[Any]()

    def run(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        seen.append((command[3:], signal.getsignal(signal.SIGINT)))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    assert run_chat("device-1", ["--fleet", "demo"]) == 3
    arguments = ["device", "chat", "--device", "device-1", "--api-port", "0", "--fleet", "demo"]
    assert seen == [(arguments, signal.SIG_IGN)]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("also", [["--json", "-"], ["--raw"]])
def test_a_chat_makes_no_report_and_continues_no_prompt(also: list[str], fleet: Run) -> None:
    assert "--json" in refused(fleet("demo", "--chat", *also))

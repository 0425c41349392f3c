import os
import signal
from pathlib import Path

import pytest
from pydantic import ValidationError

from fleet_common.identity import enforcement
from fleet_common.identity.enforcement import BrokerAccess
from fleet_common.identity.files import CutOffFailed


@pytest.mark.parametrize("unit", ["--all", "a b", "", "a;b", "a/b"])
def test_what_is_no_unit_is_refused(unit: str) -> None:
    with pytest.raises(ValidationError, match="unit"):
        BrokerAccess(unit=unit)


def test_a_damaged_file_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "broker.json").write_text('{"port": 0}')
    with pytest.raises(CutOffFailed):
        BrokerAccess.load(tmp_path / "broker.json")


@pytest.mark.parametrize("content", ["", "nonsense", "1", "-5", "0", "999999999", "12 34"])
def test_a_pid_file_that_names_no_broker(tmp_path: Path, content: str) -> None:
    (tmp_path / "pid").write_text(content)
    with pytest.raises(CutOffFailed):
        BrokerAccess(pid_file=tmp_path / "pid").reload()


def test_a_stale_pid_file_does_not_end_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    (tmp_path / "pid").write_text(str(os.getpid()))
    with pytest.raises(CutOffFailed, match="mosquitto"):
        BrokerAccess(pid_file=tmp_path / "pid").reload()
    assert sent == []
    monkeypatch.setattr(enforcement, "PROGRAM", Path("/proc/self/comm").read_text().strip())
    assert BrokerAccess(pid_file=tmp_path / "pid").reload()
    assert sent == [(os.getpid(), signal.SIGHUP)]


def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def test_a_unit_is_reloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systemctl(tmp_path, monkeypatch, f'echo "$@" > {tmp_path}/said')
    assert BrokerAccess(unit="mosquitto").reload()
    assert (tmp_path / "said").read_text() == "reload -- mosquitto\n"


def test_a_unit_that_cannot_be_reloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systemctl(tmp_path, monkeypatch, "echo 'Unit not active.' >&2; echo more >&2; exit 5")
    with pytest.raises(CutOffFailed, match="systemctl reload mosquitto"):
        BrokerAccess(unit="mosquitto").reload()


def installer(tmp_path: Path, script: str) -> BrokerAccess:
    program = tmp_path / "install-crl"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return BrokerAccess(installer=program)


def test_an_installer_gets_the_list(tmp_path: Path) -> None:
    access = installer(tmp_path, f'cp "$1" {tmp_path}/installed.pem')
    access.install(b"list")
    assert access.reload()
    assert (tmp_path / "installed.pem").read_bytes() == b"list"


@pytest.mark.parametrize("script", ["exit 3", None])
def test_an_installer_that_fails_is_no_success(tmp_path: Path, script: str | None) -> None:
    access = BrokerAccess(installer=tmp_path / "absent") if script is None else installer(tmp_path, script)
    with pytest.raises(CutOffFailed):
        access.install(b"list")
    with pytest.raises(ValidationError, match="installer"):
        BrokerAccess(installer=tmp_path / "absent", unit="mosquitto")

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker_config.broker import Broker, BrokerFailed, BrokerMissing
from broker_config.mosquitto import MosquittoVersion, installed_version, render_conf
from broker_config.processes import (
    EmbeddedBroker,
    MosquittoProcess,
    ThrowAwayBroker,
    find_mosquitto,
)
from tests.support.broker_trial import TrialFiles, trial_lines
from tests.support.brokers import require_mosquitto
from tests.support.waiting import until


@pytest.fixture(params=[pytest.param(MosquittoProcess, marks=pytest.mark.broker), EmbeddedBroker])
def broker(request: pytest.FixtureRequest) -> Iterator[ThrowAwayBroker]:
    if request.param is MosquittoProcess:
        require_mosquitto()
    else:
        pytest.importorskip("iotcore")
    with request.param(Broker()) as process:
        yield process


def test_stop_and_kill_end_it_and_start_may_follow(broker: ThrowAwayBroker) -> None:
    broker.start()  # it runs: nothing happens
    broker.stop()
    broker.stop()
    assert not broker.running
    broker.start()
    broker.kill()
    assert not broker.running
    broker.start()
    assert broker.running
    broker.close()
    assert not broker.running
    assert broker.log() == ""


def test_ctrl_c_in_the_terminal_does_not_reach_it(broker: ThrowAwayBroker) -> None:
    assert os.getpgid(broker._process.pid) != os.getpgid(0)


def test_a_port_in_use_is_said_to_be(broker: ThrowAwayBroker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        other = type(broker)(Broker(port=port))
        with pytest.raises(BrokerFailed, match=f"{port}"):
            other.start()


@pytest.mark.broker
def test_a_broker_that_does_not_start_shows_the_end_of_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    require_mosquitto()
    monkeypatch.setattr("broker_config.files.render_conf", lambda *_, **__: "no_such_option true\n")
    process = MosquittoProcess(Broker())
    with pytest.raises(BrokerFailed, match="no_such_option"):
        process.start()
    process.close()


def test_without_mosquitto_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker_config.processes.SYSTEM_PATHS", ())
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(BrokerMissing):
        find_mosquitto()


@pytest.mark.broker
def test_mosquitto_is_found_where_users_have_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    require_mosquitto()
    monkeypatch.setenv("PATH", "/nonexistent")
    assert find_mosquitto().name == "mosquitto"


def test_the_embedded_broker_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("iotcore")
    program = (
        "from broker_config.processes import EmbeddedBroker\n"
        "broker = EmbeddedBroker()\n"
        "broker.start()\n"
        "print(broker.port, flush=True)\n"
        "input()\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # the killed parent cannot clean up
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as parent:
        port = int(parent.stdout.readline())
        assert _listens(port)
        parent.send_signal(signal.SIGKILL)
    until(lambda: not _listens(port))


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


HOME = Path("/etc/mosquitto/fleet")
FOLDER = Path("/tmp/trial")


def tried(broker: Broker, version: MosquittoVersion = MosquittoVersion.V2_0) -> list[str]:
    conf = render_conf(broker, home=HOME, version=version)
    return [*trial_lines(TrialFiles(conf, "", FOLDER), directory=FOLDER, ports=(4711, 4712))]


def test_a_trial_changes_nothing_but_what_belongs_to_the_production_machine() -> None:
    broker = Broker.production(pid_file="/run/m.pid")
    rendered = render_conf(broker, home=HOME).splitlines()
    lines = tried(broker)
    gone = {line.split()[0] for line in rendered if line not in lines}
    files = {"acl_file", "cafile", "certfile", "keyfile", "crlfile"}
    machine = {"listener", "user", "pid_file", "persistence", "persistence_location"}
    assert gone == files | machine
    found = [line for line in lines if line.startswith("listener ")]
    assert found == ["listener 4711 127.0.0.1", "listener 4712 127.0.0.1"]
    assert not any(str(HOME) in line for line in lines)


def program(folder: Path, says: str) -> Path:
    path = folder / "mosquitto"
    path.write_text(f"#!/bin/sh\necho '{says}'\nexit 3\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ("mosquitto version 2.0.21", MosquittoVersion.V2_0),
        ("mosquitto version 2.1.2", MosquittoVersion.V2_1),
        ("mosquitto version 2.3.0", MosquittoVersion.V2_1),
    ],
)
def test_the_version_is_read_from_the_programs_own_words(says: str, version: MosquittoVersion, tmp_path: Path) -> None:
    assert installed_version(program(tmp_path, says)) is version


@pytest.mark.parametrize("says", ["mosquitto version 1.6.9", "mosquitto version 3.0.0", "hello"])
def test_a_program_that_is_not_mosquitto_is_refused(says: str, tmp_path: Path) -> None:
    with pytest.raises(BrokerFailed):
        installed_version(program(tmp_path, says))


@pytest.mark.broker
def test_the_installed_mosquitto_has_a_known_version() -> None:
    require_mosquitto()
    assert installed_version(find_mosquitto()) in MosquittoVersion

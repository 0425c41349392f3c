"""The unit's notifications, heard on a real datagram socket."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet_common.systemd import Systemd


class Manager:
    """systemd's end of the socket."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(5)

    def hear(self) -> str:
        return self.socket.recv(4096).decode()

    def silent(self) -> bool:
        self.socket.settimeout(0)
        try:
            self.socket.recv(4096)
        except BlockingIOError:
            return True
        finally:
            self.socket.settimeout(5)
        return False


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    yield manager
    manager.socket.close()


def test_readiness_is_said_with_a_status_of_one_line(manager: Manager, tmp_path: Path) -> None:
    Systemd(str(tmp_path / "notify")).ready("Edge edge-1\nis online.\nREADY=0")
    assert manager.hear() == "READY=1\nSTATUS=Edge edge-1 is online. READY=0"


def test_the_watchdog_is_fed_twice_in_its_time_however_often_the_loop_turns(manager: Manager, tmp_path: Path) -> None:
    now = [100.0]
    unit = Systemd(str(tmp_path / "notify"), watchdog_s=10.0, clock=lambda: now[0])
    unit.alive()
    assert manager.hear() == "WATCHDOG=1"
    now[0] += 4.9
    unit.alive()
    assert manager.silent()
    now[0] += 0.1
    unit.alive()
    assert manager.hear() == "WATCHDOG=1"


def test_a_probe_that_hangs_starves_the_watchdog(manager: Manager, tmp_path: Path) -> None:
    entered, released = threading.Event(), threading.Event()
    turns = iter([None, lambda: (entered.set(), released.wait(10))])

    def probe() -> None:
        hang = next(turns)
        if hang is not None:
            hang()

    unit = Systemd(str(tmp_path / "notify"), watchdog_s=0.002)
    unit.watch(probe)
    assert manager.hear() == "WATCHDOG=1"
    assert entered.wait(5)
    assert manager.silent()
    unit._ended.set()
    released.set()
    unit.close()


def test_without_systemd_nothing_is_said_and_nothing_runs() -> None:
    unit = Systemd.from_environment({})
    unit.ready("x")
    unit.alive()
    unit.watch(lambda: pytest.fail("nobody watches"))
    unit.stopping()
    unit.close()


def test_a_manager_that_is_away_does_not_end_the_service(tmp_path: Path) -> None:
    Systemd(str(tmp_path / "nobody")).ready("x")


def test_the_environment_is_another_process_s_for_a_child(manager: Manager, tmp_path: Path) -> None:
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"}
    Systemd.from_environment({**environment, "WATCHDOG_PID": str(os.getpid() + 1)}).alive()
    assert manager.silent()
    Systemd.from_environment({**environment, "WATCHDOG_PID": str(os.getpid())}).alive()
    assert manager.hear() == "WATCHDOG=1"


def test_an_abstract_address_is_understood() -> None:
    name = f"fleet-{os.getpid()}-{threading.get_ident()}"
    manager = Manager("\0" + name)
    Systemd("@" + name).stopping()
    assert manager.hear() == "STOPPING=1"
    manager.socket.close()

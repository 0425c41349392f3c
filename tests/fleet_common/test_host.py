import ctypes
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fleet_common.host import (
    Systemd,
    available_memory,
    cache_folder,
    locked,
    state_folder,
    write_atomically,
)
from tests.support.waiting import PATIENCE_S

GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {8 * GIB // 1024} kB\n")
    return tmp_path


def group(root: Path, name: str, limit: str, *, used: int = 0, cached: int = 0) -> None:
    folder = root / "sys/fs/cgroup" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\nactive_file {cached}\ninactive_file {cached}\n")


def test_without_control_groups_it_is_what_the_machine_has(root: Path) -> None:
    assert available_memory(root) == 8 * GIB
    (root / "proc/self/cgroup").write_text("0::/a/b\n")
    assert available_memory(root) == 8 * GIB


def test_the_tightest_group_counts_and_pages_of_files_count_as_free(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/a/b\n")
    group(root, "a/b", "max")
    assert available_memory(root) == 8 * GIB
    group(root, "a", str(4 * GIB), used=3 * GIB, cached=GIB // 2)
    assert available_memory(root) == 2 * GIB
    group(root, "a/b", str(2 * GIB), used=GIB)
    assert available_memory(root) == GIB
    group(root, "a/b", str(GIB), used=GIB + 1)
    assert available_memory(root) == 0


KEPT_MB = 60
# Blocks above Python's small-object limit; a few that stay keep the heap from shrinking.
PROGRAM = f"""
import os, pathlib, sys
from fleet_common.host import give_back_free_memory

def resident_mb():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6

blocks = [bytes(4000) for _ in range({KEPT_MB} * 250)]
del blocks[:-1]
before = resident_mb()
print(give_back_free_memory(), before - resident_mb())
"""
HEAPS = """
import ctypes, sys, threading
from fleet_common.host import use_one_heap

if "one" in sys.argv:
    assert use_one_heap()
ready = threading.Barrier(9)

def work():
    kept = bytes(4000)
    ready.wait()
    ready.wait()

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
ready.wait()
ctypes.CDLL(None).malloc_info(0, ctypes.c_void_p.in_dll(ctypes.CDLL(None), "stdout"))
ctypes.CDLL(None).fflush(None)
ready.wait()
"""


def has_glibc() -> bool:
    return Path("/proc/self/statm").exists() and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def run(program: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("MALLOC_ARENA_MAX", None)
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment, timeout=PATIENCE_S
    ).stdout


only_glibc = pytest.mark.skipif(not has_glibc(), reason="only glibc keeps free memory so")


@only_glibc
def test_what_is_free_in_the_midst_of_a_heap_goes_back_to_the_machine() -> None:
    given, freed_mb = run(PROGRAM).split()
    assert given == "True"
    assert float(freed_mb) > 0.5 * KEPT_MB


@only_glibc
def test_threads_share_one_heap_once_they_are_to() -> None:
    assert run(HEAPS).count("<heap ") > 1
    assert run(HEAPS, "one").count("<heap ") == 1


@pytest.mark.parametrize(
    ("folder", "service", "user", "default"),
    [
        (state_folder, "STATE_DIRECTORY", "XDG_STATE_HOME", ".local/state"),
        (cache_folder, "CACHE_DIRECTORY", "XDG_CACHE_HOME", ".cache"),
    ],
)
def test_the_folder_is_systemds_then_xdgs_then_the_homes(
    folder: Callable[[dict[str, str]], Path | None],
    service: str,
    user: str,
    default: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert folder({service: "/var/lib/a:/b", user: "/c"}) == Path("/var/lib/a")
    assert folder({user: "/c"}) == Path("/c/dssd-fleet")
    for ignored in ("", "relative"):
        assert folder({user: ignored}) == Path.home() / default / "dssd-fleet"

    def no_home() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", no_home)
    assert folder({}) is None


def test_what_cannot_be_written_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    file.mkdir()
    with pytest.raises(OSError, match="director"):
        write_atomically(file, b"new")
    assert list(tmp_path.iterdir()) == [file]


class Manager:
    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(PATIENCE_S)

    def hear(self) -> str:
        return self.socket.recv(4096).decode()

    def silent(self) -> bool:
        self.socket.settimeout(0)
        try:
            self.socket.recv(4096)
        except BlockingIOError:
            return True
        finally:
            self.socket.settimeout(PATIENCE_S)
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
    turns = iter([None, lambda: (entered.set(), released.wait(PATIENCE_S))])

    def probe() -> None:
        hang = next(turns)
        if hang is not None:
            hang()

    unit = Systemd(str(tmp_path / "notify"), watchdog_s=0.002)
    unit.watch(probe)
    assert manager.hear() == "WATCHDOG=1"
    assert entered.wait(PATIENCE_S)
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


def test_a_second_holder_of_a_lock_waits_and_then_gives_up(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(TimeoutError), locked(tmp_path, timeout_s=0.0):
        pass
    with locked(tmp_path), locked(tmp_path.parent):
        pass
    with locked(tmp_path, timeout_s=0.0):
        pass


def test_a_manager_that_is_away_does_not_end_the_service(tmp_path: Path) -> None:
    Systemd(str(tmp_path / "nobody")).ready("x")

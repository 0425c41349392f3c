import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fleet_common import memory
from fleet_common.memory import give_back_free_memory, use_one_heap

KEPT_MB = 60
# Blocks above Python's own small ones; a few that stay keep the heap from shrinking by itself.
PROGRAM = f"""
import os, pathlib, sys
from fleet_common.memory import give_back_free_memory

def resident_mb():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6

blocks = [bytes(4000) for _ in range({KEPT_MB} * 250)]
del blocks[:-1]
before = resident_mb()
print(give_back_free_memory(), before - resident_mb())
"""
HEAPS = """
import ctypes, sys, threading
from fleet_common.memory import use_one_heap

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
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=60).stdout


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


def test_who_starts_the_process_may_choose_the_number_of_heaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert use_one_heap() is False


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        """A C library without malloc_trim."""

    monkeypatch.setattr(ctypes, "CDLL", lambda _name: Other())
    memory._function.cache_clear()
    try:
        assert (give_back_free_memory(), use_one_heap()) == (False, False)
    finally:
        memory._function.cache_clear()

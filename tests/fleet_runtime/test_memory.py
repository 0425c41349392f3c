import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fleet_runtime import memory
from fleet_runtime.memory import give_back_free_memory

KEPT_MB = 60
# Blocks above Python's own small ones; a few that stay keep the heap from shrinking by itself.
PROGRAM = f"""
import os, pathlib, sys
from fleet_runtime.memory import give_back_free_memory

def resident_mb():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6

blocks = [bytes(4000) for _ in range({KEPT_MB} * 250)]
del blocks[:-1]
before = resident_mb()
print(give_back_free_memory(), before - resident_mb())
"""


def has_glibc() -> bool:
    return Path("/proc/self/statm").exists() and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


@pytest.mark.skipif(not has_glibc(), reason="only glibc keeps free memory so")
def test_what_is_free_in_the_midst_of_a_heap_goes_back_to_the_machine() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment, timeout=60
    )
    given, freed_mb = done.stdout.split()
    assert given == "True"
    assert float(freed_mb) > 0.5 * KEPT_MB


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        """A C library without malloc_trim."""

    monkeypatch.setattr(ctypes, "CDLL", lambda _name: Other())
    memory._trim.cache_clear()
    try:
        assert give_back_free_memory() is False
    finally:
        memory._trim.cache_clear()

"""What a machine has, as JSON: run on the target, by the Python that the program would run with.

look.py BYTES:PATH…

Each is a file of a model; those that are there with that size are printed.
"""

import json
import os
import platform
import subprocess
import sys
from ctypes.util import find_library
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def main(files: list[str]) -> None:
    """Print it."""
    wanted = [(int(size), Path(path)) for size, _, path in (file.partition(":") for file in files)]
    whole = [str(path) for size, path in wanted if path.is_file() and path.stat().st_size == size]
    machine = {
        "tag": f"cp{sys.version_info.major}{sys.version_info.minor}",
        "recent": sys.version_info >= (3, 11),
        "venv": None not in (find_spec("ensurepip"), find_spec("venv")),
        "architecture": platform.machine(),
        "glibc": platform.libc_ver()[1],
        "openmp": find_library("gomp") is not None,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpu_bytes": _gpu_bytes(),
        "free": {path: _free(Path(path)) for path in ("/opt", "/var")},
        "whole": whole,
    }
    print(json.dumps(machine))


def _free(folder: Path) -> dict[str, Any]:
    state = os.statvfs(folder)
    return {"bytes": state.f_bavail * state.f_frsize, "device": folder.stat().st_dev}


def _gpu_bytes() -> list[int]:
    """Return the memory of each NVIDIA GPU."""
    ask = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=True)
        return [int(line) * 1048576 for line in done.stdout.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


main(sys.argv[1:])

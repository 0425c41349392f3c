"""What a machine has, as JSON: run on the target, by the Python that the program would run with.

look.py BYTES:PATH…

Each is a file of a model; those that are there with that size are told.
"""

import json
import os
import platform
import subprocess
import sys


def main(files):
    """Print it."""
    wanted = [(int(size), path) for size, _, path in (file.partition(":") for file in files)]
    whole = [path for size, path in wanted if _size(path) == size]
    print(json.dumps({**_python(), **_machine(), "whole": whole}))


def _python():
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401

        whole = True
    except ImportError:
        whole = False
    return {"tag": "cp%d%d" % sys.version_info[:2], "recent": sys.version_info >= (3, 11), "venv": whole}


def _machine():
    features, memory = "", 0
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith(("flags", "Features")):
                features = line.partition(":")[2]
                break
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemTotal:"):
                memory = int(line.split()[1]) * 1024
    free = {}
    for path in ("/opt", "/var"):
        state = os.statvfs(path)
        free[path] = {"bytes": state.f_bavail * state.f_frsize, "device": os.stat(path).st_dev}
    return {
        "architecture": platform.machine(),
        "glibc": platform.libc_ver()[1],
        "features": sorted(set(features.split())),
        "memory_bytes": memory,
        "gpu_bytes": _gpu_bytes(),
        "free": free,
    }


def _gpu_bytes():
    """Return the memory of each NVIDIA GPU."""
    ask = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=True)
        return [int(line) * 1048576 for line in done.stdout.split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def _size(path):
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


main(sys.argv[1:])

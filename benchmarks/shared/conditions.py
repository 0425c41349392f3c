"""Conditions of a measurement: which code was measured, on which machine and when; for the JSON of any benchmark."""

import os
import platform
import re
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import psutil

from broker_config.processes.runner import find_mosquitto
from broker_config.rendering.version import installed_version
from schemas.version import VERSION

__all__ = ["commit", "conditions", "machine", "versions"]

_GIT_S: Final = 10.0
_CPU_INFO: Final = Path("/proc/cpuinfo")
_NOTABLE: Final = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimddp", "sve")


def conditions(*packages: str, broker: bool = False) -> dict[str, Any]:
    """Return what a reader of figures has to know beside them, as JSON values.

    Args:
        packages: Distributions whose versions matter; one that is not installed is left out.
        broker: Whether a mosquitto takes part, so that its version matters.

    Raises:
        BrokerError: There is no mosquitto.
    """
    return {
        "commit": commit(),
        "versions": versions(*packages, broker=broker),
        "machine": machine(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def versions(*packages: str, broker: bool = False) -> dict[str, str]:
    """Return the versions of this project, of Python, and of what is named; see `conditions`."""
    found = {"dssd-fleet": VERSION, "python": platform.python_version()}
    if broker:
        found["mosquitto"] = str(installed_version(find_mosquitto()))
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Return what the machine is, and how busy: figures taken beside other work are worth less.

    `cores` are the machine's threads, `usable_cores` those that this process may use, `load` the mean number of
    runnable threads in the last minute, the benchmark's own among them.
    """
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "instructions": _instructions(),
        "cores": psutil.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "load": round(os.getloadavg()[0], 1),
    }


def commit() -> str | None:
    """Return the commit of the checkout that this code is run from, "-dirty" behind it if files differ; None if none.

    Code that was installed has no commit, even below a folder that is a checkout of something else.
    """
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    program = shutil.which("git")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, "-C", str(folder), *arguments], capture_output=True, text=True, timeout=_GIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_info(key: str) -> str:
    try:
        text = _CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _instructions() -> list[str]:
    """Return the extensions that decide how fast models are computed."""
    flags = set((_cpu_info("flags") or _cpu_info("Features")).split())
    return [name for name in _NOTABLE if name in flags]

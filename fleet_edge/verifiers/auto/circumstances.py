"""Circumstances of a measurement: machine, versions, files and settings. What was measured holds while they do."""

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fleet_edge.verifiers.auto.candidates import Candidate

if TYPE_CHECKING:
    from fleet_edge.settings import EdgeSettings

__all__ = ["circumstances"]

_PACKAGES: Final = ("dssd-fleet", "torch", "transformers", "llama-cpp-python")
_CPU_KEYS: Final = ("model name", "flags", "Features", "CPU part")


def circumstances(
    settings: "EdgeSettings", candidates: Sequence[Candidate], *, depends_on: Sequence[str], root: Path = Path("/")
) -> str:
    """Return a digest of all that the speed of engines depends on.

    Args:
        settings: The edge's.
        candidates: What is measured; their targets are local.
        depends_on: Settings that count.
        root: Above `proc`.
    """
    found = {
        "machine": {
            "architecture": platform.machine(),
            "cpu": _cpu(root),
            "cores": len(os.sched_getaffinity(0)),
            "gpus": _gpus(root),
        },
        "versions": {name: _version(name) for name in _PACKAGES},
        "settings": settings.model_dump(mode="json", include=set(depends_on)),
        "candidates": [[candidate.engine, candidate.target] for candidate in candidates],
        "files": [file for candidate in candidates for file in _files(Path(candidate.target).expanduser())],
    }
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu(root: Path) -> dict[str, str]:
    """Return what the system says of its first processor."""
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs if key.strip() in _CPU_KEYS}


def _gpus(root: Path) -> list[str]:
    found = []
    for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        try:
            found.append(path.read_text(encoding="utf-8", errors="replace").splitlines()[0])
        except (OSError, IndexError):
            continue
    return found


def _files(target: Path) -> list[list[Any]]:
    """Return path, size and time of change of each file of a target."""
    paths = sorted(target.iterdir()) if target.is_dir() else [target]
    found: list[list[Any]] = []
    for path in paths:
        try:
            state = path.stat()
        except OSError:
            continue
        found.append([str(path.resolve()), state.st_size, state.st_mtime_ns])
    return found

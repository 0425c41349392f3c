"""Minimal corpus: few short inputs that reach whatever pairs of lines in a row many inputs reach."""

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any, Final

from tests.fuzz.harness import SurvivedErrors
from tests.fuzz.targets.registry import Target

ROOT: Final = str(Path(__file__).resolve().parents[2])
_PACKAGES: Final = ("schemas", "sampling", "fleet_common", "fleet_device", "fleet_edge")
_OURS: Final = tuple(f"{ROOT}/{package}/" for package in _PACKAGES)
_LONGEST: Final = 4096
Arcs = frozenset[tuple[str, int, int]]


def minimal_corpus(target: Target, folders: Iterable[Path]) -> dict[str, bytes]:
    """Return inputs by file name; those of `folders` that are longer than 4,096 bytes are left out."""
    SurvivedErrors().install()
    inputs = {path.read_bytes() for folder in folders if folder.exists() for path in folder.iterdir()}
    inputs = {data for data in inputs | set(target.seeds()) if len(data) <= _LONGEST}
    kept: dict[str, bytes] = {}
    reached: set[tuple[str, int, int]] = set()
    for data in sorted(inputs, key=lambda data: (len(data), data)):
        arcs = arcs_of(target, data)
        if not arcs <= reached:
            reached |= arcs
            kept[f"{hashlib.sha256(data).hexdigest()[:16]}.bin"] = data
    return kept


def arcs_of(target: Target, data: bytes) -> Arcs:
    """Return which line of ours followed which while an input ran."""
    arcs: set[tuple[str, int, int]] = set()
    before: dict[FrameType, int] = {}

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_OURS):
            return None
        if event == "line":
            arcs.add((frame.f_code.co_filename, before.get(frame, 0), frame.f_lineno))
            before[frame] = frame.f_lineno
        elif event == "return":
            before.pop(frame, None)
        return trace

    sys.settrace(trace)
    try:
        target(data)
    except Exception:  # noqa: BLE001 - what it raises is for the fuzzer to tell
        pass
    finally:
        sys.settrace(None)
    return frozenset(arcs)

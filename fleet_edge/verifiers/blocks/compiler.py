"""Compilation by numba for the processor at hand, and the cache of what was compiled."""

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

import numba
from numba.core.caching import FunctionCache
from numba.core.codegen import get_host_cpu_features

from fleet_common.host import cache_folder, private_folder

_CPU_INFO: Final = Path("/proc/cpuinfo")
_ARM_FEATURES: Final = {"asimddp": "dotprod", "i8mm": "i8mm"}
"""LLVM does not look for these on ARM."""

_UNUSED_S: Final = 30 * 86_400.0
"""Time after which code that no process has read is deleted: that of other releases."""

_log = logging.getLogger(__name__)


def arm_features(cpu_info: str) -> set[str]:
    """Return what all processors of an ARM machine have, by LLVM's names."""
    listed = [set(line.split(":")[1].split()) for line in cpu_info.splitlines() if line.startswith("Features")]
    return {_ARM_FEATURES[each] for each in set.intersection(*listed) & set(_ARM_FEATURES)} if listed else set()


@cache
def processor_features() -> frozenset[str]:
    """Return the features of the processor, as LLVM names them, or those that NUMBA_CPU_FEATURES allows."""
    allowed = numba.config.CPU_FEATURES
    names = (get_host_cpu_features() if allowed is None else allowed).split(",")
    found = {name.removeprefix("+") for name in names if name.startswith("+")}
    if allowed is None and _CPU_INFO.exists():
        found |= arm_features(_CPU_INFO.read_text(encoding="utf-8"))
    return frozenset(found)


class _Cache(FunctionCache):  # type: ignore[misc]
    """A cache whose failures cost time only."""

    def load_overload(self, signature: Any, context: Any) -> Any:
        try:
            return super().load_overload(signature, context)
        except Exception as error:  # noqa: BLE001 - a damaged file raises anything
            _log.warning("Compiled code cannot be read and is compiled again: %s", error)
            with suppress(OSError):
                self.flush()  # else a damaged index would be read again to add to it
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        try:
            super().save_overload(signature, data)
        except OSError as error:
            _log.warning("Compiled code cannot be kept, so that the next start compiles it again: %s", error)


@cache
def sources_hash() -> str:
    """Return a hash of this package's code, which what is kept for later starts belongs to."""
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(path.read_bytes())
    return sources.hexdigest()


@cache
def _folder() -> Path | None:
    """Return the folder for what is compiled from these sources.

    numba compares the file that defines a function, but not the files of the functions that it calls. It executes what
    it reads, so nobody else may write there.
    """
    caches = cache_folder()
    folder = None if caches is None else private_folder(caches / "blocks" / sources_hash()[:16])
    if folder is not None:
        with suppress(OSError):
            os.utime(folder)
            for other in folder.parent.iterdir():
                if other.stat().st_mtime < time.time() - _UNUSED_S:
                    shutil.rmtree(other)
    return folder


def compiled(function: Callable[..., Any], *, parallel: bool = False) -> Callable[..., Any]:
    """Compile a function at its first call, or read what an earlier process compiled."""
    dispatcher = numba.njit(error_model="numpy", nogil=True, parallel=parallel)(function)
    folder = _folder()
    if folder is not None:
        before = numba.config.CACHE_DIR
        # A folder for each, since numba's key lacks the options.
        numba.config.CACHE_DIR = str(folder / ("parallel" if parallel else "serial"))
        try:
            dispatcher._cache = _Cache(function)  # noqa: SLF001 - what `cache=True` does
        finally:
            numba.config.CACHE_DIR = before
    result: Callable[..., Any] = dispatcher
    return result

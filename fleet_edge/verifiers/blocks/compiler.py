"""Compilation by numba for the processor at hand, and the cache of what was compiled."""

import hashlib
import logging
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numba
from numba.core.caching import FunctionCache
from numba.core.codegen import get_host_cpu_features
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from fleet_common.host import cache_folder, private_folder

_CPU_INFO: Final = Path("/proc/cpuinfo")
_ARM_FEATURES: Final = {"asimddp": "dotprod", "i8mm": "i8mm"}
"""LLVM does not look for these on ARM."""

_UNUSED_S: Final = 30 * 86_400.0
"""Time after which code that no process has read is deleted: that of other releases."""

_DIGEST_BYTES: Final = 32

_log = logging.getLogger(__name__)


def arm_features(cpu_info: str) -> set[str]:
    """Return the features that all processors of an ARM machine share, by LLVM's names."""
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
    """Compiled code of a function: a file for each signature, its SHA-256 before the code.

    The machine code is executed as it is read, so a damaged file would end the process, at each start again. A failure
    costs time only.
    """

    def __init__(self, function: Callable[..., Any], folder: "_Folder", *, options: str) -> None:
        # The base class would look for a folder of its own; it contributes the key of a signature.
        self._py_func = function
        self._cache_path = str(folder.path)
        self._folder = folder
        self._options = options

    def load_overload(self, signature: Any, context: Any) -> Any:
        context.refresh()
        try:
            code = self._folder.read(self._file_name(signature, context.codegen()))
            # Nobody else can write to the folder, and the content is what this program wrote.
            return None if code is None else CompileResult._rebuild(context, *pickle.loads(code))  # noqa: S301, SLF001
        except Exception as error:  # noqa: BLE001 - of code that numba cannot use it raises anything
            _log.warning("Compiled code in %s cannot be read, and is compiled again: %s", self._cache_path, error)
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        if data.library.has_dynamic_globals or data.lifted:
            return  # numba cannot keep these
        try:
            self._folder.write(self._file_name(signature, data.codegen), dumps(data._reduce()))  # noqa: SLF001
        except OSError as error:
            _log.warning("Compiled code cannot be kept, so that the next start compiles it again: %s", error)

    def _file_name(self, signature: Any, codegen: Any) -> str:
        versions = numba.__version__, sys.implementation.cache_tag
        key = (versions, self._options, self._py_func.__module__, *self._index_key(signature, codegen))
        return f"{self._py_func.__qualname__}-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}"


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder that nobody else can write to; opened, so that it stays the same one."""

    path: Path
    descriptor: int

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if there is none; a damaged file is deleted."""
        try:
            with open(name, "rb", opener=self._open) as file:
                digest, content = file.read(_DIGEST_BYTES), file.read()
        except FileNotFoundError:
            return None
        if hashlib.sha256(content).digest() == digest:
            return content
        _log.warning("Compiled code is damaged, and is deleted: %s", self.path / name)
        os.unlink(name, dir_fd=self.descriptor)
        return None

    def write(self, name: str, content: bytes) -> None:
        unfinished = f"{name}.{os.getpid()}"
        try:
            with open(unfinished, "xb", opener=self._open) as file:
                file.write(hashlib.sha256(content).digest() + content)
            os.replace(unfinished, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        except OSError:
            with suppress(OSError):
                os.unlink(unfinished, dir_fd=self.descriptor)
            raise

    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags, 0o600, dir_fd=self.descriptor)


@cache
def sources_hash() -> str:
    """Return a hash of this package's code, which what is kept for later starts belongs to."""
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(path.read_bytes())
    return sources.hexdigest()


@cache
def _folder() -> _Folder | None:
    """Return the folder for what is compiled from these sources.

    numba compares the file that defines a function, but not the files of the functions that it calls. It executes what
    it reads, so nobody else may write there.
    """
    caches = cache_folder()
    folder = None if caches is None else private_folder(caches / "blocks" / sources_hash()[:16])
    if folder is None:
        return None
    with suppress(OSError):
        os.utime(folder)
        for other in folder.parent.iterdir():
            if other.stat().st_mtime < time.time() - _UNUSED_S:
                shutil.rmtree(other)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if os.fstat(descriptor).st_uid != os.geteuid():  # exchanged since it was checked
        os.close(descriptor)
        return None
    return _Folder(folder, descriptor)


def compiled(function: Callable[..., Any], *, parallel: bool = False) -> Callable[..., Any]:
    """Compile a function at its first call, or read what an earlier process compiled."""
    dispatcher = numba.njit(error_model="numpy", nogil=True, parallel=parallel)(function)
    folder = _folder()
    if folder is not None:
        # What `cache=True` does; numba's own key lacks the options.
        dispatcher._cache = _Cache(function, folder, options=f"parallel={parallel}")  # noqa: SLF001
    result: Callable[..., Any] = dispatcher
    return result

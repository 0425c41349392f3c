"""Mapped model file: gives the memory back that a process shows for the pages of a file it has mapped.

llama.cpp maps a model's file and lays most weights out anew for the processor, in memory of its own. The pages that it
has read for that stay with the process, the weights twice. Given back, they stay in the system's cache as long as
nobody wants the memory, and those that are looked at again come from there.
"""

import ctypes
import os
from pathlib import Path
from typing import Final

_MADV_DONTNEED: Final = 4  # madvise(2); a page of a file that is only read is found in the file again
_MAPS: Final = Path("/proc/self/maps")


def give_back_mapped(path: Path) -> int:
    """Give the pages of a file back that this process has mapped read-only; return their addresses' size in bytes.

    Where the system does not tell what is mapped, nothing is done.

    Args:
        path: The file.
    """
    try:
        name, lines = os.path.realpath(path), _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
        advise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return 0
    advise.argtypes, advise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    given = 0
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or fields[5] != name or "w" in fields[1]:  # noqa: PLR2004 - proc(5)
            continue
        begin, end = (int(address, 16) for address in fields[0].split("-"))
        if advise(begin, end - begin, _MADV_DONTNEED) == 0:
            given += end - begin
    return given

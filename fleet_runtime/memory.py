"""Memory of a process: gives back to the machine what is free but kept by the C library.

glibc keeps what was freed in the middle of a heap, and it has a heap for each of a few threads: after a short backlog
a process stays as large as it was then. Giving it back takes about a millisecond.
"""

import ctypes
from collections.abc import Callable
from functools import cache

__all__ = ["give_back_free_memory"]


def give_back_free_memory() -> bool:
    """Give free memory back to the machine; return whether there was any.

    Only glibc is asked to: where there is another C library, nothing is done. Other threads go on meanwhile, unless
    they want memory of the heap that is being looked through.
    """
    trim = _trim()
    return trim is not None and trim(0) != 0


@cache
def _trim() -> Callable[[int], int] | None:
    # malloc_trim(3), of the C library that this process has loaded already.
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    found.argtypes, found.restype = [ctypes.c_size_t], ctypes.c_int
    return found

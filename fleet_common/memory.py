"""Memory of a process: one heap for all threads, and what is free in it goes back to the machine.

glibc keeps what was freed in the middle of a heap, and it has a heap for each of many threads: after a backlog a
process stays as large as it was then, and it grows while blocks that live for long spread over all heaps.
"""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from typing import Final

_M_ARENA_MAX: Final = -8  # mallopt(3)
_ARENAS_VARIABLE: Final = "MALLOC_ARENA_MAX"  # by which whoever starts the process may choose


def use_one_heap() -> bool:
    """Have all threads that are started from now on share one heap; return whether the C library can.

    A Python program loses nothing by it: its threads allocate by turns anyway. The environment variable
    `MALLOC_ARENA_MAX` comes before this.
    """
    setting = None if _ARENAS_VARIABLE in os.environ else _function("mallopt", ctypes.c_int, ctypes.c_int)
    return setting is not None and setting(_M_ARENA_MAX, 1) != 0


def give_back_free_memory() -> bool:
    """Give free memory back to the machine; return whether there was any.

    Only glibc is asked to: where there is another C library, nothing is done. It takes about a millisecond, in which
    other threads go on unless they want memory.
    """
    trim = _function("malloc_trim", ctypes.c_size_t)
    return trim is not None and trim(0) != 0


@cache
def _function(name: str, *arguments: type) -> Callable[..., int] | None:
    """Return a function of the C library that this process has loaded already, if that is there and is glibc."""
    try:
        library = ctypes.CDLL(None)
        found = library[name]
        library.gnu_get_libc_version  # noqa: B018 - others have functions of that name that do other things
    except (AttributeError, OSError, TypeError):
        return None
    found.argtypes, found.restype = arguments, ctypes.c_int
    return found

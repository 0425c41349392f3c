"""Thread of llama.cpp: every forward pass comes from it.

llama.cpp's worker threads belong to the thread that calls it. And what a thread has loaded into the matrix registers of
a CPU (AMX), torch and llama.cpp clear for each other.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

__all__ = ["NativeThread"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class NativeThread:
    """One thread that runs what it is given, one after another."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="llama.cpp")

    def call(
        self, function: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        """Run a function there, and return or raise what it does."""
        return self._pool.submit(function, *args, **kwargs).result()

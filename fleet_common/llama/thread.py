"""Thread of llama.cpp: a model is loaded there, and every forward pass comes from it.

llama.cpp's worker threads belong to the thread that calls it. A second caller, if only to load the model, has others,
and where all of them are more than the processor's cores OpenMP has them sleep at each of the hundreds of barriers of
a pass: a token then takes half as long again. And what a thread has loaded into the matrix registers of a CPU (AMX),
torch and llama.cpp clear for each other: where an application computes with torch in the thread that llama.cpp is
called from, llama.cpp's next call is an illegal instruction.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import ParamSpec, TypeVar

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
        running = self._pool.submit(function, *args, **kwargs)
        try:
            return running.result()
        finally:
            # Who is interrupted while waiting (Ctrl-C) must not free or change what is being computed with.
            wait([running])

    def close(self) -> None:
        self._pool.shutdown()

"""A drafter whose every call runs on one thread of its own.

Where the processor has AMX, llama.cpp configures a thread's tile registers once and relies on it, and torch clears them
after its own use. On a thread that both have used, llama.cpp then dies of an illegal instruction. A device has no
torch; the system tests have both ends in one process, and keep them on different threads.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class OnOneThread:
    def __init__(self, make: Callable[[], Any]) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="drafter")
        self._made = self._pool.submit(make).result()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._made, name)
        if not callable(value):
            return value
        return lambda *args, **kwargs: self._pool.submit(value, *args, **kwargs).result()

    def close(self) -> None:
        self._pool.submit(self._made.close).result()
        self._pool.shutdown()

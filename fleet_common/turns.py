"""Turns: a lock that is handed on in the order in which it was asked for, so that nobody waits longer than others."""

import threading
from collections import deque
from types import TracebackType


class Turns:
    """A fair lock, as a context manager: `threading.Lock` lets whoever has just given it back take it again."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Event] = deque()

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._waiting)

    def __enter__(self) -> None:
        mine = threading.Event()
        with self._changing:
            if not self._taken:
                self._taken = True
                return
            self._waiting.append(mine)
        try:
            mine.wait()
        except BaseException:  # Ctrl-C while waiting: whoever is next must not wait for this one
            with self._changing:
                if mine in self._waiting:
                    self._waiting.remove(mine)
                else:
                    self._hand_on()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changing:
            self._hand_on()

    def _hand_on(self) -> None:
        if self._waiting:
            self._waiting.popleft().set()
        else:
            self._taken = False

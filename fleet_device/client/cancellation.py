"""Cancellation of a text: a flag, and the wake-up of whoever waits for it to be written."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Cancellation"]


class Cancellation:
    """Ends a text early. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._wake: Callable[[], None] | None = None

    @property
    def requested(self) -> bool:
        """Whether the text is to end."""
        return self._requested.is_set()

    def cancel(self) -> None:
        """End the text, now or as soon as it begins. Idempotent."""
        self._requested.set()
        wake = self._wake
        if wake is not None:
            wake()

    @contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """Call `wake` when the text is cancelled meanwhile, and at once if it is cancelled already."""
        self._wake = wake
        if self.requested:
            wake()
        try:
            yield
        finally:
            self._wake = None

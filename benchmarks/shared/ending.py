"""Ending: SIGTERM, by which schedulers and `timeout` end a benchmark, ends it as Ctrl-C does: child processes too."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

__all__ = ["ending_cleanly"]


@contextlib.contextmanager
def ending_cleanly() -> Iterator[None]:
    """Raise SystemExit at SIGTERM while the context lasts; on the main thread."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

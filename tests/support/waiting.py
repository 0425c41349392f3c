"""Waits for other threads without a guessed sleep."""

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from fleet_common.logs import Event, read_events

PATIENCE_S = 240.0
"""Bound of every wait for what must come: minutes, so that no busy machine makes a test fail."""
GLANCE_S = 0.005


_never = threading.Event()


def until(condition: Callable[[], bool], *, patience_s: float = PATIENCE_S) -> None:
    """Return as soon as `condition()` holds; fail if it does not within `patience_s`."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"did not happen within {patience_s} s")
        _never.wait(GLANCE_S)


def wait_for_event(lines: Iterable[str], event: Event) -> dict[str, Any] | None:
    """Read a program's output up to an event and return it; None if the program ends first."""
    return next((each for each in read_events(lines) if each["event"] == event), None)

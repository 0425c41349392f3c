"""Timing of a measurement: it warms up until every client has had a token, and then counts for a while."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from fleet_bench.capacity.tally import Client, Window

__all__ = ["Timing", "Warming"]


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a cell takes (seconds).

    Attributes:
        seconds: Of the window that is counted.
        settle_s: Between the moment at which every client has had a token and the window.
        patience_s: After which the window begins at the latest.
    """

    seconds: float
    settle_s: float
    patience_s: float

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return it from the values of its fields."""
        return cls(**values)


class Warming:
    """Finds the window of a measurement.

    Args:
        timing: How long.
        clients: Watched.
        started: When they began (monotonic seconds).
    """

    def __init__(self, timing: Timing, clients: Sequence[Client], started: float) -> None:
        self._timing = timing
        self._clients = clients
        self._latest = started + timing.patience_s
        self._window: Window | None = None

    def window(self, now: float) -> Window | None:
        """Return the window once it is known; to be asked now and then."""
        if self._window is None:
            served = all(client.texts and client.texts[0].pieces for client in self._clients)
            if served or now >= self._latest:
                begin = now + self._timing.settle_s if served else now
                self._window = Window(begin, begin + self._timing.seconds)
        return self._window

    def over(self, now: float) -> bool:
        """Whether the window is over."""
        window = self.window(now)
        return window is not None and now >= window.end

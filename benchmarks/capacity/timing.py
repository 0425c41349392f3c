"""Timing of a measurement: it warms up until every client has had some tokens, and then counts for a while."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from fleet_cli.edge.advise.service_level import Client, Window

__all__ = ["Timing", "Warming"]

_DEVICE_S: Final = 0.3


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a cell takes (seconds).

    Attributes:
        seconds: Of the window that is counted.
        settle_s: Between the moment at which every client has had its first tokens and the window.
        patience_s: After which, and some more for each device, the window begins at the latest.
        tokens: How many first tokens that are.
    """

    seconds: float
    settle_s: float
    patience_s: float
    tokens: int = 1

    def patience_of(self, devices: int) -> float:
        """Return how long so many devices are waited for: an edge computes their prompts one after another."""
        return self.patience_s + _DEVICE_S * devices

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
        self._latest = started + timing.patience_of(len(clients))
        self._window: Window | None = None

    def window(self, now: float) -> Window | None:
        """Return the window once it is known; to be asked now and then."""
        if self._window is None:
            least = self._timing.tokens
            served = all(sum(text.tokens for text in client.texts[:least]) >= least for client in self._clients)
            if served or now >= self._latest:
                begin = now + self._timing.settle_s if served else now
                self._window = Window(begin, begin + self._timing.seconds)
        return self._window

    def over(self, now: float) -> bool:
        """Whether the window is over."""
        window = self.window(now)
        return window is not None and now >= window.end

"""How long to wait before the next attempt to connect."""

import random

__all__ = ["Backoff"]

GROWTH = 2.0


class Backoff:
    """Exponential delays with jitter.

    A fleet that lost its broker must not come back as one: each delay is drawn evenly from the upper half
    of the exponential step, so that two clients soon differ, and none returns at once.
    """

    def __init__(self, *, minimum_s: float, maximum_s: float, rng: random.Random) -> None:
        self._minimum_s = minimum_s
        self._maximum_s = maximum_s
        self._rng = rng
        self._step_s = minimum_s

    def next_delay_s(self) -> float:
        """Return the next delay; the one after it is about twice as long, up to the maximum."""
        step_s = self._step_s
        self._step_s = min(self._step_s * GROWTH, self._maximum_s)
        return self._rng.uniform(step_s / 2, step_s)

    def reset(self) -> None:
        """Begin again with the minimum: a connection has held."""
        self._step_s = self._minimum_s

"""Circuit breaker of one endpoint: after a failure nobody waits for it until it has proved to be well again."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

__all__ = ["Breaker"]

_FIRST_S: Final = 0.5
_LONGEST_S: Final = 15.0


@dataclass(slots=True)
class Breaker:
    """Whether an endpoint is asked for work; while it is not, when it is worth a trial.

    No session's request is the trial: only `proved`, which follows a trial of our own, lets work through again.

    Attributes:
        clock: Monotonic seconds.
        rng: Spreads the trials of many edges.
        tolerance: Failures in a row that do not open it, where they may be the request's fault.
        reason: Why it is open; empty while it is closed.
    """

    clock: Callable[[], float]
    rng: random.Random = field(default_factory=random.Random)
    tolerance: int = 2
    reason: str = ""
    _in_a_row: int = 0
    _trials: int = 0
    _not_before: float = -math.inf

    @property
    def closed(self) -> bool:
        """Whether work goes through."""
        return not self.reason

    @property
    def trial_in_s(self) -> float:
        """Seconds until the next trial is due; 0 at once."""
        return max(0.0, self._not_before - self.clock())

    def succeeded(self) -> None:
        """Work was done."""
        self._in_a_row = 0

    def failed(self, reason: str, *, suspect: bool = False) -> bool:
        """Work was not done.

        Args:
            reason: A sentence.
            suspect: Whether the request may be at fault; then it takes several in a row.

        Returns:
            Whether this opened it.
        """
        self._in_a_row += 1
        if not self.closed or (suspect and self._in_a_row <= self.tolerance):
            return False
        self.reason = reason
        self._trials = 0
        self._postpone()
        return True

    def disproved(self, reason: str) -> None:
        """A trial has failed."""
        self.reason = reason
        self._trials += 1
        self._postpone()

    def proved(self) -> bool:
        """A trial has succeeded; return whether this closed it."""
        was_open = not self.closed
        self.reason = ""
        self._in_a_row = 0
        return was_open

    def _postpone(self) -> None:
        delay = min(_LONGEST_S, _FIRST_S * 2 ** min(self._trials, 10))
        self._not_before = self.clock() + delay * self.rng.uniform(0.75, 1.25)

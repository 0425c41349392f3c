"""Batching delay: whether to hold a step for drafts that are about to come, and when the next one is.

A step costs nearly as much for one session as for a few, and a session that just misses a step waits a whole one.
Devices that draft quickly therefore fall into two groups that take turns, each in a step half empty. How soon a
device comes back with its next draft is measured; a step is held for those who are due within a fraction of it, if
what they save outweighs what the ready ones lose. Devices that take longer than that to draft are not waited for:
while they draft, the others are verified.
"""

import math
from dataclasses import dataclass, field
from typing import Final

_SMOOTHING: Final = 0.3
_MARGIN: Final = 1.25
"""Devices are waited for a little longer than they took on average."""

_PATIENCE: Final = 3.0
"""A device is expected back for this many times as long as it takes on average to come back."""

_LEAST_PATIENCE_S: Final = 0.5
_FIRST_TURNAROUND_S: Final = 0.5
"""What a device is taken to need while it has not come back yet."""


@dataclass(slots=True)
class BatchingDelay:
    """Who is expected back, and when.

    Attributes:
        share: Longest hold, as a fraction of a step; 0 never holds.
    """

    share: float = 0.5
    _step_s: float = 0.0
    _answered: dict[int, float] = field(default_factory=dict)
    _turnaround: dict[int, float] = field(default_factory=dict)

    @property
    def expects(self) -> bool:
        return bool(self._answered)

    def answered(self, handle: int, *, at: float) -> None:
        """A session got a verdict that leaves it something to draft."""
        self._answered[handle] = at

    def arrived(self, handle: int, *, at: float) -> None:
        since = self._answered.pop(handle, None)
        if since is not None:
            took = max(0.0, at - since)
            before = self._turnaround.get(handle, took)
            self._turnaround[handle] = before + _SMOOTHING * (took - before)

    def forget(self, handle: int) -> None:
        self._answered.pop(handle, None)
        self._turnaround.pop(handle, None)

    def stepped(self, seconds: float) -> None:
        """A verification step took so long."""
        self._step_s = seconds if self._step_s == 0.0 else self._step_s + _SMOOTHING * (seconds - self._step_s)

    def gap_s(self, *, now: float) -> float:
        """Return for how long no draft is likely to come: 0 if one is overdue, infinity if none is expected."""
        gap_s = math.inf
        for handle, at in self._answered.items():
            turnaround_s = self._turnaround.get(handle, _FIRST_TURNAROUND_S)
            if now - at <= max(_LEAST_PATIENCE_S, _PATIENCE * turnaround_s):
                gap_s = min(gap_s, max(0.0, at + turnaround_s - now))
        return gap_s

    def hold_s(self, ready: int, *, now: float) -> float:
        """Return how long to hold the step, in seconds.

        Args:
            ready: Sessions that could be verified now; they all wait for the hold.
            now: On the clock of the other calls.
        """
        if ready == 0 or not self._answered:
            return 0.0
        due = sorted(
            self._answered[handle] + _MARGIN * self._turnaround[handle] - now
            for handle in self._answered
            if handle in self._turnaround
        )
        best, gain = 0.0, 0.0
        for late, wait in enumerate((wait for wait in due if 0.0 < wait <= self.share * self._step_s), start=1):
            # Those who come are spared about a step; those who are ready lose the wait.
            saved = late * self._step_s - ready * wait
            if saved > gain:
                best, gain = wait, saved
        return best

"""Availability of a target model that runs elsewhere: whether it has been away for so long that devices are to know."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Availability:
    """Tells a short absence, in which sessions wait, from one in which they had better go on elsewhere.

    Attributes:
        patience_s: Seconds that sessions wait.
        clock: Monotonic seconds.
    """

    patience_s: float
    clock: Callable[[], float]
    _since: float | None = None
    _told: bool = False

    def changes(self, reason: str) -> bool:
        """Return whether devices are to be told something new: that the model is away, or that it is back.

        Args:
            reason: Why it is away now; empty if it is there.
        """
        if not reason:
            self._since = None
        elif self._since is None:
            self._since = self.clock()
        away = self._since is not None and self.clock() - self._since >= self.patience_s
        if away == self._told or (reason and not away):
            return False
        self._told = away
        return True

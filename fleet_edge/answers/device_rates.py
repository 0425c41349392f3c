"""Rates by device: how many of a kind each device may have in a span of time."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(slots=True)
class DeviceRates:
    """Admits so many of each device in each span; forgets all as a new span begins, and so needs little memory.

    Attributes:
        most: Of one device in a span.
        span: Its length.
    """

    most: int
    span: timedelta = timedelta(minutes=1)
    _current: int = -1
    _admitted: Counter[str] = field(default_factory=Counter)

    def admit(self, device: str, at: datetime) -> bool:
        """Return whether a device may have one more, at a time (aware), and count it if so."""
        current = (at - _EPOCH) // self.span
        if current != self._current:  # also if the clock was set back
            self._current = current
            self._admitted.clear()
        if self._admitted[device] >= self.most:
            return False
        self._admitted[device] += 1
        return True

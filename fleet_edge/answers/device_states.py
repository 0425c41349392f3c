"""Device states and telemetry on their way to the session log: at most one record a device and some seconds.

A device may publish as often as it likes. The first is written at once; of those that follow within seconds the last
waits for `flush`.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Generic, TypeVar

from fleet_edge.store.records.sightings import DeviceSeen, DeviceTold

R = TypeVar("R", DeviceSeen, DeviceTold)


@dataclass(slots=True)
class _Latest(Generic[R]):
    """What was last written of a device, and what waits."""

    written_at: datetime
    waiting: R | None = None


@dataclass(slots=True)
class DeviceStates(Generic[R]):
    """Writes one kind of record of devices, thinned out. Callable from any thread.

    Attributes:
        put: Takes records; MUST NOT block or raise.
        every: Least time between two records of one device.
        most: Most devices remembered at once; a device that is not remembered is only written after the next `flush`.
    """

    put: Callable[[R], object]
    every: timedelta = timedelta(seconds=5)
    most: int = 65_536
    _latest: dict[str, _Latest[R]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, seen: R) -> None:
        """Take a record; those of one device MUST come in order."""
        with self._lock:
            latest = self._latest.get(seen.device)
            if latest is not None and self._recent(latest, seen.at):
                latest.waiting = seen
            elif latest is not None or len(self._latest) < self.most:
                self._latest[seen.device] = _Latest(seen.at)
                self.put(seen)

    def flush(self, now: datetime) -> None:
        """Write what waits, and forget who has been silent since. Call it every few seconds, and at the end."""
        with self._lock:
            for device, latest in list(self._latest.items()):
                if latest.waiting is not None:
                    self.put(latest.waiting)
                    self._latest[device] = _Latest(now)
                elif not self._recent(latest, now):
                    del self._latest[device]

    def _recent(self, latest: _Latest[R], at: datetime) -> bool:
        return timedelta() <= at - latest.written_at < self.every  # not so if the clock was set back

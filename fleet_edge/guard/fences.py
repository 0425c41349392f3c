"""Fences shared by the edges of a fleet and its administrator: what one of them decides, the others hear of."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from fleet_edge.guard.guard import FenceBegun, Guard
from fleet_edge.store.fences import Fences


@dataclass(slots=True)
class SharedFences:
    """Brings the guard in step with what the session log knows of fences.

    Attributes:
        guard: Of this edge.
        edge: Its name.
        now: The wall clock (UTC).
    """

    guard: Guard
    edge: str
    now: Callable[[], datetime]
    _own: dict[str, datetime] = field(default_factory=dict)  # since when, by device

    def begun(self, fence: FenceBegun) -> datetime:
        """Note a fence of our own; return since when it holds (UTC)."""
        at = self._own[fence.device] = self.now()
        return at

    def apply(self, fences: Fences) -> list[str]:
        """Shut out and let in whom the log says.

        Returns:
            Devices that were not shut out before.
        """
        now = self.now()
        for device, since in list(self._own.items()):
            lifted = fences.lifted.get(device)
            if lifted is not None and lifted >= since:
                self.guard.lift(device)
                del self._own[device]
        others = {
            device: float("inf") if fence.until_at is None else (fence.until_at - now).total_seconds()
            for device, fence in fences.active.items()
            if fence.by != self.edge or device not in self._own  # of ours there may be one from before a restart
        }
        return sorted(self.guard.fenced_by_others(others))

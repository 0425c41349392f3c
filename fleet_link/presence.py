"""Whether the broker answers, and who is told when that changes."""

from fleet_link.counters import Guard
from fleet_link.link import Listener

__all__ = ["Presence"]


class Presence:
    """Changed on the link's thread, read from any."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._listeners: tuple[Listener, ...] = ()
        self.online = False

    def listen(self, listener: Listener) -> None:
        """Tell `listener` from now on."""
        self._listeners = (*self._listeners, listener)

    def up(self) -> None:
        """A connection was made."""
        self._guard.counters.connects += 1
        self.online = True
        self._tell(online=True)

    def down(self, *, on_purpose: bool) -> None:
        """A connection has ended; a goodbye is no loss."""
        if self.online:
            self.online = False
            if not on_purpose:
                self._guard.counters.losses += 1
                self._tell(online=False)

    def _tell(self, *, online: bool) -> None:
        for listener in self._listeners:
            self._guard.call(listener, online)

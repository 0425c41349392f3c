"""Presence of the fleet's edges: their retained states, as last heard."""

import threading
from typing import Final

from schemas.control import EdgeState, Presence

__all__ = ["EdgePresences"]

# A fleet has a handful of edges; whoever may publish as one must not fill a device's memory all the same.
_MOST: Final = 1000


class EdgePresences:
    """The one store of edge states. Written on the link's thread, read on any."""

    def __init__(self) -> None:
        self._states: dict[str, EdgeState] = {}
        self._changed = threading.Condition()

    def note(self, edge: str, state: EdgeState) -> Presence | None:
        """Take an edge's new state; return its presence before, or None if nothing was known of it.

        Args:
            edge: Its name by the topic, which the broker has checked.
            state: As published.
        """
        with self._changed:
            before = self._states.get(edge)
            if before is not None or len(self._states) < _MOST:
                self._states[edge] = state
                self._changed.notify_all()
            return None if before is None else before.presence

    def known(self) -> tuple[EdgeState, ...]:
        """Return all states, by name of the edge."""
        with self._changed:
            return tuple(state for _, state in sorted(self._states.items()))

    def online(self) -> tuple[EdgeState, ...]:
        """Return the states of those that take new sessions."""
        return tuple(state for state in self.known() if state.presence is Presence.ONLINE)

    def wait_online(self, timeout_s: float, *, edge: str | None = None) -> bool:
        """Return whether an edge is online, or one of that name; wait for it at most `timeout_s`."""

        def there() -> bool:
            states = self._states.values() if edge is None else filter(None, (self._states.get(edge),))
            return any(state.presence is Presence.ONLINE for state in states)

        with self._changed:
            return self._changed.wait_for(there, timeout_s)

"""Handles of the sessions under way: a verdict names its session by nothing else, so no two may have the same.

Each edge counts by itself, and a device may have a session at one edge and another at the next.
"""

import threading

__all__ = ["Handles"]


class Handles:
    """The handles that are in use on one device. For use from any thread."""

    def __init__(self) -> None:
        self._owners: dict[int, bytes] = {}
        self._changing = threading.Lock()

    def claim(self, session: bytes, handle: int) -> bool:
        """Take a handle for a session, in place of the one that it had; return whether no other session has it."""
        with self._changing:
            if self._owners.get(handle, session) != session:
                return False
            self._drop(session)
            self._owners[handle] = session
            return True

    def release(self, session: bytes) -> None:
        """The session is over."""
        with self._changing:
            self._drop(session)

    def _drop(self, session: bytes) -> None:
        for handle in [handle for handle, owner in self._owners.items() if owner == session]:
            del self._owners[handle]

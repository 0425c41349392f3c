"""Lanes and handles: what each of the requests that run at once has for itself."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fleet_device.client.inbox import Inbox
from fleet_device.drafters.contract import Drafter, known_tokens
from fleet_device.pacing.contract import Pacing

__all__ = ["Handles", "Lane", "Lanes"]


@dataclass(slots=True, eq=False)
class Lane:
    """One of them. Texts that take turns in it go on from each other's keys and values, and from what was measured.

    Attributes:
        drafter: The draft model, with a sequence of its own.
        pacing: How much to draft; None is the agent's own.
        inbox: What arrives while a text is written.
    """

    drafter: Drafter
    pacing: Pacing | None
    inbox: Inbox


class Lanes:
    """The lanes that are free, and those that are taken.

    Args:
        lanes: At least one.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._all = tuple(lanes)
        self._free = list(lanes)  # the one unused for longest first
        self._changed = threading.Condition()

    @contextmanager
    def take(self, prompt: Sequence[int]) -> Iterator[Lane]:
        """Take a lane, as soon as one is free: the one whose draft model has computed most of the prompt.

        Args:
            prompt: Token ids.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            lane = max(self._free, key=lambda lane: known_tokens(lane.drafter, prompt))
            self._free.remove(lane)
        try:
            yield lane
        finally:
            with self._changed:
                self._free.append(lane)
                self._changed.notify()

    def repace(self, make: Callable[[], Pacing]) -> None:
        """Give every lane a new pacing of its own; texts under way keep theirs."""
        with self._changed:
            for lane in self._all:
                lane.pacing = make()


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
        with self._changing:
            self._drop(session)

    def _drop(self, session: bytes) -> None:
        for handle in [handle for handle, owner in self._owners.items() if owner == session]:
            del self._owners[handle]

"""Lanes and handles: what each of the requests that run at once has for itself."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fleet_device.client.inbox import Inbox
from fleet_device.client.request import Cancellation
from fleet_device.drafters.contract import Drafter, known_tokens
from fleet_device.errors import TextCancelled
from fleet_device.pacing.contract import Pacing


@dataclass(slots=True, eq=False)
class Lane:
    """One of them. Texts that take turns in it go on from each other's keys and values, and from what was measured.

    Attributes:
        drafter: The draft model, with a sequence of its own.
        pacing: How much to draft; None is the agent's own.
        inbox: What arrives while a text is written.
        edge_only: Whether it has no draft model, only edge-only decoding.
    """

    drafter: Drafter
    pacing: Pacing | None
    inbox: Inbox
    edge_only: bool = False


class Lanes:
    """The lanes that are free, and those that are taken.

    Args:
        lanes: At least one.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._all = tuple(lanes)
        self._free = list(lanes)  # the one unused for longest first
        self._waiting: deque[object] = deque()  # requests that need the draft model, in order
        self._changed = threading.Condition()

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a lane with the draft model."""
        return len(self._waiting)

    @contextmanager
    def take(self, prompt: Sequence[int], *, drafts: bool, cancellation: Cancellation) -> Iterator[Lane]:
        """Wait for a free lane and take it: the one whose draft model has computed most of the prompt.

        Requests that need the draft model get its lanes in order, before all others; others use an edge-only lane when
        those of the draft model are busy.

        Args:
            prompt: Token ids.
            drafts: Whether the request needs the draft model.
            cancellation: Ends the wait.

        Raises:
            TextCancelled: The request was cancelled while it waited.
        """
        with cancellation.waking(self._wake):
            lane = self._wait(prompt, cancellation, drafts=drafts)
        try:
            yield lane
        finally:
            with self._changed:
                self._free.append(lane)
                self._changed.notify_all()

    def _wait(self, prompt: Sequence[int], cancellation: Cancellation, *, drafts: bool) -> Lane:
        request = object()
        with self._changed:
            if drafts:
                self._waiting.append(request)
            try:
                self._changed.wait_for(lambda: self._usable(request, drafts=drafts) or cancellation.requested)
                usable = self._usable(request, drafts=drafts)
            finally:
                if drafts:
                    self._waiting.remove(request)
                    self._changed.notify_all()
            # A cancelled request that finds a lane takes it, and reports its end like any other.
            if not usable:
                raise TextCancelled("The request was cancelled while it waited for the draft model.")
            lane = max(usable, key=lambda lane: (not lane.edge_only, known_tokens(lane.drafter, prompt)))
            self._free.remove(lane)
            return lane

    def _usable(self, request: object, *, drafts: bool) -> list[Lane]:
        """Return the free lanes that a request may take now."""
        reserved = bool(self._waiting) and self._waiting[0] is not request
        return [lane for lane in self._free if (not drafts if lane.edge_only else not reserved)]

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def repace(self, make: Callable[[], Pacing]) -> None:
        """Give every lane of the draft model a new pacing of its own; requests under way keep theirs."""
        with self._changed:
            for lane in self._all:
                if not lane.edge_only:
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

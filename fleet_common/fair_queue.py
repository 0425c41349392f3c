"""Fair queue: bounded, and its keys take turns (deficit round robin): one key's backlog costs the others nothing.

Deficit round robin (Shreedhar and Varghese, 1995): each key has a queue of its own; in its turn it may take out entries
up to a quantum of cost, and what it leaves of that is added to its next turn. Every operation takes constant time but
for an entry that costs many quanta.
"""

import math
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


@dataclass(slots=True)
class _Lane(Generic[T]):
    """One key's entries, oldest first, with their costs, and what is left of its turn."""

    entries: deque[tuple[T, float]] = field(default_factory=deque)
    deficit: float = 0.0


class FairQueue(Generic[K, T]):
    """Entries of many keys under one bound. Entries of one key come out in order. Not for several threads at once.

    Args:
        bound: Most entries in all.
        quantum: Cost that a key may take out in one turn.
    """

    def __init__(self, *, bound: int, quantum: float = 1.0) -> None:
        self._bound = bound
        self._quantum = quantum
        self._lanes: dict[K, _Lane[T]] = {}
        self._turns: deque[K] = deque()
        self._by_length: dict[int, dict[K, None]] = {}
        self._longest = 0
        self._entries = 0

    def __len__(self) -> int:
        return self._entries

    def __iter__(self) -> Iterator[T]:
        return (entry for lane in self._lanes.values() for entry, _ in lane.entries)

    def waiting(self, key: K) -> int:
        """Return how many entries of a key wait."""
        lane = self._lanes.get(key)
        return 0 if lane is None else len(lane.entries)

    def put(self, key: K, entry: T, *, cost: float = 1.0) -> T | None:
        """Append an entry; where there is no room, the key that holds most makes it.

        Args:
            key: Whose it is.
            entry: What to keep.
            cost: Of taking it out, in the unit of the quantum.

        Returns:
            The entry that was dropped: the newest of the key that holds most, or this one if that is its key.
            None if there was room.
        """
        dropped: T | None = None
        if self._entries >= self._bound:
            if self.waiting(key) >= self._longest:
                return entry
            dropped = self.drop_newest(next(iter(self._by_length[self._longest])))
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane()
            self._turns.append(key)
        lane.entries.append((entry, cost))
        self._resized(key, len(lane.entries) - 1, len(lane.entries))
        return dropped

    def put_back(self, key: K, entry: T, *, cost: float = 1.0) -> None:
        """Return an entry to the head of its key's queue, whatever the bound."""
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane()
            self._turns.appendleft(key)
        lane.entries.appendleft((entry, cost))
        self._resized(key, len(lane.entries) - 1, len(lane.entries))

    def peek(self) -> T | None:
        """Return the entry that `take` would, and leave it; None if there is none."""
        key = self._next_key()
        return None if key is None else self._lanes[key].entries[0][0]

    def take(self) -> T | None:
        """Remove and return the next entry; None if there is none."""
        key = self._next_key()
        if key is None:
            return None
        lane = self._lanes[key]
        entry, cost = lane.entries.popleft()
        lane.deficit -= cost
        self._shrunk(key, lane)
        return entry

    def drop_newest(self, key: K) -> T:
        """Remove and return the newest entry of a key that has one."""
        lane = self._lanes[key]
        entry, _ = lane.entries.pop()
        self._shrunk(key, lane)
        return entry

    def _next_key(self) -> K | None:
        """Return whose turn it is, and bring it to the head of the turns; None if nothing waits."""
        unserved = 0
        while self._turns:
            key = self._turns[0]
            lane = self._lanes.get(key)
            if lane is None:  # emptied since
                self._turns.popleft()
                continue
            if lane.deficit >= lane.entries[0][1]:
                return key
            lane.deficit += self._quantum
            if lane.deficit >= lane.entries[0][1]:
                return key
            self._turns.rotate(-1)
            unserved += 1
            if unserved >= len(self._turns):
                # All wait for entries of many quanta: give them at once the rounds that the next to be served needs.
                needs = (lane.entries[0][1] - lane.deficit for lane in self._lanes.values())
                rounds = math.ceil(min(needs) / self._quantum) - 1
                for each in self._lanes.values():
                    each.deficit += max(0, rounds) * self._quantum
                unserved = 0
        return None

    def _shrunk(self, key: K, lane: _Lane[T]) -> None:
        self._resized(key, len(lane.entries) + 1, len(lane.entries))
        if not lane.entries:
            # Who leaves begins anew: an empty queue saves nothing up.
            del self._lanes[key]
            if self._turns and self._turns[0] == key:
                self._turns.popleft()
            else:
                self._turns.remove(key)
        elif lane.deficit < lane.entries[0][1] and self._turns[0] == key:
            self._turns.rotate(-1)

    def _resized(self, key: K, before: int, after: int) -> None:
        self._entries += after - before
        if before:
            same = self._by_length[before]
            del same[key]
            if not same:
                del self._by_length[before]
        if after:
            self._by_length.setdefault(after, {})[key] = None
        # Lengths change by one, so the longest does too.
        self._longest = max(self._longest, after)
        while self._longest and self._longest not in self._by_length:
            self._longest -= 1

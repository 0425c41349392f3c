"""Limits on what one client may take: a fair queue, a token bucket, and a server's connections."""

import contextlib
import ipaddress
import math
import socket
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


@dataclass(slots=True)
class _Lane(Generic[T]):
    entries: deque[tuple[T, float]] = field(default_factory=deque)
    deficit: float = 0.0


class FairQueue(Generic[K, T]):
    """Bounded queue in which keys take turns (deficit round robin). Not thread-safe.

    Each key has its own queue, whose order is kept. In its turn a key may take out entries up to a quantum of cost; the
    rest is added to its next turn (Shreedhar and Varghese, 1995). So one key's backlog costs the others nothing. Every
    operation takes constant time, except for an entry that costs many quanta.
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
        lane = self._lanes.get(key)
        return 0 if lane is None else len(lane.entries)

    def put(self, key: K, entry: T, *, cost: float = 1.0) -> T | None:
        """Append an entry; when the queue is full, drop and return the newest one of the key with most entries.

        That may be `entry` itself. `cost` is in the unit of the quantum.
        """
        dropped: T | None = None
        if self._entries >= self._bound:
            if self.waiting(key) >= self._longest:
                return entry
            dropped = self.drop_newest(next(iter(self._by_length[self._longest])))
        if key not in self._lanes:
            self._lanes[key] = _Lane()
            self._turns.append(key)
        entries = self._lanes[key].entries
        entries.append((entry, cost))
        self._resized(key, len(entries) - 1, len(entries))
        return dropped

    def put_back(self, key: K, entry: T, *, cost: float = 1.0) -> None:
        """Return an entry to the head of its queue, regardless of the bound."""
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane()
            self._turns.appendleft(key)
        lane.entries.appendleft((entry, cost))
        self._resized(key, len(lane.entries) - 1, len(lane.entries))

    def peek(self) -> T | None:
        key = self._next_key()
        return None if key is None else self._lanes[key].entries[0][0]

    def pop(self) -> T | None:
        key = self._next_key()
        if key is None:
            return None
        lane = self._lanes[key]
        entry, cost = lane.entries.popleft()
        lane.deficit -= cost
        self._shrunk(key, lane)
        return entry

    def drop_newest(self, key: K) -> T:
        lane = self._lanes[key]
        entry, _ = lane.entries.pop()
        self._shrunk(key, lane)
        return entry

    def _next_key(self) -> K | None:
        """Return the key whose turn it is, and move it to the head; None if the queue is empty."""
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
                # All wait for expensive entries: add the rounds until the next one is served at once.
                needs = (lane.entries[0][1] - lane.deficit for lane in self._lanes.values())
                rounds = math.ceil(min(needs) / self._quantum) - 1
                for each in self._lanes.values():
                    each.deficit += max(0, rounds) * self._quantum
                unserved = 0
        return None

    def _shrunk(self, key: K, lane: _Lane[T]) -> None:
        self._resized(key, len(lane.entries) + 1, len(lane.entries))
        if not lane.entries:
            # An empty queue saves nothing up for later.
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


class TokenBucket:
    """Bucket that fills at `rate` per second up to `burst`. It starts full."""

    __slots__ = ("_at", "_level", "burst", "rate")

    def __init__(self, rate: float, burst: float, *, now: float) -> None:
        self.rate = rate
        self.burst = burst
        self._level = burst
        self._at = now

    def try_spend(self, amount: float, now: float) -> float:
        """Spend an amount if it is available, and return 0; else return the seconds until it is.

        An amount above the burst is available when the bucket is full; it leaves a debt.
        """
        wait = self.wait_s(amount, now)
        if wait == 0.0:
            self._level -= amount
        return wait

    def spend(self, amount: float, now: float) -> None:
        """Spend an amount that has been used already, going into debt if needed."""
        self._fill(now)
        self._level -= amount

    def wait_s(self, amount: float, now: float) -> float:
        self._fill(now)
        missing = min(amount, self.burst) - self._level
        if missing <= 0.0:
            return 0.0
        return missing / self.rate if self.rate > 0.0 else float("inf")

    def used(self, now: float) -> float:
        """Return how much is missing to a full bucket. Callable on any thread."""
        return max(0.0, self.burst - self._level - self.rate * max(0.0, now - self._at))

    def _fill(self, now: float) -> None:
        if now > self._at:
            self._level = min(self.burst, self._level + self.rate * (now - self._at))
            self._at = now


C = TypeVar("C")


def cut(connection: socket.socket) -> None:
    """End a connection on whichever thread it is used."""
    with contextlib.suppress(OSError):  # it has ended meanwhile
        connection.shutdown(socket.SHUT_RDWR)


_IPV6_NETWORK: Final = 64
"""Bits of an address that its owner does not choose freely."""


def network_of(address: str) -> str:
    """Return the part of an address that a client cannot change at will: the IPv4 address, or the /64 of IPv6."""
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((known, _IPV6_NETWORK), strict=False)) if known.version == 6 else address  # noqa: PLR2004


@dataclass(slots=True)
class _Known:
    network: str
    since: float
    waits: bool = True  # for its request, which costs the client nothing


class Connections(Generic[C]):
    """Connections of a server. Not thread-safe.

    A client that connects and sends nothing, or sends it slowly, must not lock others out. When there are too many
    connections, one that waits for its request is closed: the oldest of the network with most of them. After `answer_s`
    a connection that is being answered may be closed too.
    """

    def __init__(self, most: int, *, clock: Callable[[], float], answer_s: float = math.inf) -> None:
        self._most = most
        self._clock = clock
        self._answer_s = answer_s
        self._known: dict[C, _Known] = {}

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[C]:
        return iter(self._known)

    def add(self, connection: C, address: str) -> C | None:
        """Add a connection that waits for its request; return the one to close, None if there is room.

        The result is `connection` itself, not added, if all others are being answered.
        """
        ends = None
        if len(self._known) >= self._most:
            ends = self._oldest_of_busiest()
            if ends is None:
                return connection
            del self._known[ends]
        self._known[connection] = _Known(network_of(address), self._clock())
        return ends

    def note(self, connection: C, *, waits: bool) -> None:
        known = self._known.get(connection)
        if known is not None and known.waits != waits:
            known.waits, known.since = waits, self._clock()

    def discard(self, connection: C) -> None:
        self._known.pop(connection, None)

    def overdue(self, *, wait_s: float, answer_s: float = math.inf) -> list[C]:
        """Return the connections that have waited for their request, or were answered, for too long."""
        now = self._clock()
        return [
            connection
            for connection, each in self._known.items()
            if now - each.since > (wait_s if each.waits else answer_s)
        ]

    def _oldest_of_busiest(self) -> C | None:
        now = self._clock()
        idle = {connection: each for connection, each in self._known.items() if each.waits}
        if not idle:
            idle = {connection: each for connection, each in self._known.items() if now - each.since > self._answer_s}
        counts = Counter(each.network for each in idle.values())
        return min(idle, key=lambda each: (-counts[idle[each].network], idle[each].since), default=None)

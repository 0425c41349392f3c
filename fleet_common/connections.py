"""Connections of a server: which one ends first when there are too many, and which have said nothing for too long."""

import ipaddress
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

C = TypeVar("C")

_IPV6_NETWORK: Final = 64
"""Bits of an address that its owner does not choose freely."""


def network_of(address: str) -> str:
    """Return what a client cannot change at will: its IPv4 address, or the /64 of its IPv6 address."""
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
    """The connections of a server. Not synchronized.

    A client that connects and says nothing, or says it slowly, must not keep others out. When there are too many
    connections, one that waits for its request ends: the oldest of the network that has most of them.

    Args:
        most: Connections at once.
        clock: Monotonic seconds.
        answer_s: Seconds after which an answer may be ended too, to make room for a new connection.
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
        """Add a connection, which waits for its request.

        Returns:
            The connection that has to end: an older one; or this one, which is not added, if all others are answered;
            None if there is room.
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
        """Note whether a connection waits for its request, or is answered."""
        known = self._known.get(connection)
        if known is not None and known.waits != waits:
            known.waits, known.since = waits, self._clock()

    def discard(self, connection: C) -> None:
        """Forget a connection that has ended."""
        self._known.pop(connection, None)

    def overdue(self, *, wait_s: float, answer_s: float = math.inf) -> list[C]:
        """Return the connections that have waited for their request, or were answered, for longer than that."""
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

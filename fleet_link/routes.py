"""Which handler gets which message."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

from fleet_link.counters import Guard
from fleet_link.filters import check_filter, matches
from fleet_link.link import Handler, Message

__all__ = ["Route", "Routes"]


@dataclass(frozen=True, slots=True)
class Route:
    """One subscription.

    Attributes:
        filter: Topic filter, a `$share` prefix included.
        handler: Who gets the messages.
        qos: Highest QoS asked for.
    """

    filter: str
    handler: Handler
    qos: int


class Routes:
    """The subscriptions of a link. Changed from any thread, read by the link's."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._lock = threading.Lock()
        self._routes: tuple[Route, ...] = ()  # replaced, never changed, so that readers need no lock

    def __iter__(self) -> Iterator[Route]:
        return iter(self._routes)

    def add(self, route: Route) -> None:
        """Add a subscription, in place of one with the same filter.

        Raises:
            ValueError: The filter is not a valid one, or the QoS is neither 0 nor 1.
        """
        check_filter(route.filter)
        if route.qos not in {0, 1}:
            raise ValueError(f"QoS {route.qos} is not supported: use 0 or 1.")
        with self._lock:
            self._routes = (*(old for old in self._routes if old.filter != route.filter), route)

    def remove(self, topic_filter: str) -> bool:
        """End a subscription; return whether there was one."""
        with self._lock:
            kept = tuple(route for route in self._routes if route.filter != topic_filter)
            found = len(kept) < len(self._routes)
            self._routes = kept
        return found

    def dispatch(self, message: Message) -> None:
        """Give the message to every handler whose filter matches."""
        for route in self._routes:
            if matches(route.filter, message.topic):
                self._guard.counters.received += 1
                self._guard.call(route.handler, message)

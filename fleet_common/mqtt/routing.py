"""Topic filters and the routing of messages to handlers."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fleet_common.mqtt.counters import Guard
from fleet_common.mqtt.link import Handler, Message

SHARE = "$share"
MAX_TOPIC_BYTES = 65_535


def split_share(topic_filter: str) -> tuple[str | None, str]:
    """Return group and filter of `$share/<group>/<filter>`; None and the filter itself of any other."""
    head, _, rest = topic_filter.partition("/")
    if head != SHARE:
        return None, topic_filter
    group, _, below = rest.partition("/")
    return group, below


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a message to `topic` is for a subscriber of `topic_filter`; a `$share` prefix plays no part."""
    return _matches(split_share(topic_filter)[1].split("/"), topic.split("/"), topic)


def _matches(expected: Sequence[str], levels: Sequence[str], topic: str) -> bool:
    if topic.startswith("$") and expected[0] in {"+", "#"}:
        return False  # MQTT 5, 4.7.2: the server's own topics are not for wildcards
    for position, level in enumerate(expected):
        if level == "#":
            return True  # the parent level included
        if position >= len(levels) or level not in {"+", levels[position]}:
            return False
    return len(levels) == len(expected)


def check_filter(topic_filter: str) -> None:
    """Refuse what is no topic filter.

    Raises:
        ValueError: It is empty, has a wildcard in the midst of a level, or is a share without a group.
    """
    group, inner = split_share(topic_filter)
    levels = inner.split("/")
    wildcards_alone = all(level in {"+", "#"} or not set(level) & {"+", "#"} for level in levels)
    good_group = group is None or (bool(group) and not set(group) & {"+", "#"})
    if not inner or not good_group or not wildcards_alone or "#" in levels[:-1] or not _encodable(topic_filter):
        raise ValueError(f"{topic_filter[:200]!r} is not a valid topic filter.")


def check_topic(topic: str) -> None:
    """Refuse what nothing can be published to.

    Raises:
        ValueError: It is empty, too long, or has wildcards.
    """
    if not topic or set(topic) & {"+", "#"} or not _encodable(topic):
        raise ValueError(f"{topic[:200]!r} is not a topic to publish to.")


def _encodable(text: str) -> bool:
    try:
        return "\0" not in text and len(text.encode()) <= MAX_TOPIC_BYTES
    except UnicodeEncodeError:
        return False


@dataclass(frozen=True, slots=True)
class Route:
    """One subscription.

    Attributes:
        filter: Topic filter, a `$share` prefix included.
        handler: Who gets the messages.
        qos: Highest QoS asked for.
        retained: Whether the broker is to send what it keeps.
    """

    filter: str
    handler: Handler
    qos: int
    retained: bool = True
    _levels: tuple[str, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_levels", tuple(split_share(self.filter)[1].split("/")))

    def matches(self, topic: str, levels: Sequence[str]) -> bool:
        """Return whether a message is for it, given its topic and the topic's levels."""
        return _matches(self._levels, levels, topic)


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
        """Give the message to every handler whose filter matches and that wants what is retained, if it is."""
        levels = message.topic.split("/")
        for route in self._routes:
            if message.retained and not route.retained:
                continue  # some brokers send it all the same
            if route.matches(message.topic, levels):
                self._guard.counters.received += 1
                self._guard.call(route.handler, message)

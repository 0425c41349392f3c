"""Link: what both ends need of a message broker, as one small interface; its counters, topic filters and routing.

A link delivers at least once and, for one publisher and topic, in order while the connection lasts. Handlers run on the
link's own thread and MUST NOT block: they hand over and return.

After a lost connection the link sends again what the broker had not yet acknowledged (QoS 1, within its expiry), so a
receiver may see a message twice. What others published in between is lost to this client, retained messages excepted: a
broker keeps no session for a link. The protocol above is idempotent and asks again.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from fleet_common.mqtt.errors import ConnectFailed, PublishRejected

_log = logging.getLogger(__name__)


A = TypeVar("A")

Accepts = Callable[[bytes, int, bool], bool]


@dataclass(slots=True)
class LinkCounters:
    """Counters of a link since it was created.

    Attributes:
        losses: Connections lost, without goodbyes.
        takeovers: Losses because another client connected with the same client id.
        screened: Messages dropped unread, because the link's screen refused them.
        sent: Messages given to the network, including repeats.
        expired: Messages dropped here because their expiry had passed.
        dropped: QoS 0 messages dropped while disconnected.
        displaced: Queued messages dropped to make room for a flow with fewer.
        oversized: Queued messages dropped because a new connection's packet limit was smaller.
        unanswered: QoS 1 messages that the broker took without an answer: it answered later ones.
        stalls: Connections ended because the broker answered nothing any more.
        handler_errors: Exceptions of handlers, listeners, screens and outcome callbacks.
        renewals: Connections replaced by one with a renewed certificate; they are no losses.
        restarts: Unexpected failures of the network loop, after which it started again.
    """

    connects: int = 0
    losses: int = 0
    takeovers: int = 0
    screened: int = 0
    received: int = 0
    sent: int = 0
    expired: int = 0
    dropped: int = 0
    displaced: int = 0
    oversized: int = 0
    unanswered: int = 0
    stalls: int = 0
    handler_errors: int = 0
    renewals: int = 0
    restarts: int = 0


@dataclass(slots=True)
class CallbackGuard:
    """Call the application's callbacks and catch their exceptions."""

    counters: LinkCounters = field(default_factory=LinkCounters)
    _screen_failed: bool = False

    def call(self, function: Callable[[A], None], argument: A) -> None:
        try:
            function(argument)
        except BaseException as error:  # noqa: BLE001 - not even its SystemExit may end the link's thread
            self.counters.handler_errors += 1
            _log.error("A handler of the link failed and is ignored.", exc_info=error)

    def ask(self, accepts: Accepts, topic: bytes, packet_bytes: int, *, retained: bool) -> bool:
        """Return `accepts(…)`; an exception is counted, logged once, and means yes."""
        try:
            return accepts(topic, packet_bytes, retained)
        except BaseException as error:  # noqa: BLE001 - likewise
            self.counters.handler_errors += 1
            if not self._screen_failed:
                self._screen_failed = True
                _log.error("The link's screen fails and lets messages pass; this is logged once.", exc_info=error)
            return True


NO_MATCHING_SUBSCRIBERS = 0x10
PACKET_TOO_LARGE = 0x95
FIRST_ERROR = 0x80


@dataclass(frozen=True, slots=True)
class Message:
    """A received message; `retained` marks the broker's retained copy."""

    topic: str
    payload: bytes
    retained: bool = False


@dataclass(frozen=True, slots=True)
class Will:
    """Last will: the broker publishes it, retained, when this client vanishes without a goodbye."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class PublishOutcome:
    """The broker's answer to a QoS 1 publish.

    An MQTT 5 reason code below 0x80 is success, including `NO_MATCHING_SUBSCRIBERS`.
    """

    topic: str
    reason: int

    @property
    def accepted(self) -> bool:
        return self.reason < FIRST_ERROR


Handler = Callable[[Message], None]
Listener = Callable[[bool], None]
OutcomeHandler = Callable[[PublishOutcome], None]


class Link(Protocol):
    """One client of the broker."""

    def start(self, *, timeout_s: float) -> None:
        """Connect and begin to deliver; earlier subscriptions are in force on return.

        A broker that does not answer is tried again until `timeout_s` is over, then ConnectFailed is raised; one that
        refuses us raises it at once. Does nothing if already started. May be called again after a failure, or after
        `stop`.
        """

    def stop(self) -> None:
        """Send what can be sent shortly, disconnect without last will, end the thread. Idempotent."""

    def subscribe(self, topic_filter: str, handler: Handler, *, qos: int = 1, retained: bool = True) -> None:
        """Route messages that match `topic_filter` to `handler`, on the link's thread.

        May be called before or after `start`; MUST be renewed by the link after every reconnect. A handler's exception
        MUST NOT reach the link's thread; it is logged and counted. A second handler for the same filter replaces the
        first. A message that matches several filters reaches the handler of each, and may do so more than once.

        `qos` is 0 or 1. `retained` asks for retained messages, now and after every reconnect. Raise ValueError if the
        filter or `qos` is invalid.
        """

    def unsubscribe(self, topic_filter: str) -> None:
        """End a subscription; unknown filters are ignored."""

    def screen(self, accepts: Accepts) -> None:
        """Ask `accepts(topic, packet_bytes, retained)` about every message before it is decoded.

        A refused message is acknowledged and dropped within a few microseconds, so that a flood costs little. `accepts`
        runs on the link's thread for every message and MUST be quick. If it raises, the message is accepted. It
        holds from the next message on and across reconnects; a second one replaces it.
        """

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        expiry_s: int | None = None,
        content_type: str | None = None,
        alias: bool = False,
        priority: bool = False,
        on_outcome: OutcomeHandler | None = None,
    ) -> None:
        """Send a message. Never blocks; callable from any thread.

        While disconnected, QoS 1 is queued and QoS 0 is dropped. Messages of one flow and priority stay in order, and
        flows take turns; a flow is all topics with the same first four levels: `dssd/v1/<fleet>/<client>`. When the
        queue is full, the newest messages of the flow that occupies most of it are dropped to make room for others;
        retained QoS 1 messages are never dropped.

        An undelivered message is dropped after `expiry_s`, here and at the broker. With `alias` the topic is sent once,
        and then a two-byte alias. Messages with `priority` go before others, without starving them. `on_outcome` is
        called on the link's thread with the broker's answer (QoS 1), but not for a message that expired here, made
        room, or was still unanswered at `stop`.

        Raise PacketTooLarge if the broker announced a smaller limit, NotConnected if the queue is full and no other
        flow occupies more of it, ValueError for an invalid topic or `qos`.
        """

    def on_connection(self, listener: Listener) -> None:
        """Call `listener(True)` after every connect and `listener(False)` after every loss.

        It runs on the link's thread; at `listener(True)` the subscriptions are in force. A broker that restarted may
        have lost retained messages: publish them again here.
        """

    @property
    def connected(self) -> bool: ...

    @property
    def failure(self) -> ConnectFailed | None:
        """Why the link is not connected, if known; None while it is."""

    @property
    def max_packet_bytes(self) -> int:
        """Largest packet that can be published."""

    @property
    def counters(self) -> LinkCounters:
        """Counts of this link since it was made."""


def publish_confirmed(
    link: Link,
    topic: str,
    payload: bytes,
    *,
    timeout_s: float,
    retain: bool = False,
    content_type: str | None = None,
) -> PublishOutcome:
    """Publish at QoS 1 and return the broker's answer, which may be that there is no subscriber.

    Blocks, so it MUST NOT be called from a handler. Raise PublishRejected if the broker refuses or does not answer
    within `timeout_s`; else raise as `Link.publish` does.
    """
    answered, answers = threading.Event(), list[PublishOutcome]()

    def remember(outcome: PublishOutcome) -> None:
        answers.append(outcome)
        answered.set()

    link.publish(topic, payload, retain=retain, content_type=content_type, on_outcome=remember)
    if not answered.wait(timeout_s):
        raise PublishRejected(topic=topic, reason=None)
    if not answers[0].accepted:
        raise PublishRejected(topic=topic, reason=answers[0].reason)
    return answers[0]


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
    """Match a topic and a filter; a `$share` prefix is ignored."""
    return _matches(split_share(topic_filter)[1].split("/"), topic.split("/"), topic)


def _matches(expected: Sequence[str], levels: Sequence[str], topic: str) -> bool:
    if topic.startswith("$") and expected[0] in {"+", "#"}:
        return False  # MQTT 5, 4.7.2: wildcards do not match the server's own topics
    for position, level in enumerate(expected):
        if level == "#":
            return True  # the parent level included
        if position >= len(levels) or level not in {"+", levels[position]}:
            return False
    return len(levels) == len(expected)


def check_filter(topic_filter: str) -> None:
    """Raise ValueError if the filter is empty, has a wildcard within a level, or is a share without a group."""
    group, inner = split_share(topic_filter)
    levels = inner.split("/")
    wildcards_alone = all(level in {"+", "#"} or not set(level) & {"+", "#"} for level in levels)
    good_group = group is None or (bool(group) and not set(group) & {"+", "#"})
    if not inner or not good_group or not wildcards_alone or "#" in levels[:-1] or not _encodable(topic_filter):
        raise ValueError(f"{topic_filter[:200]!r} is not a valid topic filter.")


def check_topic(topic: str) -> None:
    """Raise ValueError if the topic is empty, too long, or has wildcards."""
    if not topic or set(topic) & {"+", "#"} or not _encodable(topic):
        raise ValueError(f"{topic[:200]!r} is not a topic to publish to.")


def _encodable(text: str) -> bool:
    try:
        return "\0" not in text and len(text.encode()) <= MAX_TOPIC_BYTES
    except UnicodeEncodeError:
        return False


@dataclass(frozen=True, slots=True)
class Route:
    """One subscription; `filter` includes a `$share` prefix."""

    filter: str
    handler: Handler
    qos: int
    retained: bool = True
    _levels: tuple[str, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_levels", tuple(split_share(self.filter)[1].split("/")))

    def matches(self, topic: str, levels: Sequence[str]) -> bool:
        return _matches(self._levels, levels, topic)


class Routes:
    """Subscriptions of a link. Changed from any thread, read by the link's."""

    def __init__(self, guard: CallbackGuard) -> None:
        self._guard = guard
        self._lock = threading.Lock()
        self._routes: tuple[Route, ...] = ()  # replaced, never changed, so that readers need no lock

    def __iter__(self) -> Iterator[Route]:
        return iter(self._routes)

    def add(self, route: Route) -> None:
        """Add a subscription, or replace one with the same filter; raise ValueError if it is invalid."""
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
        """Pass a message to every matching handler that accepts retained messages, if it is one."""
        levels = message.topic.split("/")
        for route in self._routes:
            if message.retained and not route.retained:
                continue  # some brokers send it anyway
            if route.matches(message.topic, levels):
                self._guard.counters.received += 1
                self._guard.call(route.handler, message)

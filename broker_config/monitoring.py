"""Metrics and exceeded limits that mosquitto reports below $SYS."""

import math
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from fleet_common.metrics import PREFIX, Family, Health, Metric, MetricKind, MetricsPages, exposition
from fleet_common.mqtt.link import Link, Message
from schemas.printable import printable_line

DROPPED: Final = "$SYS/broker/publish/messages/dropped"
NOTICES: Final = "$SYS/broker/log/N"
WARNINGS: Final = "$SYS/broker/log/W"
SHARED: Final = "$SYS/broker/shared_subscriptions/count"
SYS_TOPICS: Final = (DROPPED, NOTICES, WARNINGS, SHARED)

# Each edge has one. A message is held against every one of them that matches: a thousand take a millisecond and more.
MOST_SHARED: Final = 256

LONGEST: Final = 500  # of a line that is looked at
_LINES: Final = (
    (
        re.compile(r"Outgoing messages are being dropped for client (.+)\.$"),
        "queue",
        "The queue of {} is full: it reads more slowly than messages arrive, and messages to it are dropped.",
    ),
    (
        re.compile(r"Dropping too large outgoing PUBLISH for (\S+) "),
        "packet",
        "A message to {} was dropped because it exceeds that client's limit: give all clients the same limit.",
    ),
    (
        re.compile(r"Client connection from (\S+) denied: max_connections exceeded"),
        "connections",
        "A client at {} was refused: the broker's max_connections is reached.",
    ),
)


@dataclass(frozen=True, slots=True)
class LimitReached:
    limit: str  # `queue`, `packet`, `connections` or `subscriptions`
    who: str | None  # client or address; None where the broker only counts
    sentence: str


@dataclass(slots=True)
class LimitWatch:
    """Report the limits in mosquitto's messages on `SYS_TOPICS` that were not reported before."""

    _dropped: int = 0
    _shared: int = 0

    def take(self, topic: str, payload: bytes) -> LimitReached | None:
        text = payload[:LONGEST].decode(errors="replace")
        if topic == DROPPED:
            return self._take_dropped(_count(text, self._dropped))
        if topic == SHARED:
            return self._take_shared(_count(text, self._shared))
        return self._take_line(text)

    def _take_shared(self, count: int) -> LimitReached | None:
        grown = count > max(MOST_SHARED, self._shared)
        self._shared = count
        if not grown:
            return None
        return LimitReached(
            "subscriptions",
            None,
            f"There are {count} shared subscriptions, where each edge needs one: messages take longer for all. Set "
            "log_subscriptions, render and restart the broker, and its log says whose they are; revoke that device.",
        )

    def _take_dropped(self, count: int) -> LimitReached | None:
        # What was dropped earlier is reported too. A restarted broker counts from zero.
        new = count - self._dropped if count >= self._dropped else count
        self._dropped = count
        if new == 0:
            return None
        return LimitReached("queue", None, f"The broker has dropped {new} messages because a client's queue was full.")

    @staticmethod
    def _take_line(text: str) -> LimitReached | None:
        for pattern, limit, sentence in _LINES:
            found = pattern.search(text)
            if found is not None:
                who = printable_line(found[1])  # a client id is what its owner likes it to be
                return LimitReached(limit, who, sentence.format(who))
        return None


def _count(text: str, otherwise: int) -> int:
    # ASCII digits alone: int() takes more than the broker writes.
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else otherwise


def _metric(name: str, kind: MetricKind, meaning: str) -> Metric:
    return Metric(f"{PREFIX}broker_{name}", kind, meaning)


_TOPICS: Final = {
    "clients/connected": _metric("clients_connected", MetricKind.GAUGE, "Clients that are connected."),
    "clients/maximum": _metric("clients_maximum", MetricKind.GAUGE, "Maximum number of clients connected at once."),
    "subscriptions/count": _metric("subscriptions", MetricKind.GAUGE, "Subscriptions that are in force."),
    "retained messages/count": _metric("retained_messages", MetricKind.GAUGE, "Messages that are kept."),
    "store/messages/bytes": _metric("stored_bytes", MetricKind.GAUGE, "Payload of messages that wait or are kept."),
    "heap/current": _metric("heap_bytes", MetricKind.GAUGE, "Memory in use."),
    "uptime": _metric("uptime_seconds", MetricKind.GAUGE, "Time since the broker started."),
    "messages/received": _metric("messages_received_total", MetricKind.COUNTER, "Packets that clients have sent."),
    "messages/sent": _metric("messages_sent_total", MetricKind.COUNTER, "Packets that clients were sent."),
    "publish/messages/dropped": _metric(
        "publish_dropped_total", MetricKind.COUNTER, "Messages that were dropped because a client's queue was full."
    ),
    "bytes/received": _metric("bytes_received_total", MetricKind.COUNTER, "Bytes that clients have sent."),
    "bytes/sent": _metric("bytes_sent_total", MetricKind.COUNTER, "Bytes that clients were sent."),
}
_UP: Final = _metric("up", MetricKind.GAUGE, "Whether the broker answers (1) or not (0).")

BROKER_CATALOGUE: Final[tuple[Metric, ...]] = (_UP, *_TOPICS.values())
"""All metrics of a broker."""

_ROOT: Final = "$SYS/broker/"
_NUMBER: Final = re.compile(rb"(\d{1,20}(?:\.\d{1,9})?)(?: seconds)?")


@dataclass(slots=True)
class BrokerFigures:
    link: Link  # of a monitor: nobody else may read `$SYS`
    _values: dict[str, float] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def subscribe(self) -> None:
        for topic in _TOPICS:
            self.link.subscribe(_ROOT + topic, self.take, qos=0)

    def take(self, message: Message) -> None:
        """Record a figure; ignore other messages."""
        topic = message.topic.removeprefix(_ROOT)
        found = _NUMBER.fullmatch(message.payload.strip())
        if topic in _TOPICS and found is not None and math.isfinite(value := float(found[1])):
            with self._lock:
                self._values[topic] = value

    def families(self) -> Iterator[Family]:
        yield _UP.of(self.link.connected)
        if not self.link.connected:
            return  # what was is not what is
        with self._lock:
            values = dict(self._values)
        for topic, value in values.items():
            yield _TOPICS[topic].of(value)

    def pages(self) -> MetricsPages:
        return MetricsPages(lambda: exposition(self.families()), lambda: Health({}), self.ready)

    def ready(self) -> Health:
        return Health({"broker": "" if self.link.connected else "The broker cannot be reached."})

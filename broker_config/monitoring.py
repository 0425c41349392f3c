"""Metrics that mosquitto reports below $SYS."""

import math
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from fleet_common.metrics import PREFIX, Family, Health, Metric, MetricKind, MetricsPages, exposition
from fleet_common.mqtt.link import Link, Message


def _metric(name: str, kind: MetricKind, meaning: str) -> Metric:
    return Metric(f"{PREFIX}broker_{name}", kind, meaning)


_TOPICS: Final = {
    "clients/connected": _metric("clients_connected", MetricKind.GAUGE, "Clients that are connected."),
    "clients/maximum": _metric("clients_maximum", MetricKind.GAUGE, "Maximum number of clients connected at once."),
    "shared_subscriptions/count": _metric(
        "shared_subscriptions",
        MetricKind.GAUGE,
        "Shared subscriptions; each edge needs one, many slow all messages.",
    ),
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

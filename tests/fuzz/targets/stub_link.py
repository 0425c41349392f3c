"""Link of the fuzz targets: what is delivered reaches the handlers at once, what is published is kept."""

from dataclasses import dataclass, field
from typing import Any

from fleet_common.mqtt.link import (
    Accepts,
    CallbackGuard,
    Handler,
    LinkCounters,
    Listener,
    Message,
    Route,
    Routes,
    check_topic,
)


@dataclass
class StubLink:
    """A `Link` without a broker; `published` has what was sent since the last look."""

    published: list[tuple[str, bytes]] = field(default_factory=list)
    connected: bool = True
    failure: None = None
    max_packet_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        self._guard = CallbackGuard()
        self._routes = Routes(self._guard)
        self._accepts: Accepts | None = None
        self._listeners: list[Listener] = []

    @property
    def counters(self) -> LinkCounters:
        return self._guard.counters

    def start(self, *, timeout_s: float) -> None:
        pass

    def stop(self) -> None:
        pass

    def subscribe(self, topic_filter: str, handler: Handler, *, qos: int = 1, retained: bool = True) -> None:
        self._routes.add(Route(topic_filter, handler, qos, retained))

    def unsubscribe(self, topic_filter: str) -> None:
        self._routes.remove(topic_filter)

    def screen(self, accepts: Accepts) -> None:
        self._accepts = accepts

    def on_connection(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def publish(self, topic: str, payload: bytes, **_options: Any) -> None:
        check_topic(topic)
        self.published.append((topic, payload))

    def take(self) -> list[tuple[str, bytes]]:
        published, self.published = self.published, []
        return published

    def deliver(self, topic: str, payload: bytes, *, retained: bool = False) -> None:
        raw = topic.encode()
        if self._accepts is not None:
            size = len(raw) + len(payload) + 8
            if not self._guard.ask(self._accepts, raw, size, retained=retained):
                return
        self._routes.dispatch(Message(topic, payload, retained))

    def connect(self, *, up: bool) -> None:
        self.connected = up
        for listener in self._listeners:
            self._guard.call(listener, up)

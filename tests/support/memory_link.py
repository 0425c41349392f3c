"""Link over a `MemoryBroker`, with the contract of `PahoLink`."""

from fleet_common.mqtt.errors import ConnectFailed
from fleet_common.mqtt.link import (
    Accepts,
    CallbackGuard,
    Handler,
    LinkCounters,
    Listener,
    Message,
    OutcomeHandler,
    PublishOutcome,
    Route,
    Routes,
    Will,
)
from fleet_common.mqtt.outbox import Outbox, Outgoing
from fleet_common.mqtt.packets import publish_packet
from tests.support.memory_broker import MemoryBroker, Peer


class MemoryLink:
    """A `Link` to a memory broker. Its handlers run on the thread that pumps the broker."""

    def __init__(
        self,
        broker: MemoryBroker,
        client_id: str,
        *,
        will: Will | None = None,
        queue_messages: int = 1000,
    ) -> None:
        self._broker = broker
        self._client_id = client_id
        self._will = will
        self._guard = CallbackGuard()
        self._routes = Routes(self._guard)
        self._outbox = Outbox(
            max_messages=queue_messages,
            max_bytes=8 << 20,
            clock=broker.clock,
            counters=self.counters,
        )
        self._accepts: Accepts | None = None
        self._listeners: tuple[Listener, ...] = ()
        self._peer: Peer | None = None

    @property
    def counters(self) -> LinkCounters:
        return self._guard.counters

    @property
    def connected(self) -> bool:
        return self._peer is not None and self._peer.alive

    @property
    def failure(self) -> ConnectFailed | None:
        return None if self.connected else ConnectFailed("The connection to the memory broker was lost.")

    @property
    def max_packet_bytes(self) -> int:
        return self._broker.max_packet_bytes

    def start(self, *, timeout_s: float) -> None:
        """Connect; a memory broker that is down is not waited for."""
        if self._peer is not None:
            return
        if not self._broker.up:
            raise ConnectFailed(f"The memory broker is down; waiting {timeout_s} s would not help: bring it up.")
        self._attach()

    def stop(self) -> None:
        if self._peer is not None:
            self._broker.detach(self._peer)
            self._peer = None

    def subscribe(self, topic_filter: str, handler: Handler, *, qos: int = 1, retained: bool = True) -> None:
        self._routes.add(Route(topic_filter, handler, qos, retained))
        if self._peer is not None and self._peer.alive:
            self._broker.subscribe(self._peer, topic_filter, retained=retained)

    def unsubscribe(self, topic_filter: str) -> None:
        if self._routes.remove(topic_filter) and self._peer is not None:
            self._peer.filters.discard(topic_filter)

    def screen(self, accepts: Accepts) -> None:
        self._accepts = accepts

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
        deadline = None if expiry_s is None else self._broker.clock() + expiry_s
        message = Outgoing(topic, payload, qos, retain, deadline, content_type, alias, on_outcome, priority)
        message.check(limit=self.max_packet_bytes)
        if qos == 0 and not self.connected:
            self.counters.dropped += 1
            return
        self._outbox.put(message)
        self._drain()

    def on_connection(self, listener: Listener) -> None:
        self._listeners = (*self._listeners, listener)

    def _attach(self) -> None:
        self._peer = Peer(self._client_id, self._receive, self._lost, self._attach, self._will)
        self._broker.attach(self._peer)
        for route in self._routes:
            self._broker.subscribe(self._peer, route.filter, retained=route.retained)
        self.counters.connects += 1
        self._broker.schedule(lambda: self._notify(connected=True))
        self._drain()

    def _drain(self) -> None:
        while self.connected and (message := self._outbox.next_message(window=1)) is not None:
            self.counters.sent += 1
            reason = self._broker.accept(message)
            if message.qos > 0 and message.on_outcome is not None:
                self._answer(message.on_outcome, PublishOutcome(message.topic, reason))

    def _answer(self, handler: OutcomeHandler, outcome: PublishOutcome) -> None:
        self._broker.schedule(lambda: self._guard.call(handler, outcome))

    def _receive(self, message: Message) -> None:
        topic, size = message.topic.encode(), len(publish_packet(message.topic, message.payload, identifier=1))
        if self._accepts is None or self._guard.ask(self._accepts, topic, size, retained=message.retained):
            self._routes.dispatch(message)
        else:
            self.counters.screened += 1

    def _lost(self) -> None:
        self.counters.losses += 1
        self._notify(connected=False)

    def _notify(self, *, connected: bool) -> None:
        for listener in self._listeners:
            self._guard.call(listener, connected)

"""Outgoing messages: one bounded queue, connected or not, and what the link's thread does with it."""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from fleet_link.counters import Guard, LinkCounters
from fleet_link.errors import NotConnected, PacketTooLarge
from fleet_link.link import PACKET_TOO_LARGE, Outcome, OutcomeHandler
from fleet_link.mqtt_client import Announced
from fleet_link.packets import publish_packet_bytes
from fleet_link.routing import check_topic
from fleet_link.settings import LinkSettings

__all__ = ["Outbox", "Outgoing", "Sender"]


@dataclass(frozen=True, slots=True, eq=False)
class Outgoing:
    """A message on its way to the broker.

    Attributes:
        topic: Full topic; an alias is chosen when it is sent, never kept.
        payload: Bytes.
        qos: 0 or 1.
        retain: Whether the broker keeps it.
        deadline: Clock reading after which it is worthless, or None.
        content_type: MQTT 5 content type.
        alias: Whether the topic may be sent as an alias.
        on_outcome: Called with the broker's answer.
    """

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    deadline: float | None = None
    content_type: str | None = None
    alias: bool = False
    on_outcome: OutcomeHandler | None = None

    @property
    def packet_bytes(self) -> int:
        """Bytes of the packet at its largest: with the topic written out."""
        return publish_packet_bytes(
            self.topic,
            self.payload,
            qos=self.qos,
            expiry=self.deadline is not None,
            content_type=self.content_type,
            alias=self.alias,
        )

    def expired(self, now: float) -> bool:
        """Whether its time has passed."""
        return self.deadline is not None and now >= self.deadline

    def expiry_s(self, now: float) -> int | None:
        """Whole seconds left to live, at least 1."""
        return None if self.deadline is None else max(1, math.ceil(self.deadline - now))

    def check(self, *, limit: int) -> None:
        """Refuse what no broker, or not this one, would take.

        Args:
            limit: Largest packet in bytes.

        Raises:
            ValueError: The topic cannot be published to, or the QoS is neither 0 nor 1.
            PacketTooLarge: The packet exceeds `limit`.
        """
        check_topic(self.topic)
        if self.qos not in {0, 1}:
            raise ValueError(f"QoS {self.qos} is not supported: use 0 or 1.")
        if self.packet_bytes > limit:
            raise PacketTooLarge(size=self.packet_bytes, limit=limit)


class Outbox:
    """Waiting and unacknowledged messages, in order, under one bound.

    What was sent but not acknowledged when the connection was lost goes back to the head of the queue.
    Messages are kept here in full and never by the MQTT library, whose own repeats would carry an alias that
    the next connection does not know.
    """

    def __init__(
        self, *, max_messages: int, max_bytes: int, clock: Callable[[], float], counters: LinkCounters
    ) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._clock = clock
        self._counters = counters
        self._lock = threading.Lock()
        self._waiting: deque[Outgoing] = deque()
        self._unanswered: dict[int, Outgoing] = {}  # by packet identifier, in the order sent
        self._bytes = 0
        self.left_out = 0  # answers that this connection's broker has left out

    def __len__(self) -> int:
        return len(self._waiting) + len(self._unanswered)

    def put(self, message: Outgoing) -> None:
        """Append a message.

        Raises:
            NotConnected: There is no room.
        """
        size = message.packet_bytes
        with self._lock:
            if not self._fits(size):
                self._drop_expired()
            if not self._fits(size):
                raise NotConnected(
                    f"The broker takes nothing more for now: {len(self)} messages ({self._bytes} bytes) are "
                    "waiting; try again when the link is connected."
                )
            self._waiting.append(message)
            self._bytes += size

    def take(self, *, window: int) -> Outgoing | None:
        """Remove and return the next message to send; None if there is none or `window` are unanswered."""
        with self._lock:
            while self._waiting and (self._waiting[0].qos == 0 or len(self._unanswered) < window):
                message = self._waiting.popleft()
                self._bytes -= message.packet_bytes
                if not message.expired(self._clock()):
                    return message
                self._counters.expired += 1
            return None

    def await_answer(self, identifier: int, message: Outgoing) -> None:
        """Note that a QoS 1 message was sent under this packet identifier."""
        with self._lock:
            self._unanswered[identifier] = message
            self._bytes += message.packet_bytes

    @property
    def awaiting_answers(self) -> int:
        """Messages that were sent and not answered."""
        return len(self._unanswered)

    def pop_answered(self, identifier: int) -> Outgoing | None:
        """Return and forget the message that the broker answers; None for an unknown identifier.

        Messages that were sent before it and are not answered never will be: a broker answers in the order of arrival
        (MQTT 5, 4.6), and some drop an answer where a client's queue is full. It has taken those messages, so they are
        forgotten as well, and counted.
        """
        with self._lock:
            if identifier not in self._unanswered:
                return None
            for earlier in list(self._unanswered):
                message = self._unanswered.pop(earlier)
                self._bytes -= message.packet_bytes
                if earlier == identifier:
                    return message
                self._counters.unanswered += 1
                self.left_out += 1
        return None

    def connection_lost(self) -> None:
        """Put unanswered messages back at the head, in order, and drop those of QoS 0."""
        with self._lock:
            waiting = [message for message in self._waiting if message.qos > 0]
            lost = [message for message in self._waiting if message.qos == 0]
            self._counters.dropped += len(lost)
            self._bytes -= sum(message.packet_bytes for message in lost)
            self._waiting = deque([*self._unanswered.values(), *waiting])
            self._unanswered = {}
            self.left_out = 0

    def _fits(self, size: int) -> bool:
        return len(self) < self._max_messages and self._bytes + size <= self._max_bytes

    def _drop_expired(self) -> None:
        now = self._clock()
        kept = deque(message for message in self._waiting if not message.expired(now))
        gone = [message for message in self._waiting if message.expired(now)]
        self._counters.expired += len(gone)
        self._bytes -= sum(message.packet_bytes for message in gone)
        self._waiting = kept


_log = logging.getLogger(__name__)


class Sender:
    """The outgoing half of a link, across its connections. Only `put` may be called from any thread."""

    def __init__(self, settings: LinkSettings, *, guard: Guard, clock: Callable[[], float]) -> None:
        self._guard = guard
        self._clock = clock
        self._answered = True  # since silence was last measured
        self._silent_since = 0.0
        self._outbox = Outbox(
            max_messages=settings.queue_messages,
            max_bytes=settings.queue_bytes,
            clock=clock,
            counters=guard.counters,
        )

    @property
    def idle(self) -> bool:
        """Whether everything was sent and answered."""
        return len(self._outbox) == 0

    @property
    def awaiting_answers(self) -> int:
        """Messages that were sent and not answered."""
        return self._outbox.awaiting_answers

    @property
    def left_out(self) -> int:
        """Answers that the broker has left out on this connection."""
        return self._outbox.left_out

    def unanswered_s(self, *, delivered: bool) -> float:
        """Return for how long the broker has answered nothing although it has all that was sent (seconds).

        Args:
            delivered: Whether all that was written has reached the broker's machine: a slow network is no silence.
        """
        now = self._clock()
        if self._answered or not delivered or not self.awaiting_answers:
            self._answered, self._silent_since = False, now
        return now - self._silent_since

    def put(self, message: Outgoing) -> None:
        """Append a message.

        Raises:
            NotConnected: There is no room.
        """
        self._outbox.put(message)

    def drain(self, send: Callable[[Outgoing], int], announced: Announced) -> None:
        """Send all that the broker lets us send now.

        Args:
            send: Writes a PUBLISH and returns its packet identifier.
            announced: The broker's limits.
        """
        while (message := self._outbox.take(window=announced.receive_maximum)) is not None:
            if message.packet_bytes > announced.max_packet_bytes:
                # Queued for a broker that took larger ones.
                self._guard.counters.oversized += 1
                _log.error("A queued message to %s is too large for this broker and is dropped.", message.topic)
                self._report(message, PACKET_TOO_LARGE)
                continue
            identifier = send(message)
            self._guard.counters.sent += 1
            if message.qos > 0:
                self._outbox.await_answer(identifier, message)

    def on_answer(self, identifier: int, reason: int) -> None:
        """Take the broker's answer to the publish with this packet identifier."""
        self._answered = True
        message = self._outbox.pop_answered(identifier)
        if message is not None:
            self._report(message, reason)

    def connection_lost(self) -> None:
        """Keep what was not answered for the next connection."""
        self._answered = True
        self._outbox.connection_lost()

    def _report(self, message: Outgoing, reason: int) -> None:
        if message.on_outcome is not None:
            self._guard.call(message.on_outcome, Outcome(message.topic, reason))

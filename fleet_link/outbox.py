"""The messages of a link that the broker has not taken yet: one bounded queue, connected or not."""

import threading
from collections import deque
from collections.abc import Callable

from fleet_link.counters import Counters
from fleet_link.errors import NotConnected
from fleet_link.outgoing import Outgoing

__all__ = ["Outbox"]


class Outbox:
    """Waiting and unacknowledged messages, in order, under one bound.

    What was sent but not acknowledged when the connection was lost goes back to the head of the queue.
    Messages are kept here in full and never by the MQTT library, whose own repeats would carry an alias that
    the next connection does not know.
    """

    def __init__(self, *, max_messages: int, max_bytes: int, clock: Callable[[], float], counters: Counters) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._clock = clock
        self._counters = counters
        self._lock = threading.Lock()
        self._waiting: deque[Outgoing] = deque()
        self._unanswered: dict[int, Outgoing] = {}  # by packet identifier, in the order sent
        self._bytes = 0

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

    def answered(self, identifier: int) -> Outgoing | None:
        """Return and forget the message that the broker answers; None for an unknown identifier."""
        with self._lock:
            message = self._unanswered.pop(identifier, None)
            if message is not None:
                self._bytes -= message.packet_bytes
            return message

    def connection_lost(self) -> None:
        """Put unanswered messages back at the head, in order, and drop those of QoS 0."""
        with self._lock:
            waiting = [message for message in self._waiting if message.qos > 0]
            lost = [message for message in self._waiting if message.qos == 0]
            self._counters.dropped += len(lost)
            self._bytes -= sum(message.packet_bytes for message in lost)
            self._waiting = deque([*self._unanswered.values(), *waiting])
            self._unanswered = {}

    def _fits(self, size: int) -> bool:
        return len(self) < self._max_messages and self._bytes + size <= self._max_bytes

    def _drop_expired(self) -> None:
        now = self._clock()
        kept = deque(message for message in self._waiting if not message.expired(now))
        gone = [message for message in self._waiting if message.expired(now)]
        self._counters.expired += len(gone)
        self._bytes -= sum(message.packet_bytes for message in gone)
        self._waiting = kept

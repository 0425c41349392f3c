"""Outbox: one bounded queue of outgoing messages, connected or not, in which flows take turns.

A flow is what goes to one client, or comes from it. What one has waiting costs the others nothing: they take turns to
be sent, and where the queue is full, room is made by the flow that holds most of it.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from fleet_common.fair_queue import FairQueue
from fleet_common.mqtt.counters import LinkCounters
from fleet_common.mqtt.errors import NotConnected
from fleet_common.mqtt.outbox.holdings import Holdings
from fleet_common.mqtt.outbox.outgoing import Outgoing

TURN_BYTES: Final = 1024  # that a flow may send before the next one has its turn
MOST_IN_A_ROW: Final = 8  # priority messages, where others wait
LOOK_S: Final = 0.25  # at least between two searches for expired messages, which look at all
WHOLE: Final = 1_000_000_000
SAY_S: Final = 60.0  # at least between two warnings

_log = logging.getLogger(__name__)


class Outbox:
    """Waiting and unacknowledged messages under one bound; those of a flow and priority stay in order.

    What was sent but not acknowledged when the connection was lost goes back to the head of the queue.
    Messages are kept here in full and never by the MQTT library, whose own repeats would carry an alias that
    the next connection does not know.

    Args:
        max_messages: Most messages waiting or unacknowledged.
        max_bytes: Likewise, of their packets.
        clock: Monotonic seconds.
        counters: Of the link.
    """

    def __init__(
        self, *, max_messages: int, max_bytes: int, clock: Callable[[], float], counters: LinkCounters
    ) -> None:
        self._max_messages = max_messages
        self._max_bytes = max_bytes
        self._clock = clock
        self._counters = counters
        self._lock = threading.Lock()
        self._urgent = self._empty()
        self._others = self._empty()
        self._in_a_row = 0  # priority messages taken while others waited
        self._holdings: Holdings[tuple[str, bool]] = Holdings()  # what could be dropped, by flow and priority
        self._droppable = 0
        self._droppable_bytes = 0
        self._unanswered: OrderedDict[int, Outgoing] = OrderedDict()  # by packet identifier, in the order sent
        self._bytes = 0
        self._looked_at = -LOOK_S
        self._said_at = -SAY_S
        self.left_out = 0  # answers that this connection's broker has left out

    def __len__(self) -> int:
        return len(self._urgent) + len(self._others) + len(self._unanswered)

    def put(self, message: Outgoing) -> None:
        """Append a message. Where there is no room, flows that hold more of the queue than this one's make it.

        Raises:
            NotConnected: There is no room, and no other flow holds more.
        """
        with self._lock:
            if not self._fits(message):
                self._drop_expired()
            while not self._fits(message):
                self._make_room(message)
            self._append(message)

    def take(self, *, window: int) -> Outgoing | None:
        """Remove and return the next message to send; None if there is none or `window` are unanswered."""
        with self._lock:
            while (queue := self._next()) is not None:
                head = queue.peek()
                if head is None or (head.qos > 0 and len(self._unanswered) >= window):
                    return None
                queue.take()
                self._gone(head)
                self._in_a_row = self._in_a_row + 1 if queue is self._urgent and len(self._others) else 0
                if not head.expired(self._clock()):
                    return head
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
            while True:
                earlier, message = self._unanswered.popitem(last=False)
                self._bytes -= message.packet_bytes
                if earlier == identifier:
                    return message
                self._counters.unanswered += 1
                self.left_out += 1

    def connection_lost(self) -> None:
        """Put unanswered messages back at the head, in order, and drop those of QoS 0."""
        with self._lock:
            unanswered, self._unanswered = self._unanswered, OrderedDict()
            self._bytes -= sum(message.packet_bytes for message in unanswered.values())
            self._counters.dropped += self._drop(lambda message: message.qos == 0)
            for message in reversed(unanswered.values()):
                self._queue(message).put_back(message.flow, message, cost=message.packet_bytes)
                self._came(message)
            self.left_out = 0

    def _next(self) -> "FairQueue[str, Outgoing] | None":
        if len(self._urgent) and (self._in_a_row < MOST_IN_A_ROW or not len(self._others)):
            return self._urgent
        return self._others if len(self._others) else None

    def _fits(self, message: Outgoing) -> bool:
        return len(self) < self._max_messages and self._bytes + message.packet_bytes <= self._max_bytes

    def _would_fit(self, message: Outgoing) -> bool:
        """Return whether it would if all were dropped that may be."""
        left, bytes_left = len(self) - self._droppable, self._bytes - self._droppable_bytes
        return left < self._max_messages and bytes_left + message.packet_bytes <= self._max_bytes

    def _make_room(self, message: Outgoing) -> None:
        """Drop the newest message of the flow that holds most.

        Raises:
            NotConnected: That is no other, or there is none.
        """
        largest, most = self._holdings.largest()
        mine = self._holdings.of((message.flow, message.priority)) + self._share(message)
        if largest is None or not self._would_fit(message) or (mine > most and not message.indispensable):
            raise NotConnected(
                f"The broker takes nothing more for now: {len(self)} messages ({self._bytes} bytes) are "
                "waiting; try again when the link is connected."
            )
        flow, priority = largest
        self._drop_newest(self._urgent if priority else self._others, flow)
        self._counters.displaced += 1
        if self._clock() - self._said_at >= SAY_S:
            self._said_at = self._clock()
            _log.warning(
                "The queue to the broker is full; those of %s, which has most of it, make room (%d so far).",
                flow,
                self._counters.displaced,
            )

    def _drop_newest(self, queue: "FairQueue[str, Outgoing]", flow: str) -> None:
        kept = []
        while (newest := queue.drop_newest(flow)).indispensable:
            kept.append(newest)
        self._gone(newest)
        for message in reversed(kept):
            queue.put(flow, message, cost=message.packet_bytes)

    def _drop_expired(self) -> None:
        now = self._clock()
        if now - self._looked_at >= LOOK_S:
            self._looked_at = now
            self._counters.expired += self._drop(lambda message: message.expired(now))

    def _drop(self, unwanted: Callable[[Outgoing], bool]) -> int:
        dropped = 0
        waiting = [*self._urgent, *self._others]
        self._urgent, self._others = self._empty(), self._empty()
        for message in waiting:
            if unwanted(message):
                dropped += 1
                self._gone(message)
            else:
                self._queue(message).put(message.flow, message, cost=message.packet_bytes)
        return dropped

    def _append(self, message: Outgoing) -> None:
        self._queue(message).put(message.flow, message, cost=message.packet_bytes)
        self._came(message)

    def _queue(self, message: Outgoing) -> "FairQueue[str, Outgoing]":
        return self._urgent if message.priority else self._others

    def _empty(self) -> "FairQueue[str, Outgoing]":
        return FairQueue(bound=self._max_messages, quantum=TURN_BYTES)

    def _came(self, message: Outgoing) -> None:
        self._bytes += message.packet_bytes
        if not message.indispensable:
            self._droppable += 1
            self._droppable_bytes += message.packet_bytes
            self._holdings.add((message.flow, message.priority), self._share(message))

    def _gone(self, message: Outgoing) -> None:
        self._bytes -= message.packet_bytes
        if not message.indispensable:
            self._droppable -= 1
            self._droppable_bytes -= message.packet_bytes
            self._holdings.remove((message.flow, message.priority), self._share(message))

    def _share(self, message: Outgoing) -> int:
        """Return what a message takes of the queue: of its messages or of its bytes, whichever is more, in ppb."""
        return max(WHOLE // self._max_messages, WHOLE * message.packet_bytes // self._max_bytes)

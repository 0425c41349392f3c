"""Outbox: bounded queue of outgoing messages, in which flows take turns, and the sender that drains it.

A flow is all traffic of one client. Its backlog costs the other flows nothing: they take turns, and where the queue is
full, the flow that occupies most of it makes room.
"""

import logging
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Self

from paho.mqtt.properties import Properties

from fleet_common.limits import FairQueue
from fleet_common.mqtt.errors import NotConnected, PacketTooLarge
from fleet_common.mqtt.link import (
    PACKET_TOO_LARGE,
    CallbackGuard,
    LinkCounters,
    OutcomeHandler,
    PublishOutcome,
    check_topic,
)
from fleet_common.mqtt.packets import publish_packet
from fleet_common.mqtt.settings import LinkSettings

_log = logging.getLogger(__name__)


FLOW_LEVELS: Final = 4  # dssd/v1/<fleet>/<client>


@dataclass(frozen=True, slots=True, eq=False)
class Outgoing:
    """A message on its way to the broker.

    Attributes:
        alias: Whether the topic may be sent as an alias, which is chosen when it is sent.
        priority: Whether it goes before messages without priority.
        packet_bytes: Largest size of the packet: with the full topic.
        flow: First levels of the topic, which the topics of one client share.
    """

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    deadline: float | None = None
    content_type: str | None = None
    alias: bool = False
    on_outcome: OutcomeHandler | None = None
    priority: bool = False
    packet_bytes: int = field(init=False)
    flow: str = field(init=False)

    def __post_init__(self) -> None:
        check_topic(self.topic)
        # Known before it is sent: a broker closes the connection over a packet that is too large, and a client that
        # sends it again repeats that for ever.
        packet = publish_packet(
            self.topic,
            self.payload,
            identifier=self.qos,
            expiry_s=None if self.deadline is None else 0,
            content_type=self.content_type,
            alias=1 if self.alias else None,
        )
        object.__setattr__(self, "packet_bytes", len(packet))
        object.__setattr__(self, "flow", "/".join(self.topic.split("/", FLOW_LEVELS)[:FLOW_LEVELS]))

    @property
    def indispensable(self) -> bool:
        """Retained QoS 1 is not dropped to make room: the last message counts."""
        return self.retain and self.qos > 0

    def expired(self, now: float) -> bool:
        return self.deadline is not None and now >= self.deadline

    def expiry_s(self, now: float) -> int | None:
        """Return the whole seconds until the message expires, at least 1."""
        return None if self.deadline is None else max(1, math.ceil(self.deadline - now))

    def check(self, *, limit: int) -> None:
        """Raise ValueError for an invalid QoS, PacketTooLarge for a packet of more than `limit` bytes."""
        if self.qos not in {0, 1}:
            raise ValueError(f"QoS {self.qos} is not supported: use 0 or 1.")
        if self.packet_bytes > limit:
            raise PacketTooLarge(size=self.packet_bytes, limit=limit)


DEFAULT_RECEIVE_MAXIMUM = 65_535
MIN_PACKET_BYTES = 4096
"""Smallest useful packet limit of a broker: enough for states, verdicts and short prompts."""


@dataclass(frozen=True, slots=True)
class BrokerLimits:
    """Limits and features that the broker announced in its CONNACK (MQTT 5, 3.2.2.3).

    Attributes:
        max_packet_bytes: Largest packet that it accepts and we send.
        receive_maximum: Most unacknowledged QoS 1 messages.
        alias_maximum: Number of topic aliases; 0 forbids them.
        missing: Required feature that it lacks, as the middle of a sentence; empty for none.
    """

    max_packet_bytes: int
    receive_maximum: int = DEFAULT_RECEIVE_MAXIMUM
    alias_maximum: int = 0
    missing: str = ""

    @classmethod
    def of(cls, properties: Properties | None, *, packet_bytes: int) -> Self:
        """Read the properties of a CONNACK; missing ones have the protocol's defaults.

        The broker's packet limit can only lower our own, `packet_bytes`.
        """
        return cls(
            max_packet_bytes=min(packet_bytes, getattr(properties, "MaximumPacketSize", packet_bytes)),
            receive_maximum=getattr(properties, "ReceiveMaximum", DEFAULT_RECEIVE_MAXIMUM),
            alias_maximum=getattr(properties, "TopicAliasMaximum", 0),
            missing=_missing(properties),
        )


# Properties that are 0 if the broker lacks a required feature; their default is 1 or more.
_NEEDED: Final = {
    "SharedSubscriptionAvailable": "does not offer shared subscriptions",
    "WildcardSubscriptionAvailable": "does not offer wildcard subscriptions",
    "RetainAvailable": "does not retain messages",
    "MaximumQoS": "does not offer QoS 1",
}


def _missing(properties: Properties | None) -> str:
    for name, lack in _NEEDED.items():
        if not getattr(properties, name, 1):
            return lack
    limit = getattr(properties, "MaximumPacketSize", MIN_PACKET_BYTES)
    if limit < MIN_PACKET_BYTES:
        return f"takes packets of at most {limit} bytes, not the {MIN_PACKET_BYTES} bytes"
    return ""


TURN_BYTES: Final = 1024  # that a flow may send per turn
MAX_IN_A_ROW: Final = 8  # priority messages while others wait
LOOK_S: Final = 0.25  # between two searches for expired messages, which visit all
WHOLE: Final = 1_000_000_000
SAY_S: Final = 60.0  # between two warnings


class Outbox:
    """Waiting and unacknowledged messages under one bound; those of a flow and priority stay in order.

    Messages that were not acknowledged when the connection was lost go back to the head of the queue. They are stored
    here in full and never by the MQTT library, whose repeats would contain an alias that the next connection does not
    know.
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
        self._holdings = Counter[tuple[str, bool]]()  # shares of droppable messages, by flow and priority
        self._droppable = 0
        self._droppable_bytes = 0
        self._unanswered: OrderedDict[int, Outgoing] = OrderedDict()  # by packet identifier, in the order sent
        self._bytes = 0
        self._looked_at = -LOOK_S
        self._said_at = -SAY_S
        self.left_out = 0  # answers that the broker has omitted on this connection

    def __len__(self) -> int:
        return len(self._urgent) + len(self._others) + len(self._unanswered)

    def put(self, message: Outgoing) -> None:
        """Append a message; flows that occupy more of a full queue make room, else raise NotConnected."""
        with self._lock:
            if not self._fits(message):
                self._drop_expired()
            while not self._fits(message):
                self._make_room(message)
            self._append(message)

    def next_message(self, *, window: int) -> Outgoing | None:
        """Remove and return the next message; None if there is none or `window` are unanswered."""
        with self._lock:
            while (queue := self._next()) is not None:
                head = queue.peek()
                if head is None or (head.qos > 0 and len(self._unanswered) >= window):
                    return None
                queue.pop()
                self._gone(head)
                self._in_a_row = self._in_a_row + 1 if queue is self._urgent and len(self._others) else 0
                if not head.expired(self._clock()):
                    return head
                self._counters.expired += 1
            return None

    def await_answer(self, identifier: int, message: Outgoing) -> None:
        with self._lock:
            self._unanswered[identifier] = message
            self._bytes += message.packet_bytes

    @property
    def awaiting_answers(self) -> int:
        return len(self._unanswered)

    def pop_answered(self, identifier: int) -> Outgoing | None:
        """Return and forget the message that the broker answers; None for an unknown identifier.

        Earlier messages without an answer will never get one: a broker answers in the order of arrival (MQTT 5, 4.6),
        and some drop answers when a client's queue is full. It has taken those messages, so they are forgotten as well,
        and counted.
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
        if len(self._urgent) and (self._in_a_row < MAX_IN_A_ROW or not len(self._others)):
            return self._urgent
        return self._others if len(self._others) else None

    def _fits(self, message: Outgoing) -> bool:
        return len(self) < self._max_messages and self._bytes + message.packet_bytes <= self._max_bytes

    def _would_fit(self, message: Outgoing) -> bool:
        """There is room once everything droppable is dropped."""
        left, bytes_left = len(self) - self._droppable, self._bytes - self._droppable_bytes
        return left < self._max_messages and bytes_left + message.packet_bytes <= self._max_bytes

    def _make_room(self, message: Outgoing) -> None:
        """Drop the newest message of the flow that occupies most, or raise NotConnected."""
        largest, most = max(self._holdings.items(), key=lambda held: held[1], default=(None, 0))
        mine = self._holdings[message.flow, message.priority] + self._share(message)
        if largest is None or not self._would_fit(message) or (mine > most and not message.indispensable):
            raise NotConnected(
                f"The queue to the broker is full: {len(self)} messages ({self._bytes} bytes) are "
                "waiting; try again when the link is connected."
            )
        flow, priority = largest
        self._drop_newest(self._urgent if priority else self._others, flow)
        self._counters.displaced += 1
        if self._clock() - self._said_at >= SAY_S:
            self._said_at = self._clock()
            _log.warning(
                "The queue to the broker is full; messages of %s, which occupies most of it, are dropped (%d so far).",
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
            self._holdings[message.flow, message.priority] += self._share(message)

    def _gone(self, message: Outgoing) -> None:
        self._bytes -= message.packet_bytes
        if not message.indispensable:
            self._droppable -= 1
            self._droppable_bytes -= message.packet_bytes
            holder = message.flow, message.priority
            self._holdings[holder] -= self._share(message)
            if not self._holdings[holder]:
                del self._holdings[holder]

    def _share(self, message: Outgoing) -> int:
        """Return the share of the queue that a message takes, of its messages or bytes, whichever is more, in ppb."""
        return max(WHOLE // self._max_messages, WHOLE * message.packet_bytes // self._max_bytes)


class Sender:
    """Sending half of a link, across its connections. Only `outbox.put` may be called from any thread."""

    def __init__(self, settings: LinkSettings, *, guard: CallbackGuard, clock: Callable[[], float]) -> None:
        self._guard = guard
        self._clock = clock
        self._answered = True  # since silence was last measured
        self._silent_since = 0.0
        self.outbox = Outbox(
            max_messages=settings.queue_messages, max_bytes=settings.queue_bytes, clock=clock, counters=guard.counters
        )

    @property
    def idle(self) -> bool:
        return len(self.outbox) == 0

    def unanswered_s(self, *, delivered: bool) -> float:
        """Return for how many seconds the broker has answered nothing although all messages were `delivered` to it.

        Delivered means that all written bytes have reached the broker's machine: a slow network does not count.
        """
        now = self._clock()
        if self._answered or not delivered or not self.outbox.awaiting_answers:
            self._answered, self._silent_since = False, now
        return now - self._silent_since

    def drain(
        self, send: Callable[[Outgoing], int], announced: BrokerLimits, *, room: Callable[[], bool] = lambda: True
    ) -> None:
        """Send what the broker's limits allow now; `room` says before each message whether the network accepts more."""
        while room() and (message := self.outbox.next_message(window=announced.receive_maximum)) is not None:
            if message.packet_bytes > announced.max_packet_bytes:
                # Queued for a broker that accepted larger packets.
                self._guard.counters.oversized += 1
                _log.error("A queued message to %s is too large for this broker and is dropped.", message.topic)
                self._report(message, PACKET_TOO_LARGE)
                continue
            identifier = send(message)
            self._guard.counters.sent += 1
            if message.qos > 0:
                self.outbox.await_answer(identifier, message)

    def on_answer(self, identifier: int, reason: int) -> None:
        self._answered = True
        message = self.outbox.pop_answered(identifier)
        if message is not None:
            self._report(message, reason)

    def connection_lost(self) -> None:
        """Keep unanswered messages for the next connection."""
        self._answered = True
        self.outbox.connection_lost()

    def _report(self, message: Outgoing, reason: int) -> None:
        if message.on_outcome is not None:
            self._guard.call(message.on_outcome, PublishOutcome(message.topic, reason))

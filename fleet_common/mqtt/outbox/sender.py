"""Sender: the outgoing half of a link, across its connections."""

import logging
from collections.abc import Callable

from fleet_common.mqtt.counters import Guard
from fleet_common.mqtt.link import PACKET_TOO_LARGE, Outcome
from fleet_common.mqtt.outbox.announced import Announced
from fleet_common.mqtt.outbox.outbox import Outbox
from fleet_common.mqtt.outbox.outgoing import Outgoing
from fleet_common.mqtt.settings import LinkSettings

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
            delivered: Whether all that was written has reached the broker's machine, and its answers would be here: a
                slow network is no silence.
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

    def drain(
        self, send: Callable[[Outgoing], int], announced: Announced, *, room: Callable[[], bool] = lambda: True
    ) -> None:
        """Send all that the broker lets us send now.

        Args:
            send: Writes a PUBLISH and returns its packet identifier.
            announced: The broker's limits.
            room: Whether the network takes more; asked before each message.
        """
        while room() and (message := self._outbox.take(window=announced.receive_maximum)) is not None:
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

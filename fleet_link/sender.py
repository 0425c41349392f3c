"""What the link's thread does with the outbox: send what may be sent, report what the broker answered."""

import logging
from collections.abc import Callable

from fleet_link.announced import Announced
from fleet_link.connection import Connection
from fleet_link.counters import Guard
from fleet_link.link import PACKET_TOO_LARGE, Outcome
from fleet_link.outbox import Outbox
from fleet_link.outgoing import Outgoing
from fleet_link.settings import LinkSettings

__all__ = ["Sender"]

_log = logging.getLogger(__name__)


class Sender:
    """The outgoing half of a link, across its connections. Only `put` may be called from any thread."""

    def __init__(self, settings: LinkSettings, *, guard: Guard, clock: Callable[[], float]) -> None:
        self._guard = guard
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

    def put(self, message: Outgoing) -> None:
        """Append a message.

        Raises:
            NotConnected: There is no room.
        """
        self._outbox.put(message)

    def drain(self, connection: Connection, announced: Announced) -> None:
        """Send all that the broker lets us send now."""
        while (message := self._outbox.take(window=announced.receive_maximum)) is not None:
            if message.packet_bytes > announced.max_packet_bytes:
                # Queued for a broker that took larger ones.
                self._guard.counters.oversized += 1
                _log.error("A queued message to %s is too large for this broker and is dropped.", message.topic)
                self._report(message, PACKET_TOO_LARGE)
                continue
            identifier = connection.send(message)
            self._guard.counters.sent += 1
            if message.qos > 0:
                self._outbox.await_answer(identifier, message)

    def answered(self, identifier: int, reason: int) -> None:
        """Take the broker's answer to the publish with this packet identifier."""
        message = self._outbox.answered(identifier)
        if message is not None:
            self._report(message, reason)

    def connection_lost(self) -> None:
        """Keep what was not answered for the next connection."""
        self._outbox.connection_lost()

    def _report(self, message: Outgoing, reason: int) -> None:
        if message.on_outcome is not None:
            self._guard.call(message.on_outcome, Outcome(message.topic, reason))

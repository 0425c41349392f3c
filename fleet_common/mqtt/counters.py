"""Counters of a link, and the guard that keeps its thread alive."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

A = TypeVar("A")

Accepts = Callable[[bytes, int, bool], bool]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class LinkCounters:
    """A link's counters since it was made.

    Attributes:
        connects: Connections made.
        losses: Connections lost, goodbyes not counted.
        takeovers: Of these, those that ended because another client had connected with the same client id.
        screened: Messages dropped unread, because the link's screen refused them.
        received: Messages dispatched to handlers.
        sent: Messages handed to the network, repeats counted in.
        expired: Messages dropped here because their expiry had passed.
        dropped: QoS 0 messages dropped while disconnected.
        displaced: Queued messages dropped to make room for a flow that had less waiting.
        oversized: Queued messages dropped because a new connection's packet limit was smaller.
        unanswered: QoS 1 messages that the broker has taken without an answer: it answered later ones.
        stalls: Connections ended because the broker answered nothing any more.
        handler_errors: Exceptions of handlers, listeners, screens and outcome callbacks.
        renewals: Connections ended in favour of one with a renewed certificate; they are no losses.
        restarts: Times that the network loop failed unexpectedly and was begun anew.
    """

    connects: int = 0
    losses: int = 0
    takeovers: int = 0
    screened: int = 0
    received: int = 0
    sent: int = 0
    expired: int = 0
    dropped: int = 0
    displaced: int = 0
    oversized: int = 0
    unanswered: int = 0
    stalls: int = 0
    handler_errors: int = 0
    renewals: int = 0
    restarts: int = 0


@dataclass(slots=True)
class Guard:
    """Calls what the application gave us, and survives it."""

    counters: LinkCounters = field(default_factory=LinkCounters)
    _screen_failed: bool = False

    def call(self, function: Callable[[A], None], argument: A) -> None:
        """Call `function(argument)`; an exception is logged and counted."""
        try:
            function(argument)
        except BaseException as error:  # noqa: BLE001 - not even its SystemExit may end the link's thread
            self.counters.handler_errors += 1
            _log.error("A handler of the link failed and is ignored.", exc_info=error)

    def ask(self, accepts: Accepts, topic: bytes, packet_bytes: int, *, retained: bool) -> bool:
        """Return `accepts(topic, packet_bytes, retained)`; an exception is counted, logged once, and means yes."""
        try:
            return accepts(topic, packet_bytes, retained)
        except BaseException as error:  # noqa: BLE001 - likewise
            self.counters.handler_errors += 1
            if not self._screen_failed:
                self._screen_failed = True
                _log.error("The link's screen fails and lets messages pass; this is said once.", exc_info=error)
            return True

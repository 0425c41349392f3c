"""Handover to a connection with a renewed certificate, without loss."""

import logging
from collections.abc import Callable

from fleet_common.mqtt.connection.connection import Connection
from fleet_common.mqtt.connection.mqtt_client import HANDOVER_S
from fleet_common.mqtt.counters import LinkCounters
from fleet_common.mqtt.outbox.announced import Announced
from fleet_common.mqtt.tls.context import LinkContext
from fleet_common.mqtt.tls.credentials import Credentials

_log = logging.getLogger(__name__)


class Handover:
    """Belongs to the link's thread.

    Args:
        credentials: What connections are made with.
        counters: Of the link.
        clock: Monotonic seconds.

    Attributes:
        under_way: Whether the last connection was ended in favour of the next, which is then made at once.
    """

    def __init__(self, credentials: Credentials, *, counters: LinkCounters, clock: Callable[[], float]) -> None:
        self._credentials = credentials
        self._counters = counters
        self._clock = clock
        self._resume_until: float | None = None  # the broker keeps our session until then
        self.under_way = False

    @property
    def due(self) -> bool:
        return self._credentials.renewed()

    def context(self) -> LinkContext | None:
        """Return what the next connection is made with, None for plain TCP.

        Raises:
            ConnectFailed: As `Credentials.take`.
        """
        self.under_way = False
        return self._credentials.take()

    def failed(self, why: str) -> None:
        """Note that no connection came about."""
        self._credentials.refused(why)

    def begin(self, connection: Connection) -> None:
        """End a connection that works; its session waits at the broker."""
        _log.info("The certificate was renewed; connecting anew.")
        self._counters.renewals += 1
        self.under_way = True
        self._resume_until = self._clock() + HANDOVER_S
        connection.goodbye(hand_over=True)

    def open(self, connection: Connection) -> Announced:
        """Connect, and go on with the session that waits, if one does.

        Raises:
            ConnectFailed: As `Connection.open`.
        """
        resume = self._resume_until is not None and self._clock() < self._resume_until
        announced = connection.open(resume=resume)
        self._credentials.accepted()
        self._resume_until = None
        return announced

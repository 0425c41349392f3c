"""Publishing of alerts over MQTT, on the topic `_alert`, which monitors read."""

import threading
from collections.abc import Callable
from typing import Final

from fleet_admin.alerts.errors import DeliveryFailed
from fleet_admin.alerts.settings import AlertSettings
from fleet_link.errors import LinkError
from fleet_link.link import Link, publish_confirmed
from fleet_link.paho_link import PahoLink
from fleet_link.settings import LinkSettings
from schemas.control import Alert, encode_json
from schemas.topics import Topic, build

__all__ = ["BrokerChannel"]

_CONNECT_S: Final = 10.0
_CONFIRM_S: Final = 10.0


class BrokerChannel:
    """Publishes alerts in the role monitor; connects with the first.

    Args:
        settings: Which fleet, broker and name.
        make_link: Makes the link to the broker.
    """

    def __init__(self, settings: AlertSettings, *, make_link: Callable[[LinkSettings], Link] = PahoLink) -> None:
        assert settings.fleet is not None
        self._topic = build(Topic.ALERT, fleet=settings.fleet)
        self._link = make_link(settings.broker.link(settings.name, will=None))
        self._started = False
        self._using = threading.Lock()
        self.name = f"the broker at {settings.broker.host}:{settings.broker.port}"

    def send(self, alert: Alert) -> None:
        """Publish an alert, and wait until the broker has it.

        Raises:
            DeliveryFailed: It has not.
        """
        with self._using:
            try:
                if not self._started:
                    self._link.start(timeout_s=_CONNECT_S)
                    self._started = True
                publish_confirmed(
                    self._link, self._topic, encode_json(alert), timeout_s=_CONFIRM_S, content_type="application/json"
                )
            except LinkError as error:
                raise DeliveryFailed(str(error)) from error

    def close(self) -> None:
        """Say goodbye."""
        with self._using:
            self._link.stop()

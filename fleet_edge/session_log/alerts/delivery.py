"""Delivery of alerts: by webhook, and over MQTT on the topic `_alert`, which monitors read; devices in Home Assistant.

Alerts of one rule that wait together are one message of the webhook, and one each over MQTT.

A webhook is signed with an HMAC-SHA256 of `<time>.<body>` in hexadecimal. The time, in Unix seconds, has a separate
header, so that a receiver can reject an old message. Redirects are not followed: an alert and its signature go to the
configured URL or nowhere. A slow or endless answer is abandoned.
"""

import contextlib
import hashlib
import hmac
import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol
from urllib.parse import urlunsplit

from fleet_common.mqtt.errors import LinkError
from fleet_common.mqtt.link import Link, publish_confirmed
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import LinkSettings
from fleet_edge.session_log.alerts.rules import AlertGroup
from fleet_edge.session_log.alerts.settings import AlertSettings, check_url
from fleet_edge.session_log.views import EDGES_ALONE, AlertView, DeviceView, MachineState
from schemas.control import Alert, AlertState, encode_json
from schemas.errors import FleetError
from schemas.names import VERSION
from schemas.topics import HOME_ASSISTANT, Topic, build

_TIMEOUT_S: Final = 5.0
_LONGEST_S: Final = 10.0
_MAX_ANSWER_BYTES: Final = 4096
_ACCEPTED: Final = range(200, 300)


class DeliveryFailed(FleetError):  # noqa: N818 - reads as what it says
    """An alert could not be delivered; another attempt may succeed."""


class AlertChannel(Protocol):
    """A destination of alerts."""

    @property
    def name(self) -> str: ...

    def send(self, alerts: Sequence[AlertView]) -> None:
        """Deliver alerts of one rule and state; may block for seconds.

        Raises `DeliveryFailed` if another attempt may succeed.
        """


def message_of(alert: AlertView, *, fleet: str | None) -> Alert:
    return Alert(
        id=alert.id,
        fleet=fleet,
        rule=alert.rule,
        subject=alert.subject,
        device=alert.device,
        severity=alert.severity,
        state=AlertState.OPEN if alert.open else AlertState.CLEARED,
        sentence=alert.sentence,
        value=alert.value,
        threshold=alert.threshold,
        since=alert.since_at,
        at=alert.cleared_at or alert.last_at,
    )


class Webhook:
    """A URL that alerts are posted to, at most `longest_s` each; raises ValueError if `check_url` refuses it."""

    def __init__(
        self,
        url: str,
        *,
        fleet: str | None = None,
        secret: bytes | None = None,
        clock: Callable[[], float] = time.time,
        longest_s: float = _LONGEST_S,
    ) -> None:
        self._parts = check_url(url)
        self._fleet = fleet
        self._secret = secret
        self._clock = clock
        self._longest_s = longest_s

    @property
    def name(self) -> str:
        """For the log; without the path, which may be a secret."""
        return f"the webhook at {self._parts.hostname}"

    def send(self, alerts: Sequence[AlertView]) -> None:
        """Post alerts of one rule and state; raises `DeliveryFailed` if the server does not accept them."""
        messages = [message_of(each, fleet=self._fleet) for each in alerts]
        group = AlertGroup(alerts[0].rule, alerts)
        content = {
            "rule": group.rule,
            "state": messages[0].state,
            "severity": group.severity,
            "sentence": group.sentence,
            "alerts": [json.loads(encode_json(each)) for each in messages],
        }
        body = json.dumps(content).encode()
        connection = self._connect()
        ending = threading.Timer(self._longest_s, _cut, [connection])
        ending.daemon = True
        ending.start()
        try:
            target = urlunsplit(("", "", self._parts.path or "/", self._parts.query, ""))
            connection.request("POST", target, body=body, headers=self._headers(body, alerts))
            answer = connection.getresponse()
            answer.read(_MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            why = str(error) or type(error).__name__
            raise DeliveryFailed(f"{self.name.capitalize()} cannot be reached: {why}.") from error
        finally:
            ending.cancel()
            connection.close()
        if answer.status not in _ACCEPTED:
            redirected = ", and redirects are not followed" if answer.status in range(300, 400) else ""
            raise DeliveryFailed(f"{self.name.capitalize()} answers with {answer.status}{redirected}.")

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
        return http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S)

    def _headers(self, body: bytes, alerts: Sequence[AlertView]) -> dict[str, str]:
        at = str(int(self._clock()))
        names = " ".join(f"{each.id}-{each.state}" for each in alerts)
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "dssd-fleet",
            "X-Fleet-Delivery": hashlib.sha256(names.encode()).hexdigest()[:16],
            "X-Fleet-Timestamp": at,
        }
        if self._secret is not None:
            signature = hmac.new(self._secret, at.encode() + b"." + body, hashlib.sha256).hexdigest()
            headers["X-Fleet-Signature"] = f"sha256={signature}"
        return headers


def _cut(connection: http.client.HTTPConnection) -> None:
    with contextlib.suppress(OSError, AttributeError):  # it has ended meanwhile, or not begun
        connection.sock.shutdown(socket.SHUT_RDWR)


_CONNECT_S: Final = 5.0
_CONFIRM_S: Final = 5.0


class BrokerChannel:
    """Publishes as a monitor; connects with the first message."""

    def __init__(self, settings: AlertSettings, *, make_link: Callable[[LinkSettings], Link] = PahoLink) -> None:
        assert settings.fleet is not None
        self._fleet = settings.fleet
        self._topic = build(Topic.ALERT, fleet=settings.fleet)
        self._link = make_link(settings.broker.link(settings.fleet, settings.name, will=None))
        self._using = threading.Lock()
        self.name = f"the broker at {settings.broker.host}:{settings.broker.port}"

    def send(self, alerts: Sequence[AlertView]) -> None:
        """Publish alerts and wait for the broker's acknowledgements; otherwise raises `DeliveryFailed`."""
        with self._using:
            try:
                self._link.start(timeout_s=_CONNECT_S)
                for each in alerts:
                    payload = encode_json(message_of(each, fleet=self._fleet))
                    publish_confirmed(
                        self._link, self._topic, payload, timeout_s=_CONFIRM_S, content_type="application/json"
                    )
            except LinkError as error:
                raise DeliveryFailed(str(error)) from error

    def retain(self, topic: str, payload: bytes) -> None:
        """Publish a retained message, without waiting for the acknowledgement; raises `LinkError`."""
        with self._using:
            self._link.start(timeout_s=_CONNECT_S)
            self._link.publish(topic, payload, retain=True, content_type="application/json")

    def on_connection(self, listener: Callable[[bool], None]) -> None:
        self._link.on_connection(listener)

    def close(self) -> None:
        with self._using:
            self._link.stop()


_log = logging.getLogger(__name__)

_NAME: Final = "dssd-fleet"
_PERCENT: Final = 100

_STATES: Final = [state.value for state in MachineState if state not in EDGES_ALONE]
_SENSORS: Final[dict[str, dict[str, Any]]] = {
    "state": {"name": "State", "device_class": "enum", "options": _STATES},
    "acceptance": {"name": "Acceptance, 24 hours", "unit_of_measurement": "%", "state_class": "measurement"},
    "tokens_today": {"name": "Tokens today", "unit_of_measurement": "tokens", "state_class": "total_increasing"},
}

Publish = Callable[[str, bytes], None]
"""Publishes a retained message without blocking; raises `LinkError`."""


class HomeAssistant:
    """Publishes what has changed; `forget` makes it publish everything again, to a broker that may have lost it."""

    def __init__(self, fleet: str, publish: Publish) -> None:
        self._fleet = fleet
        self._publish = publish
        self._published: dict[str, bytes] = {}

    def forget(self) -> None:
        self._published = {}

    def show(self, devices: Sequence[DeviceView]) -> None:
        """Present these devices, and remove those that are retired."""
        for device in devices:
            topic = f"{HOME_ASSISTANT}/device/{_identifier(self._fleet, device.device)}"
            gone = device.state is MachineState.RETIRED
            for level, content in (("config", self._config(device, topic)), ("state", _state(device))):
                payload = b"" if gone else json.dumps(content, separators=(",", ":")).encode()
                if payload == self._published.get(f"{topic}/{level}"):
                    continue
                try:
                    self._publish(f"{topic}/{level}", payload)
                except LinkError as error:
                    _log.warning("Home Assistant does not see the devices: %s", error)
                    return
                self._published[f"{topic}/{level}"] = payload

    def _config(self, device: DeviceView, topic: str) -> dict[str, Any]:
        identifier = topic.rpartition("/")[2]
        return {
            "device": {
                "identifiers": [identifier],
                "name": device.device,
                "manufacturer": _NAME,
                "model": device.draft_model,
                "sw_version": device.software,
            },
            "origin": {"name": _NAME, "sw_version": VERSION},
            "state_topic": f"{topic}/state",
            "components": {
                key: {
                    "platform": "sensor",
                    "unique_id": f"{identifier}_{key}",
                    "value_template": f"{{{{ value_json.{key} }}}}",
                    **sensor,
                }
                for key, sensor in _SENSORS.items()
            },
        }


def _state(device: DeviceView) -> dict[str, Any]:
    acceptance = device.acceptance_24h
    return {
        "state": device.state.value,
        "acceptance": None if acceptance is None else round(_PERCENT * acceptance, 1),
        "tokens_today": device.tokens_today,
    }


def _identifier(fleet: str, device: str) -> str:
    """Return a name without dots, which Home Assistant does not allow, different for each device."""
    fleet, device = (name.replace("_", "__").replace(".", "_d") for name in (fleet, device))
    return f"{fleet}_-{device}"

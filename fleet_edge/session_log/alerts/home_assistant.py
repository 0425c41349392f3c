"""Home Assistant: present each device by MQTT discovery, with its state, acceptance and tokens of today."""

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

from fleet_common.mqtt.errors import LinkError
from fleet_edge.session_log.views import EDGES_ALONE, DeviceView, MachineState
from schemas.names import VERSION
from schemas.topics import HOME_ASSISTANT

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

"""Running device: what the service of this name says of itself on its local API, if it runs.

A broker keeps one connection for each name, so that whoever checks a device that runs must not connect in its place.
"""

import http.client
from typing import Final

from pydantic import BaseModel, ValidationError

from fleet_device.errors import ConfigurationError
from schemas.control import Presence

_HOST: Final = "127.0.0.1"
_WAIT_S: Final = 2.0
_MOST_BYTES: Final = 1 << 20


class _Drafter(BaseModel):
    name: str
    quantization: str
    context: int
    vocabulary: str


class _Broker(BaseModel):
    connected: bool


class _Edge(BaseModel):
    edge: str
    presence: str
    target: str
    vocabulary: str | None = None


class RunningDevice(BaseModel):
    """What `GET /healthz` says, as far as checks read it.

    Attributes:
        device: Its name.
        reason: Why no text can be written now, in a sentence; None if one can.
        drafter: The draft model.
        broker: Whether it is connected.
        edges: Those that it has heard of.
    """

    device: str
    reason: str | None
    drafter: _Drafter
    broker: _Broker
    edges: tuple[_Edge, ...]

    @property
    def online(self) -> tuple[_Edge, ...]:
        """The edges that take new texts."""
        return tuple(each for each in self.edges if each.presence == Presence.ONLINE)


def running_device(port: int, name: str) -> RunningDevice | None:
    """Ask whether a device of this name runs on this machine.

    Args:
        port: Of the local API; 0 is none.
        name: The device's.

    Returns:
        None if nothing answers at the port, or something else does.
    """
    if not port:
        return None
    connection = http.client.HTTPConnection(_HOST, port, timeout=_WAIT_S)
    try:
        connection.request("GET", "/healthz")
        found = RunningDevice.model_validate_json(connection.getresponse().read(_MOST_BYTES))
    except (OSError, ValidationError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return found if found.device == name else None


def refuse_beside_running(port: int, name: str) -> None:
    """Refuse to take the place of a device that runs.

    Args:
        port: Of its local API.
        name: The device's.

    Raises:
        ConfigurationError: It runs.
    """
    if running_device(port, name) is not None:
        raise ConfigurationError(
            f"Device {name} runs already, and serves applications at {_HOST}:{port}: the broker keeps one connection "
            "for each name, so stop it first, or give this one a name of its own with --device."
        )

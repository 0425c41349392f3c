"""States of a device as an administrator sees them, in one word each."""

from fleet_edge.store.views import DeviceView
from schemas.control import Presence

__all__ = ["device_state"]


def device_state(device: DeviceView, *, fenced: bool) -> str:
    """Return a device's state: `fenced`, `silent`, `online`, `draining`, `offline`, or `unknown`."""
    if fenced:
        return "fenced"
    if device.silent_since is not None and device.presence != Presence.OFFLINE:
        return "silent"
    return device.presence or "unknown"

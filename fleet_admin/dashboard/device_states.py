"""States of a device as an administrator sees them, in one word each."""

from datetime import datetime, timedelta
from typing import Final

from fleet_edge.store.views import DeviceView
from schemas.control import Presence

__all__ = ["STATES", "days_left", "device_state", "last_sign", "state_since"]

STATES: Final = ("online", "late", "draining", "silent", "fenced", "offline", "retired", "unknown")

_LATE: Final = timedelta(minutes=5)


def device_state(device: DeviceView, *, fenced: bool, now: datetime, retired: bool = False) -> str:
    """Return a device's state.

    Returns:
        `fenced`: shut out; `retired`: out of service; `silent`: it says that it is online, and nothing has come for so
        long that a job has marked it; `late`: nothing for some minutes; `online`, `draining` or `offline`: as it says;
        `unknown`: it never said.
    """
    if fenced:
        return "fenced"
    if retired:
        return "retired"
    if device.presence in {None, Presence.OFFLINE}:
        return device.presence or "unknown"
    if device.silent_since is not None:
        return "silent"
    return "late" if now - last_sign(device) > _LATE else str(device.presence)


def last_sign(device: DeviceView) -> datetime:
    """Return when anything last came from a device."""
    times = (device.seen_at, device.last_verdict_at, device.telemetry_at)
    return max(each for each in times if each is not None)


def state_since(device: DeviceView, state: str) -> datetime | None:
    """Return since when a device has its state, if that is known."""
    if state == "silent":
        return device.silent_since
    return last_sign(device) if state == "late" else device.presence_since


def days_left(until: datetime | None, *, now: datetime) -> float | None:
    """Return the days until a certificate ends; below 0 if it has."""
    return None if until is None else (until - now) / timedelta(days=1)

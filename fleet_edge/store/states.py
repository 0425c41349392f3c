"""States of devices and edges: one definition for the command line, the dashboard, alerts, metrics and jobs.

docs/administration.md describes each state.
"""

from datetime import timedelta
from enum import StrEnum
from typing import Final

from schemas.control import Presence

LATE_AFTER: Final = timedelta(minutes=5)
SILENT_AFTER: Final = timedelta(minutes=15)
"""A device that writes nothing sends nothing, so that an idle device too is late and then silent."""

EDGE_SILENT_AFTER: Final = timedelta(minutes=1)
"""An edge writes its load every ten seconds."""


class MachineState(StrEnum):
    """State of a device or an edge, in the order in which an administrator wants to see them."""

    ONLINE = "online"
    LATE = "late"
    DRAINING = "draining"
    SILENT = "silent"
    FENCED = "fenced"
    OFFLINE = "offline"
    RETIRED = "retired"
    UNKNOWN = "unknown"


def device_state(
    presence: str | None, *, since_last_sign: timedelta, fenced: bool = False, retired: bool = False
) -> MachineState:
    """Return a device's state.

    Args:
        presence: Its own at the broker; None if it has never published one.
        since_last_sign: Time since it last published its presence or telemetry, or an edge served it.
        fenced: Whether edges drop what it sends.
        retired: Whether an administrator has taken it out of service.
    """
    if fenced:
        return MachineState.FENCED
    if retired:
        return MachineState.RETIRED
    if gone := _gone(presence):
        return gone
    if since_last_sign > SILENT_AFTER:
        return MachineState.SILENT
    return MachineState.LATE if since_last_sign > LATE_AFTER else _connected(presence)


def edge_state(presence: str | None, *, since_load: timedelta | None) -> MachineState:
    """Return an edge's state.

    Args:
        presence: Its own at the broker; None if it has never published one.
        since_load: Time since it last wrote its load to the session log; None if it never has.
    """
    quiet = since_load is not None and since_load > EDGE_SILENT_AFTER
    return _gone(presence) or (MachineState.SILENT if quiet else _connected(presence))


def _gone(presence: str | None) -> MachineState | None:
    if presence is None:
        return MachineState.UNKNOWN
    return MachineState.OFFLINE if presence == Presence.OFFLINE else None


def _connected(presence: str | None) -> MachineState:
    # A presence that this version does not know takes no new sessions.
    return MachineState.ONLINE if presence == Presence.ONLINE else MachineState.DRAINING

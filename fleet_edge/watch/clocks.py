"""Clocks of devices, as far as their states betray them: a device says in its own time since when it is there.

A clock that is ahead says a time that has not come. One that was set back says, of a later start, an earlier time than
of the one before. What is slow by less cannot be told from a state that was long on its way.
"""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from schemas.control import DeviceState, Presence

_TOLERATED: Final = timedelta(seconds=30)
"""More than a state is on its way, and less than a certificate or a signature minds."""

_MOST: Final = 65_536
"""Whoever may publish states must not fill the memory."""


@dataclass(slots=True)
class ClockWatch:
    """Remembers since when each device is there, by its own clock."""

    _since: dict[str, datetime] = field(default_factory=dict)

    def note(self, device: str, state: DeviceState, *, now: datetime) -> str:
        """Take a device's state; return what is wrong with its clock, in a sentence, empty if nothing is.

        Args:
            device: Whose.
            state: As it came; a last will says the same of the time before, and is passed over.
            now: The edge's wall clock (aware).
        """
        if state.presence is Presence.OFFLINE:
            return ""
        since = state.since
        before = self._since.get(device)
        if before is not None or len(self._since) < _MOST:
            self._since[device] = since
        if since - now > _TOLERATED:
            return f"The clock of {device} is ahead by {_span(since - now)}: set it (timedatectl set-ntp true)."
        if before is not None and before - since > _TOLERATED:
            return f"The clock of {device} has gone back by {_span(before - since)} or more: see that it is kept right."
        return ""


def _span(time: timedelta) -> str:
    seconds = time.total_seconds()
    for name, length in (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} s"

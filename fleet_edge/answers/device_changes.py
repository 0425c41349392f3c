"""Device changes: what is new in a device's state, beside what was last heard of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from schemas.control import DeviceState, Presence

_SENTENCES: Final = {
    Presence.ONLINE: "The device has connected.",
    Presence.DRAINING: "The device ends the texts that it has and takes no others.",
    Presence.OFFLINE: "The device has disconnected, or the broker has lost it.",
}


@dataclass(frozen=True, slots=True)
class DeviceChange:
    """What a state has told.

    Attributes:
        events: Codes and sentences of what is new.
        since: Since when the device has its presence; None if that is not known.
    """

    events: tuple[tuple[str, str], ...]
    since: datetime | None


@dataclass(frozen=True, slots=True)
class _Known:
    presence: Presence
    software: str
    model: str


@dataclass(slots=True)
class DeviceChanges:
    """Remembers of each device what it last said.

    Attributes:
        now: The wall clock (UTC).
        most: Devices that are remembered; whoever may publish states must not fill the memory.
    """

    now: Callable[[], datetime]
    most: int = 65_536
    _known: dict[str, _Known] = field(default_factory=dict)
    _began: datetime = field(init=False)

    def __post_init__(self) -> None:
        self._began = self.now()

    def presence(self, device: str) -> Presence | None:
        """Return a device's last word; None if it has said nothing."""
        known = self._known.get(device)
        return None if known is None else known.presence

    def note(self, device: str, state: DeviceState) -> DeviceChange:
        """Take a state. The first of a device may be from long before; the broker keeps it."""
        now, before = self.now(), self._known.get(device)
        known = _Known(state.presence, state.software, f"{state.draft_model} {state.quantization}".strip())
        if before is None and len(self._known) >= self.most:
            return DeviceChange((), None)
        self._known[device] = known
        if before is not None:
            return DeviceChange(tuple(_differences(before, known)), now if known.presence != before.presence else None)
        if state.presence is Presence.OFFLINE:
            return DeviceChange((), None)
        connected = min(now, state.since)
        fresh = state.presence is Presence.ONLINE and connected >= self._began
        return DeviceChange((("online", _SENTENCES[Presence.ONLINE]),) if fresh else (), connected)


def _differences(before: _Known, now: _Known) -> list[tuple[str, str]]:
    events = []
    if now.presence != before.presence:
        events.append((now.presence.value, _SENTENCES[now.presence]))
    if now.software != before.software:
        events.append(("software-changed", f"The device runs {now.software}; before it ran {before.software}."))
    if now.model != before.model:
        events.append(("model-changed", f"The device drafts with {now.model}; before with {before.model}."))
    return events

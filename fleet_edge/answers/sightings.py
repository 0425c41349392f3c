"""Sightings: how devices and this edge are, as they say, in the session log; of much within seconds the last."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from fleet_edge.answers.device_changes import DeviceChanges
from fleet_edge.answers.device_states import DeviceStates
from fleet_edge.answers.event_counts import EventCounts
from fleet_edge.store.event_codes import EventKind
from fleet_edge.store.records.record import Record
from fleet_edge.store.records.sightings import DeviceSeen, DeviceTold, EdgeLoad, EdgeSeen
from schemas.control import DeviceState, EdgeState, Presence, Telemetry

_TELEMETRY_EVERY: Final = timedelta(seconds=30)


@dataclass(slots=True)
class Sightings:
    """Writes them.

    Attributes:
        put: Takes a record; from any thread.
        edge: This edge's name.
        now: The wall clock (UTC).
        events: Counts what a device's change is worth telling.
    """

    put: Callable[[Record], None]
    edge: str
    now: Callable[[], datetime]
    events: EventCounts
    _changes: DeviceChanges = field(init=False)
    _states: DeviceStates[DeviceSeen] = field(init=False)
    _told: DeviceStates[DeviceTold] = field(init=False)
    _presence: tuple[Presence, datetime] | None = None  # this edge's, and since when

    def __post_init__(self) -> None:
        self._changes = DeviceChanges(self.now)
        self._states = DeviceStates(self.put)
        self._told = DeviceStates(self.put, every=_TELEMETRY_EVERY)

    def presence(self, device: str) -> Presence | None:
        """Return what a device has last said of its presence, or the broker in its place; None if nothing."""
        return self._changes.presence(device)

    def device(self, device: str, state: DeviceState) -> None:
        """A device published its state; of many within seconds the last is written, and what is new is an event."""
        change = self._changes.note(device, state)
        for code, sentence in change.events:
            # All edges hear it.
            self.events.note(kind=EventKind.DEVICE, code=code, sentence=sentence, device=device, shared=True)
        self._states.note(
            DeviceSeen(
                device=device,
                presence=state.presence,
                software=state.software,
                draft_model=state.draft_model,
                quantization=state.quantization,
                at=self.now(),
                certificate_until=state.certificate_until,
                presence_since=change.since,
            )
        )

    def telemetry(self, device: str, told: Telemetry) -> None:
        """A device published its telemetry; of much within half a minute the last is written."""
        self._told.note(
            DeviceTold(
                device=device,
                at=self.now(),
                plan=told.plan,
                round_trip_ms=told.round_trip_ms,
                acceptance=told.acceptance,
                draft_ms_per_token=told.draft_ms_per_token,
            )
        )

    def own(self, state: EdgeState) -> None:
        """This edge has told its own state."""
        if self._presence is None or self._presence[0] is not state.presence:
            self._presence = (state.presence, self.now())
        self.put(
            EdgeSeen(
                edge=state.edge,
                presence=state.presence,
                software=state.software,
                target=state.target,
                vocabulary=state.vocabulary,
                at=self.now(),
                certificate_until=state.certificate_until,
                presence_since=self._presence[1],
            )
        )

    def load(self, load: EdgeLoad) -> None:
        """What this edge does. From any thread."""
        self.put(load)

    def flush(self) -> None:
        """Write the states that were held back."""
        now = self.now()
        self._states.flush(now)
        self._told.flush(now)

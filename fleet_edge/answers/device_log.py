"""Device log: events and device states on their way to the session log, at a bounded rate."""

import hashlib
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from fleet_edge.session_log.event_codes import EventKind, Severity
from fleet_edge.session_log.records import Record, event_record, minute_of
from fleet_edge.session_log.rules import Values, stored
from fleet_edge.session_log.views import DeviceView, EdgeView
from schemas.control import DeviceState, EdgeState, Presence, Telemetry
from schemas.names import model_name

_OTHER: Final = "other"

_Key = tuple[str | None, str, str]


@dataclass(slots=True)
class _Count:
    """An event of the current minute, as it is when it happens first."""

    first: Values
    last_at: datetime
    count: int = 0
    written: int = 0


@dataclass(slots=True)
class EventCounts:
    """Writes one event for each device, kind, code and minute, with its count. Thread-safe.

    The first event is written at once; repetitions in the same minute are counted and written by `flush` or with the
    next minute. Events above `max_codes` per minute and device count as one, `other`; so do those above `max_events`
    of all devices, without a device. `put` MUST NOT block or raise.
    """

    put: Callable[[Record], object]
    edge: str
    now: Callable[[], datetime]
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex
    max_codes: int = 16
    max_events: int = 4096
    _minute: int = -1
    _counts: dict[_Key, _Count] = field(default_factory=dict)
    _codes: Counter[str | None] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(
        self,
        kind: str,
        code: str,
        sentence: str,
        device: str | None = None,
        *,
        session: bytes | None = None,
        times: int = 1,
        severity: Severity | None = None,
        shared: bool = False,
    ) -> None:
        """Count an event; the first sentence and session of a minute are kept.

        `code` MUST NOT contain data from the device. `severity` is by default that of `event_codes`. `shared`: all
        edges of the fleet see it, as one event.
        """
        with self._lock:
            at = self.now()
            minute = minute_of(at)
            if minute != self._minute:  # also if the clock was set back
                self._write()
                self._counts.clear()
                self._codes.clear()
                self._minute = minute
            key, sentence, session = self._place(device, kind, code, sentence, session)
            counted = self._counts.get(key)
            if counted is None:
                # Random, so that no two runs of an edge refer to the same row, or derived from the event if all edges
                # see it alike, so that they all write the same row.
                made = self.new_id()
                if shared and key[1] != _OTHER:
                    made = hashlib.blake2b(repr((*key, minute)).encode(), digest_size=16).hexdigest()
                first = event_record(
                    at,
                    id=made,
                    edge=self.edge,
                    device=key[0],
                    session=session.hex() if session else None,
                    kind=key[1],
                    code=key[2],
                    sentence=sentence,
                    severity=severity,
                )
                counted = self._counts[key] = _Count(first.rows["events"], at)
                self._codes[key[0]] += 1
            counted.count += times
            counted.last_at = max(counted.last_at, at)
            if not counted.written:
                self._put(counted)

    def flush(self) -> None:
        """Write changed counts. Call it every few seconds, and at the end."""
        with self._lock:
            self._write()

    def _place(
        self, device: str | None, kind: str, code: str, sentence: str, session: bytes | None
    ) -> tuple[_Key, str, bytes | None]:
        """Return the code under which an event is counted, its sentence and its session."""
        key = (device, kind, code)
        if key in self._counts:
            return key, sentence, session
        if self._codes[device] >= self.max_codes - 1:
            key, sentence, session = (device, _OTHER, _OTHER), "Events of other kinds, counted together.", None
        if key not in self._counts and len(self._counts) >= self.max_events - 1:
            key, sentence, session = (None, _OTHER, _OTHER), "Events of other devices, counted together.", None
        return key, sentence, session

    def _write(self) -> None:
        for counted in self._counts.values():
            if counted.count > counted.written:
                self._put(counted)

    def _put(self, counted: _Count) -> None:
        counted.written = counted.count
        row = {**counted.first, "count": counted.count, "last_at": counted.last_at}
        self.put(Record(row["at"], {"events": row}))


_SENTENCES: Final = {
    Presence.ONLINE: "The device has connected.",
    Presence.DRAINING: "The device finishes its requests and takes no new ones.",
    Presence.OFFLINE: "The device has disconnected, or the broker has lost it.",
    Presence.CLOSED: "The device's program has ended as intended.",
}


@dataclass(slots=True)
class DeviceChanges:
    """Compares each device's state with its last one. `most` bounds the memory."""

    now: Callable[[], datetime]
    most: int = 65_536
    _known: dict[str, tuple[Presence, str, str]] = field(default_factory=dict)  # with software and draft model
    _began: datetime = field(init=False)

    def __post_init__(self) -> None:
        self._began = self.now()

    def presence(self, device: str) -> Presence | None:
        return self._known[device][0] if device in self._known else None

    def note(self, device: str, state: DeviceState) -> tuple[list[tuple[str, str]], datetime | None]:
        """Compare a state; return codes and sentences of events, and since when the presence holds, if known.

        The first state of a device may be old: the broker retains it.
        """
        now, before = self.now(), self._known.get(device)
        if before is None and len(self._known) >= self.most:
            return [], None
        model = model_name(state.draft_model, state.quantization) or ""
        self._known[device] = state.presence, state.software, model
        if before is None:
            if state.presence.gone:
                return [], None
            connected = min(now, state.since)
            fresh = state.presence is Presence.ONLINE and connected >= self._began
            return [("online", _SENTENCES[Presence.ONLINE])] if fresh else [], connected
        presence, software, drafter = before
        events = []
        if state.presence != presence:
            events.append((state.presence.value, _SENTENCES[state.presence]))
        if state.software != software:
            events.append(("software-changed", f"The device runs {state.software}; before it ran {software}."))
        if model != drafter:
            events.append(("model-changed", f"The device drafts with {model}; before with {drafter}."))
        return events, now if state.presence != presence else None


_OF_DEVICE: Final = set(stored(DeviceView))
_OF_EDGE: Final = set(stored(EdgeView))
"""What the log keeps of a state, a load or telemetry: fields that have a column."""


@dataclass(slots=True)
class StateRecorder:
    """Writes the states of devices and of this edge; the guard bounds how often a device may publish one."""

    put: Callable[[Record], None]
    edge: str
    now: Callable[[], datetime]
    events: EventCounts
    _changes: DeviceChanges = field(init=False)
    _own: EdgeState | None = None
    _since: datetime | None = None  # start of the presence in it
    _lock: threading.Lock = field(default_factory=threading.Lock)  # otherwise a repeated state could follow a newer one

    def __post_init__(self) -> None:
        self._changes = DeviceChanges(self.now)

    def presence(self, device: str) -> Presence | None:
        return self._changes.presence(device)

    def device(self, device: str, state: DeviceState) -> None:
        events, since = self._changes.note(device, state)
        for code, sentence in events:
            # All edges receive it.
            self.events.note(EventKind.DEVICE, code, sentence, device, shared=True)
        self._put(
            "devices", {"device": device, "presence_since": since}, "state_at", state.model_dump(include=_OF_DEVICE)
        )

    def telemetry(self, device: str, telemetry: Telemetry) -> None:
        self._put("devices", {"device": device}, "telemetry_at", telemetry.model_dump(include=_OF_DEVICE))

    def own(self, state: EdgeState) -> None:
        with self._lock:
            if self._own is None or self._own.presence is not state.presence:
                self._since = self.now()
            self._own = state
            self._put_own(state)

    def repeat_own(self) -> None:
        """Write this edge's state again: another edge may have used its name, and stopped."""
        with self._lock:
            if self._own is not None:
                self._put_own(self._own)

    def _put_own(self, state: EdgeState) -> None:
        # It is no longer loading.
        self._put(
            "edges",
            {"presence_since": self._since, "loading_at": self.now()},
            "state_at",
            state.model_dump(include=_OF_EDGE),
        )

    def _put(self, table: str, values: Values, at_column: str, reported: Values) -> None:
        at = self.now()
        self.put(Record(at, {table: {**values, at_column: at, **reported}}))

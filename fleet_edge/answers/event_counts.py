"""Event counts: one event of the session log for each device, kind, code and minute, with how often it happened.

What happens first is written at once, so that it is seen; what follows in the same minute is only counted, and the
count written when `flush` is called or the minute is over. So neither the database nor the writer's queue grows with
what a device sends: 16 events a minute and device at most, whatever it does.
"""

import hashlib
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from fleet_edge.store.event_codes import Severity, severity_of
from fleet_edge.store.records.events import EventLogged

_MINUTE: Final = timedelta(minutes=1)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_OTHER: Final = "other"

_Key = tuple[str | None, str, str]
"""Device, kind, code."""


@dataclass(slots=True)
class _Count:
    """An event of the current minute.

    Its `id` is random, so that no two runs of an edge ever mean the same row; of what all edges see alike it is made
    from that, so that all of them mean the same one.
    """

    id: str
    sentence: str
    session: bytes | None
    severity: Severity
    at: datetime
    last_at: datetime
    count: int = 0
    written: int = 0


@dataclass(slots=True)
class EventCounts:
    """Counts events, and writes the counts. Callable from any thread; never blocks on anything but its own lock.

    Attributes:
        put: Takes records; MUST NOT block or raise.
        edge: This edge's name.
        now: The wall clock (UTC).
        new_id: Makes the ids of events.
        most_codes: Events a minute and device; what is over is counted as one, `other`.
        most_events: Events a minute of all devices; what is over is counted as one, `other`, of no device.
    """

    put: Callable[[EventLogged], object]
    edge: str
    now: Callable[[], datetime]
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex
    most_codes: int = 16
    most_events: int = 4096
    _minute: int = -1
    _counts: dict[_Key, _Count] = field(default_factory=dict)
    _codes: Counter[str | None] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(
        self,
        *,
        kind: str,
        code: str,
        sentence: str,
        device: str | None,
        session: bytes | None = None,
        times: int = 1,
        severity: Severity | None = None,
        shared: bool = False,
    ) -> None:
        """Count what happened.

        Args:
            kind: What it is about; `event_codes` has all there are.
            code: What it is. What a device sends has no place in it.
            sentence: The same for a person; the minute's first is kept.
            device: Whom it concerns, if anyone.
            session: Which session it concerns, if any; the minute's first is kept.
            times: How often.
            severity: How grave it is; by default as `event_codes` says.
            shared: Whether all edges of the fleet see it alike: it is one event then.
        """
        with self._lock:
            at = self.now()
            minute = (at - _EPOCH) // _MINUTE
            if minute != self._minute:  # also if the clock was set back
                self._write()
                self._counts.clear()
                self._codes.clear()
                self._minute = minute
            key, sentence, session = self._place(device, kind, code, sentence, session)
            counted = self._counts.get(key)
            if counted is None:
                made = _shared_id(key, minute) if shared and key[1] != _OTHER else self.new_id()
                grave = severity or severity_of(key[1], key[2])
                counted = self._counts[key] = _Count(made, sentence, session, grave, at, at)
                self._codes[key[0]] += 1
            counted.count += times
            counted.last_at = max(counted.last_at, at)
            if not counted.written:
                self._put(key, counted)

    def flush(self) -> None:
        """Write what was counted since it was last written. Call it every few seconds, and at the end."""
        with self._lock:
            self._write()

    def _place(
        self, device: str | None, kind: str, code: str, sentence: str, session: bytes | None
    ) -> tuple[_Key, str, bytes | None]:
        """Return what to count an event as, with what is said of it."""
        key = (device, kind, code)
        if key in self._counts:
            return key, sentence, session
        if self._codes[device] >= self.most_codes - 1:
            key, sentence, session = (device, _OTHER, _OTHER), "Events of further kinds, counted together.", None
        if key not in self._counts and len(self._counts) >= self.most_events - 1:
            key, sentence, session = (None, _OTHER, _OTHER), "Events of further devices, counted together.", None
        return key, sentence, session

    def _write(self) -> None:
        for key, counted in self._counts.items():
            if counted.count > counted.written:
                self._put(key, counted)

    def _put(self, key: _Key, counted: _Count) -> None:
        device, kind, code = key
        counted.written = counted.count
        self.put(
            EventLogged(
                id=counted.id,
                edge=self.edge,
                device=device,
                session=counted.session.hex() if counted.session else None,
                kind=kind,
                code=code,
                sentence=counted.sentence,
                at=counted.at,
                count=counted.count,
                last_at=counted.last_at,
                severity=counted.severity,
            )
        )


def _shared_id(key: _Key, minute: int) -> str:
    return hashlib.blake2b(repr((*key, minute)).encode(), digest_size=16).hexdigest()

"""Watches of an edge: availability of its target, certificates, device clocks, and its lifecycle events."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from threading import Lock
from typing import Final

from fleet_common.validation import in_words
from fleet_edge.answers.recorder import Recorder
from fleet_edge.store.event_codes import EventKind
from fleet_edge.store.views import EdgeView
from schemas.control import DeviceState, Presence


@dataclass(slots=True)
class Availability:
    """Distinguishes a short absence of the target model, in which sessions wait, from one in which they migrate."""

    patience_s: float
    clock: Callable[[], float]
    _since: float | None = None
    _reported: bool = False

    def changes(self, reason: str) -> bool:
        """Return whether to notify devices that the model is away, or back; `reason` is empty if it is there."""
        if not reason:
            self._since = None
        elif self._since is None:
            self._since = self.clock()
        away = self._since is not None and self.clock() - self._since >= self.patience_s
        if away == self._reported or (reason and not away):
            return False
        self._reported = away
        return True


# Bounds the memory, as anyone who may publish states can name machines.
_MOST: Final = 100_000


@dataclass(frozen=True, slots=True)
class EndingCertificate:
    """A certificate that expires soon: owner, end (aware), and whole days left, negative after the end."""

    name: str
    until: datetime
    days: int

    @property
    def sentence(self) -> str:
        when = (
            f"ended on {self.until:%Y-%m-%d}" if self.days < 0 else f"ends in {self.days} days ({self.until:%Y-%m-%d})"
        )
        return (
            f"The certificate of {self.name} {when}: renew it, by playbooks/rotate_certs.yml or `fleet broker renew`."
        )


@dataclass(slots=True)
class CertificateWatch:
    """Remembers certificates' ends, and warns of each that is near once a day. Thread-safe.

    Renewal is due 30 days before the end; within `warn_before` it has failed for a while.
    """

    now: Callable[[], datetime]
    warn_before: timedelta = timedelta(days=14)
    _until: dict[str, datetime] = field(default_factory=dict)
    _reported: dict[str, datetime] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def note(self, name: str, until: datetime | None) -> None:
        """Record the end of a machine's certificate; None if it has none, or does not report it."""
        with self._lock:
            if until is None:
                self._until.pop(name, None)
            elif name in self._until or len(self._until) < _MOST:
                self._until[name] = until

    def due(self) -> list[EndingCertificate]:
        now, day = self.now(), timedelta(days=1)
        with self._lock:
            near = {name: until for name, until in self._until.items() if until - now < self.warn_before}
            self._reported = {name: at for name, at in self._reported.items() if name in near}
            fresh = [name for name in near if name not in self._reported or now - self._reported[name] >= day]
            self._reported.update(dict.fromkeys(fresh, now))
        endings = [EndingCertificate(name, near[name], (near[name] - now).days) for name in fresh]
        return sorted(endings, key=lambda ending: ending.until)


_TOLERATED: Final = timedelta(seconds=30)
"""Tolerated clock error: longer than a state takes to arrive, and too short to affect certificates and signatures."""

_CLOCKS_MOST: Final = 65_536


@dataclass(slots=True)
class ClockWatch:
    """Checks devices' clocks by the time since which they report to be up.

    A time in the future means that a clock is ahead; an earlier time for a later start, that it was set back. A state
    may be delayed, so a clock that is slow by less goes unnoticed.
    """

    _since: dict[str, datetime] = field(default_factory=dict)

    def note(self, device: str, state: DeviceState, *, now: datetime) -> str:
        """Check a device's state; return what is wrong with its clock, empty if nothing is. Last wills are ignored."""
        if state.presence is Presence.OFFLINE:
            return ""
        since = state.since
        before = self._since.get(device)
        if before is not None or len(self._since) < _CLOCKS_MOST:
            self._since[device] = since
        if since - now > _TOLERATED:
            return f"The clock of {device} is ahead by {in_words(since - now)}: set it (timedatectl set-ntp true)."
        if before is not None and before - since > _TOLERATED:
            return f"The clock of {device} has gone back by {in_words(before - since)} or more: synchronize it."
        return ""


@dataclass(slots=True)
class LifeEvents:
    """Logs lifecycle events: start and end, changes since the last run, loss of broker and database. Thread-safe."""

    recorder: Recorder
    software: str
    target: str
    clock: Callable[[], float]
    _lost_at: float | None = None
    _ended: bool = False
    _lock: Lock = field(default_factory=Lock)

    def started(self, before: EdgeView | None) -> None:
        """Log the start, and differences from the last run as known to the log (None if unknown)."""
        if before is not None:
            self._compare(before)
        self._edge("started", f"The edge takes sessions: release {self.software}, target model {self.target}.")

    def draining(self, sessions: int) -> None:
        self._edge("draining", f"The edge is draining and takes no new sessions; {sessions} are open.")

    def stopped(self, handed_over: int) -> None:
        self._ended = True
        self._edge("stopped", f"The edge has stopped; {handed_over} sessions continue at other edges.")

    def link(self, *, up: bool, why: str = "") -> None:
        if self._ended:
            return
        with self._lock:
            since = self._lost_at
            self._lost_at = None if up else since or self.clock()
        if not up and since is None:
            sentence = f"The edge has lost the broker; no device can reach it. {why}".rstrip()
            self.note(EventKind.BROKER, "connection-lost", sentence)
        elif up and since is not None:
            sentence = f"The edge has reached the broker again, after {self.clock() - since:.1f} s."
            self.note(EventKind.BROKER, "connection-back", sentence)

    def _compare(self, before: EdgeView) -> None:
        if before.presence not in (None, Presence.OFFLINE.value):
            sentence = (
                "The edge's last run ended unexpectedly: it was killed, or its machine went down. It was last "
                f"heard of at {before.seen_at:%Y-%m-%d %H:%M:%S} UTC."
            )
            self._edge("ended-unexpectedly", sentence)
        if before.software not in (None, self.software):
            sentence = f"The edge runs release {self.software}; before it ran {before.software}."
            self._edge("software-changed", sentence)
        if before.target not in (None, self.target):
            sentence = f"The edge verifies with {self.target}; before with {before.target}."
            self._edge("target-changed", sentence)

    def _edge(self, code: str, sentence: str) -> None:
        self.note(EventKind.EDGE, code, sentence)

    def note(self, kind: EventKind, code: str, sentence: str) -> None:
        self.recorder.events.note(kind, code, sentence)

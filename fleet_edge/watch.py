"""Watches of an edge: availability of its target, and its lifecycle events."""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

from fleet_edge.answers.recorder import Recorder
from fleet_edge.session_log.event_codes import EventKind
from fleet_edge.session_log.views import EdgeView
from fleet_edge.verifiers.contract import TargetInfo
from schemas.control import Presence


@dataclass(slots=True)
class Availability:
    """Distinguishes a short absence of the target model, in which sessions wait, from one in which they migrate."""

    patience_s: float
    clock: Callable[[], float]
    _since: float | None = None
    _reported: bool = False

    def changes(self, reason: str) -> bool:
        """Decide whether to notify devices that the model is away, or back; `reason` is empty if it is there."""
        if not reason:
            self._since = None
        elif self._since is None:
            self._since = self.clock()
        away = self._since is not None and self.clock() - self._since >= self.patience_s
        if away == self._reported or (reason and not away):
            return False
        self._reported = away
        return True


@dataclass(slots=True)
class LifeEvents:
    """Logs lifecycle events: start and end, changes since the last run, loss of broker and database. Thread-safe."""

    recorder: Recorder
    software: str
    target: TargetInfo
    clock: Callable[[], float]
    _lost_at: float | None = None
    _ended: bool = False
    _lock: Lock = field(default_factory=Lock)

    def started(self, before: EdgeView | None) -> None:
        """Log the start, and differences from the last run as known to the log (None if unknown)."""
        if before is not None:
            self._compare(before)
        self._edge("started", f"The edge takes sessions: release {self.software}, target model {self.target.name}.")

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
                f"heard of at {before.load_at or before.seen_at:%Y-%m-%d %H:%M:%S} UTC."
            )
            self._edge("ended-unexpectedly", sentence)
        if before.software not in (None, self.software):
            sentence = f"The edge runs release {self.software}; before it ran {before.software}."
            self._edge("software-changed", sentence)
        target = self.target.target_id.hex()
        if before.target_id not in (None, target):
            earlier = f"{before.target} ({before.target_id})"
            sentence = f"The edge verifies with {self.target.name} ({target}); before with {earlier}."
            self._edge("target-changed", sentence)

    def _edge(self, code: str, sentence: str) -> None:
        self.note(EventKind.EDGE, code, sentence)

    def note(self, kind: EventKind, code: str, sentence: str) -> None:
        self.recorder.events.note(kind, code, sentence)

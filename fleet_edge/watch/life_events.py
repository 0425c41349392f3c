"""Life events of an edge: start and end, what was different in its last run, the broker and the database it lost."""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

from fleet_edge.answers.recorder import Recorder
from fleet_edge.store.event_codes import EventKind
from fleet_edge.store.views import EdgeView
from schemas.control import Presence


@dataclass(slots=True)
class LifeEvents:
    """Tells the session log what an edge goes through. Callable from any thread.

    Attributes:
        recorder: Writes it.
        software: What this edge runs.
        target: What it verifies with.
        clock: Monotonic seconds.
    """

    recorder: Recorder
    software: str
    target: str
    clock: Callable[[], float]
    _lost_at: float | None = None
    _ended: bool = False
    _lock: Lock = field(default_factory=Lock)

    def started(self, before: EdgeView | None) -> None:
        """The edge takes sessions.

        Args:
            before: What the log knew of it until now; None if nothing, or if it cannot be known.
        """
        if before is not None:
            self._compare(before)
        self._edge("started", f"The edge takes sessions: release {self.software}, target model {self.target}.")

    def draining(self, sessions: int) -> None:
        self._edge("draining", f"The edge was told to end and takes no new sessions; {sessions} are open.")

    def stopped(self, handed_over: int) -> None:
        """It ends, and leaves the broker."""
        self._ended = True
        self._edge("stopped", f"The edge has ended as it was told to; {handed_over} sessions go on elsewhere.")

    def link(self, *, up: bool, why: str = "") -> None:
        """Note that the broker was lost, or found again.

        Args:
            up: Whether it was found.
            why: Why it was lost, in a sentence, if that is known.
        """
        if self._ended:
            return
        with self._lock:
            since = self._lost_at
            self._lost_at = None if up else since or self.clock()
        if not up and since is None:
            sentence = f"The edge has lost the broker; no device can reach it. {why}".rstrip()
            self._told(EventKind.BROKER, "connection-lost", sentence)
        elif up and since is not None:
            sentence = f"The edge has reached the broker again, after {self.clock() - since:.1f} s."
            self._told(EventKind.BROKER, "connection-back", sentence)

    def state_rejected(self, sentence: str) -> None:
        """The broker does not let the edge speak."""
        self._told(EventKind.BROKER, "state-rejected", sentence)

    def store(self, code: str, sentence: str) -> None:
        """Something became of the session log's database."""
        self._told(EventKind.DATABASE, code, sentence)

    def _compare(self, before: EdgeView) -> None:
        if before.presence not in (None, Presence.OFFLINE.value):
            sentence = (
                "The edge's last run has not said that it ended: it was killed, or its machine went down. It was last "
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
        self._told(EventKind.EDGE, code, sentence)

    def _told(self, kind: EventKind, code: str, sentence: str) -> None:
        self.recorder.event(kind=kind, code=code, sentence=sentence, device=None)

"""Self-watch of an edge: every few seconds its load goes to the session log, and whether its loop hangs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from fleet_common.metrics import Histogram
from fleet_edge.answers.recorder import Recorder
from fleet_edge.metrics.figures import Figures
from fleet_edge.observer import EdgeObserver, Look
from fleet_edge.store.event_codes import EventKind
from fleet_edge.store.records.sightings import EdgeLoad

_LOOKS: Final = 2
"""So many looks in a row that are not answered are a loop that hangs; one may only be a machine that is busy."""


@dataclass(slots=True)
class _Sums:
    """What had been counted at the last look."""

    at: float
    tokens: int
    step: tuple[float, int]
    batch: tuple[float, int]
    queue: tuple[float, int]

    @classmethod
    def of(cls, figures: Figures, *, at: float) -> "_Sums":
        return cls(
            at=at,
            tokens=sum(dict(figures.generation_tokens).values()),
            step=_sum(figures.step),
            batch=_sum(figures.batch_sessions),
            queue=_sum(figures.queue_time),
        )


@dataclass(slots=True)
class SelfWatch:
    """Looks at an edge from another thread than the loop's; one thread at a time.

    Attributes:
        observer: Looks at the loop.
        recorder: Writes what is seen.
        most_sessions: That may be open.
        clock: Monotonic seconds.
        now: The wall clock (UTC).
    """

    observer: EdgeObserver
    recorder: Recorder
    most_sessions: int
    clock: Callable[[], float]
    now: Callable[[], datetime]
    _before: _Sums = field(init=False)
    _dropped: int = 0
    _silent_since: float | None = None
    _silent: int = 0

    def __post_init__(self) -> None:
        self._before = _Sums.of(self.observer.figures, at=self.clock())

    def look(self) -> None:
        at = self.clock()
        look = self.observer.look()
        if look is None:
            self._hangs(at)
            return
        self._turns()
        self._tell_load(look)
        if (new := look.dropped - self._dropped) > 0:
            self._dropped = look.dropped
            sentence = "More came than the edge could take; messages of those who sent most were dropped."
            self._event("inbox-full", sentence, times=new)

    def _tell_load(self, look: Look) -> None:
        before, now = self._before, _Sums.of(self.observer.figures, at=self.clock())
        self._before = now
        store, memory = self.observer.writer.counters, self.observer.memory
        queue_s, step_s = _mean(before.queue, now.queue), _mean(before.step, now.step)
        self.recorder.sightings.load(
            EdgeLoad(
                edge=self.observer.edge,
                at=self.now(),
                open_sessions=look.running,
                most_sessions=self.most_sessions,
                batch_sessions=_mean(before.batch, now.batch),
                step_ms=None if step_s is None else step_s * 1e3,
                queue_ms=None if queue_s is None else queue_s * 1e3,
                tokens_per_s=(now.tokens - before.tokens) / max(1e-3, now.at - before.at),
                kv_usage=memory.computed / memory.whole if memory.whole else None,
                spooled_records=max(0, store.spooled - store.replayed),
            )
        )

    def _hangs(self, at: float) -> None:
        self._silent += 1
        if self._silent_since is None:
            self._silent_since = at
        if self._silent == _LOOKS:
            seconds = self.clock() - self._silent_since
            self._event("hangs", f"The edge's loop has not answered for {seconds:.0f} s; no text goes on here.")

    def _turns(self) -> None:
        if self._silent >= _LOOKS and self._silent_since is not None:
            seconds = self.clock() - self._silent_since
            self._event("hangs-no-more", f"The edge's loop answers again, after {seconds:.0f} s.")
        self._silent, self._silent_since = 0, None

    def _event(self, code: str, sentence: str, *, times: int = 1) -> None:
        self.recorder.event(kind=EventKind.EDGE, code=code, sentence=sentence, device=None, times=times)


def _sum(histogram: Histogram) -> tuple[float, int]:
    return histogram.total, sum(list(histogram.counts))


def _mean(before: tuple[float, int], now: tuple[float, int]) -> float | None:
    number = now[1] - before[1]
    return (now[0] - before[0]) / number if number > 0 else None

"""Observer of a running edge: metrics, health, and load reports for the session log.

State of the orchestrator's thread is read on that thread. A loop that does not answer in time hangs.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Final

from fleet_common.host import resident_memory
from fleet_common.metrics import Health, MetricsPages, exposition
from fleet_common.mqtt.link import Link
from fleet_edge import metrics as named
from fleet_edge.answers.recorder import Recorder
from fleet_edge.batching.scheduler import KvMemory
from fleet_edge.metrics import Figures
from fleet_edge.orchestrator import Orchestrator
from fleet_edge.session_log.event_codes import EventKind
from fleet_edge.session_log.records import Record, minute_of
from fleet_edge.session_log.rules import stored
from fleet_edge.session_log.views import CONNECTED, EdgeView, LoadView, MachineState
from fleet_edge.session_log.writer import LogWriter
from schemas.names import VERSION

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_ANSWER_S: Final = 2.0
"""Seconds that the loop has to answer; a working one does so within milliseconds."""
_HANGS: Final = f"The edge's loop has not answered within {_ANSWER_S:g} s."

_STEP_S: Final = 1.0
"""KV memory can be measured only between two steps; after this wait an earlier measurement is used."""

_STORE_OUTCOMES: Final = ("written", "spooled", "replayed", "rejected", "dropped")


@dataclass(frozen=True, slots=True)
class LoopState:
    """State of the orchestrator: open and waiting sessions, dropped messages, and why the target is away."""

    running: int
    waiting: int
    dropped: int
    draining: bool
    away: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeObserver:
    """Observes an edge from other threads."""

    fleet: str
    edge: str
    orchestrator: Orchestrator
    writer: LogWriter
    link: Link

    @property
    def figures(self) -> Figures:
        return self.orchestrator.answers.figures

    @property
    def memory(self) -> KvMemory:
        return self.orchestrator.scheduler.memory

    def pages(self) -> MetricsPages:
        return MetricsPages(metrics=lambda: exposition(self.metrics()), alive=self.alive, ready=self.ready)

    def loop_state(self) -> LoopState | None:
        """Ask the loop for its state; None if it does not answer. Call it from any other thread."""
        found: list[LoopState] = []
        answered, measured = threading.Event(), threading.Event()

        def report() -> None:
            loop = self.orchestrator
            found.append(
                LoopState(
                    running=len(loop.sessions),
                    waiting=loop.waiting(),
                    dropped=loop.inbox.dropped,
                    draining=loop.handlers.draining,
                    away=loop.handlers.away or loop.scheduler.away(),
                )
            )
            answered.set()
            loop.scheduler.note_memory(list(loop.sessions), then=measured.set)

        self.orchestrator.inbox.put(report)
        if not answered.wait(_ANSWER_S):
            return None
        measured.wait(_STEP_S)
        return found[0]

    def alive(self) -> Health:
        return Health({"loop": _HANGS if self.loop_state() is None else ""})

    def ready(self) -> Health:
        """Report whether sessions can be opened here and are recorded."""
        state, store = self.loop_state(), self.writer.counters
        if state is None:
            return Health({"loop": _HANGS})
        return Health(
            {
                "loop": "",
                "target": state.away,
                "broker": "" if self.link.connected else str(self.link.failure or "The broker cannot be reached."),
                "session_log": "Neither the database nor the spool takes records." if store.stuck else "",
                "draining": "The edge takes no new sessions." if state.draining else "",
            }
        )

    def metrics(self) -> Iterator["Metric"]:
        state = self.loop_state()
        yield named.INFO.of(1.0, VERSION, self.fleet, self.edge, self.orchestrator.scheduler.target.name)
        yield from self._counted()
        if state is not None:
            yield named.RUNNING.of(state.running)
            yield named.WAITING.of(state.waiting)
            yield named.DROPPED.of(state.dropped)
            yield named.DRAINING.of(state.draining)
            yield named.TARGET_UP.of(not state.away)
        memory = self.memory
        if memory.whole:
            yield named.KV_USAGE.of(memory.computed / memory.whole)
            yield named.KV_RETAINED.of(memory.retained / memory.whole)
        yield from self._stored()
        yield named.BROKER_UP.of(self.link.connected)
        yield named.LINK_EVENTS.by(asdict(self.link.counters))

    def device_states(self) -> Counter[MachineState]:
        return self.figures.device_states(self.orchestrator.handlers.guard.quarantined())

    def active_devices(self) -> int:
        return self.figures.active_devices(self.orchestrator.handlers.guard.quarantined())

    def _counted(self) -> Iterator["Metric"]:
        figures = self.figures
        yield named.NUM_DRAFTS.of(figures.drafts)
        yield named.NUM_DRAFT_TOKENS.of(figures.draft_tokens)
        yield named.NUM_TESTED.of(figures.tested)
        yield named.NUM_ACCEPTED.of(figures.accepted)
        yield named.ACCEPTED_PER_POS.by(_per_position(figures.accepted_lengths))
        yield named.PROMPT_TOKENS.of(figures.prompt_tokens)
        yield named.CACHED_TOKENS.of(figures.cached_tokens)
        yield named.PREFILL_TOKENS.of(figures.prefill_tokens)
        yield named.GENERATION_TOKENS.by(dict(figures.generation_tokens))
        yield named.SUCCESS.by(dict(figures.ended))
        yield named.REFUSALS.by(dict(figures.refusals))
        yield named.FAULTS.by(dict(figures.faults))
        yield named.UPLINK_BYTES.of(figures.uplink_bytes)
        yield named.DOWNLINK_BYTES.by(dict(figures.downlink_bytes))
        states = self.device_states()
        # Only the session log knows about retirement and about devices without a presence.
        known = (*CONNECTED, MachineState.QUARANTINED, MachineState.OFFLINE)
        yield named.DEVICES.by({each.value: states[each] for each in known})
        yield named.DEVICES_ACTIVE.of(self.active_devices())
        yield named.FIRST_TOKEN.spread(figures.first_token)
        yield named.INTER_TOKEN.spread(figures.inter_token)
        yield named.QUEUE_TIME.spread(figures.queue_time)
        yield named.STEP.spread(figures.step)
        yield named.BATCH_SESSIONS.spread(figures.batch_sessions)
        yield named.BATCH_TOKENS.spread(figures.batch_tokens)
        yield named.LINK_ROUND_TRIP.spread(figures.link_round_trip)

    def _stored(self) -> Iterator["Metric"]:
        store = self.writer.counters
        yield named.STORE_RECORDS.by({outcome: getattr(store, outcome) for outcome in _STORE_OUTCOMES})
        yield named.STORE_QUEUE.of(store.queued)
        yield named.SPOOL_RECORDS.of(max(0, store.spooled - store.replayed))
        yield named.SPOOL_BYTES.of(store.spool_bytes)
        yield named.STORE_LAG.of(store.lag_s)


def _per_position(lengths: list[int]) -> dict[str, int]:
    """Return how often the draft token at each position was accepted; `lengths[n]` drafts had n accepted tokens."""
    per_position: dict[str, int] = {}
    behind = 0
    for length in range(len(lengths) - 1, 0, -1):
        behind += lengths[length]
        if behind:
            per_position[str(length - 1)] = behind
    return per_position


_UNANSWERED: Final = 2
"""Number of unanswered requests in a row after which a loop hangs; a single one may be a busy machine."""


@dataclass(slots=True)
class SelfWatch:
    """Reports an edge's load, and a hanging loop, to the session log. Call it from one other thread at a time."""

    observer: EdgeObserver
    recorder: Recorder
    max_sessions: int
    clock: Callable[[], float]
    now: Callable[[], datetime]
    _before: dict[str, tuple[float, int]] = field(init=False)  # sums and numbers at the last observation
    _dropped: int = 0
    _silent_since: float | None = None
    _silent: int = 0

    def __post_init__(self) -> None:
        self._before = self._sums()

    def observe(self) -> None:
        at = self.clock()
        state = self.observer.loop_state()
        if state is None:
            self._hangs(at)
            return
        self._turns()
        self.recorder.sightings.repeat_own()
        self._report_load(state)
        if (new := state.dropped - self._dropped) > 0:
            self._dropped = state.dropped
            sentence = "The inbox was full; messages of the busiest devices were dropped."
            self._event("inbox-full", sentence, times=new)

    def _report_load(self, state: LoopState) -> None:
        before, now = self._before, self._sums()
        self._before = now

        def mean(name: str) -> float | None:
            number = now[name][1] - before[name][1]
            return (now[name][0] - before[name][0]) / number if number > 0 else None

        store, memory = self.observer.writer.counters, self.observer.memory
        devices = self.observer.device_states()
        queue_s, step_s = mean("queue_time"), mean("step")
        tokens, seconds = (now[name][0] - before[name][0] for name in ("tokens", "seconds"))
        load = {
            "open_sessions": state.running,
            "max_sessions": self.max_sessions,
            "batch_sessions": mean("batch_sessions"),
            "step_ms": None if step_s is None else step_s * 1e3,
            "queue_ms": None if queue_s is None else queue_s * 1e3,
            "tokens_per_s": tokens / max(1e-3, seconds),
            "kv_usage": memory.computed / memory.whole if memory.whole else None,
            "spooled_records": max(0, store.spooled - store.replayed),
            "memory_bytes": resident_memory(),
            "devices_active": self.observer.active_devices(),
            "devices_connected": sum(devices[state] for state in CONNECTED),
        }
        at = self.now()
        key: dict[str, dict[str, object]] = {
            "edges": {"load_at": at},
            "edge_loads": {"minute": minute_of(at), "at": at},
        }
        kept = {"edges": stored(EdgeView), "edge_loads": stored(LoadView)}
        rows = {
            table: {"edge": self.observer.edge, **key[table], **{name: load[name] for name in load if name in names}}
            for table, names in kept.items()
        }
        self.recorder.sink.put(Record(at, rows))

    def _sums(self) -> dict[str, tuple[float, int]]:
        figures = self.observer.figures
        spread = {name: getattr(figures, name) for name in ("step", "batch_sessions", "queue_time")}
        sums = {name: (each.total, sum(list(each.counts))) for name, each in spread.items()}
        tokens = sum(dict(figures.generation_tokens).values())
        return sums | {"tokens": (tokens, 0), "seconds": (self.clock(), 0)}

    def _hangs(self, at: float) -> None:
        self._silent += 1
        if self._silent_since is None:
            self._silent_since = at
        if self._silent == _UNANSWERED:
            seconds = self.clock() - self._silent_since
            self._event("hangs", f"The edge's loop has not answered for {seconds:.0f} s; no session makes progress.")

    def _turns(self) -> None:
        if self._silent >= _UNANSWERED and self._silent_since is not None:
            seconds = self.clock() - self._silent_since
            self._event("hangs-no-more", f"The edge's loop answers again, after {seconds:.0f} s.")
        self._silent, self._silent_since = 0, None

    def _event(self, code: str, sentence: str, *, times: int = 1) -> None:
        self.recorder.events.note(EventKind.EDGE, code, sentence, times=times)

"""Observer of a running edge: its metrics, whether it is alive, and whether it is ready for sessions.

What only the orchestrator's thread may look at it is asked for, as the jobs ask it: a loop that does not answer is one
that hangs.
"""

import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Final

from fleet_common.metrics import Family, Health, Pages, exposition
from fleet_common.mqtt.link import Link
from fleet_edge.batching.scheduler import KvMemory
from fleet_edge.metrics import catalogue as named
from fleet_edge.metrics.figures import Figures
from fleet_edge.orchestrator import Orchestrator
from fleet_edge.store.states import MachineState
from fleet_edge.store.writer import Writer
from schemas.names import VERSION

_ANSWER_S: Final = 2.0
"""A loop that works takes what arrives within a step's decisions: milliseconds."""

_STEP_S: Final = 1.0
"""What the memory holds is only known between two steps; where one takes longer, an earlier look must do."""

_STORE_OUTCOMES: Final = ("written", "spooled", "replayed", "rejected", "dropped")


@dataclass(frozen=True, slots=True)
class Look:
    """What the orchestrator's thread has said of itself.

    Attributes:
        running: Open sessions.
        waiting: Of these, those that wait for a step.
        dropped: Messages that did not fit into the inbox, since the start.
        draining: Whether no new sessions are taken.
        away: Why the large model cannot compute; empty if it can.
    """

    running: int
    waiting: int
    dropped: int
    draining: bool
    away: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeObserver:
    """Looks at an edge from other threads.

    Attributes:
        fleet: Its name.
        edge: This edge's name.
        orchestrator: The loop.
        writer: The session log's.
        link: To the broker.
        answer_s: How long the loop may take to answer.
    """

    fleet: str
    edge: str
    orchestrator: Orchestrator
    writer: Writer
    link: Link
    answer_s: float = _ANSWER_S

    @property
    def figures(self) -> Figures:
        return self.orchestrator.answers.figures

    @property
    def memory(self) -> KvMemory:
        """The memory for keys and values, as it was at the last look."""
        return self.orchestrator.scheduler.memory

    def pages(self) -> Pages:
        return Pages(metrics=lambda: exposition(self.families()), alive=self.alive, ready=self.ready)

    def look(self) -> Look | None:
        """Ask the loop; None if it does not answer. From any thread but its own."""
        found: list[Look] = []
        answered, measured = threading.Event(), threading.Event()

        def take() -> None:
            loop = self.orchestrator
            found.append(
                Look(
                    running=len(loop.sessions),
                    waiting=loop.waiting(),
                    dropped=loop.inbox.dropped,
                    draining=loop.handlers.draining,
                    away=loop.handlers.away or loop.scheduler.away(),
                )
            )
            answered.set()
            loop.scheduler.note_memory(list(loop.sessions), then=measured.set)

        self.orchestrator.inbox.put(take)
        if not answered.wait(self.answer_s):
            return None
        measured.wait(_STEP_S)
        return found[0]

    def alive(self) -> Health:
        return Health({"loop": "" if self.look() is not None else self._hangs})

    def ready(self) -> Health:
        """Tell whether sessions can be opened here and are recorded."""
        look, store = self.look(), self.writer.counters
        if look is None:
            return Health({"loop": self._hangs})
        return Health(
            {
                "loop": "",
                "target": look.away,
                "broker": "" if self.link.connected else str(self.link.failure or "The broker cannot be reached."),
                "session_log": "Neither the database nor the spool takes records." if store.stuck else "",
                "draining": "The edge takes no new sessions." if look.draining else "",
            }
        )

    def families(self) -> Iterator[Family]:
        """Yield all metrics, as they are now."""
        look = self.look()
        yield Family(named.INFO, {(VERSION, self.fleet, self.edge, self.orchestrator.scheduler.target.name): 1.0})
        yield from self._counted()
        if look is not None:
            yield named.RUNNING.of(look.running)
            yield named.WAITING.of(look.waiting)
            yield named.DROPPED.of(look.dropped)
            yield named.DRAINING.of(look.draining)
            yield named.TARGET_UP.of(not look.away)
        memory = self.memory
        if memory.whole:
            yield named.KV_USAGE.of(memory.computed / memory.whole)
            yield named.KV_RETAINED.of(memory.retained / memory.whole)
        yield from self._stored()
        yield named.BROKER_UP.of(self.link.connected)
        yield named.LINK_EVENTS.by(asdict(self.link.counters))

    @property
    def _hangs(self) -> str:
        return f"The edge's loop has not answered within {self.answer_s:g} s."

    def _counted(self) -> Iterator[Family]:
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
        states = figures.device_states(self.orchestrator.handlers.guard.fenced())
        # Retirement is known to the session log alone, and who has no presence is not known here.
        known = (each for each in MachineState if each not in (MachineState.RETIRED, MachineState.UNKNOWN))
        yield named.DEVICES.by({each.value: states[each] for each in known})
        yield named.FIRST_TOKEN.spread(figures.first_token)
        yield named.INTER_TOKEN.spread(figures.inter_token)
        yield named.QUEUE_TIME.spread(figures.queue_time)
        yield named.STEP.spread(figures.step)
        yield named.BATCH_SESSIONS.spread(figures.batch_sessions)
        yield named.BATCH_TOKENS.spread(figures.batch_tokens)
        yield named.LINK_ROUND_TRIP.spread(figures.link_round_trip)

    def _stored(self) -> Iterator[Family]:
        store = self.writer.counters
        yield named.STORE_RECORDS.by({outcome: getattr(store, outcome) for outcome in _STORE_OUTCOMES})
        yield named.STORE_QUEUE.of(store.queued)
        yield named.SPOOL_RECORDS.of(max(0, store.spooled - store.replayed))
        yield named.SPOOL_BYTES.of(store.spool_bytes)
        yield named.STORE_LAG.of(store.lag_s)


def _per_position(lengths: list[int]) -> dict[str, int]:
    """Return how often the draft token at each place was accepted, by the place from 0.

    Args:
        lengths: How many drafts had exactly so many tokens accepted, by that number.
    """
    per_position: dict[str, int] = {}
    behind = 0
    for length in range(len(lengths) - 1, 0, -1):
        behind += lengths[length]
        if behind:
            per_position[str(length - 1)] = behind
    return per_position

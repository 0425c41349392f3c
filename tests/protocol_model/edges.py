"""Edges of the model: real edges without threads, which crash, drain and restart on request."""

import concurrent.futures
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fleet_common.mqtt.link import Will
from fleet_edge.assembly import assemble
from fleet_edge.intake import leave_opens
from fleet_edge.orchestrator import Orchestrator
from fleet_edge.service import migrate_sessions
from fleet_edge.session_log.quarantines import Quarantines
from fleet_edge.settings import EdgeSettings
from schemas.control import Presence, encode_json
from schemas.topics import Topic, build
from tests.protocol_model.network import SteeredBroker, TappedLink
from tests.support.markov import MarkovScript
from tests.support.memory_fleet import END, FLEET, TARGET, Clock, Sink, edge_state
from tests.support.scripted_verifier import ScriptedVerifier
from tests.support.tuning import tune, without_tuning

STEPS = 200  # of one edge in a row; more are a loop


@dataclass(slots=True)
class Life:
    """One run of an edge's process.

    Attributes:
        opened: Name and attempt of the session that each grant of this life was for, by device and handle.
        astray: Sessions, by name and attempt, that judged a draft from before their Open: it continued the same tokens,
            but its device has voided it and may continue differently, until both notice.
    """

    orchestrator: Orchestrator
    verifier: ScriptedVerifier
    target: MarkovScript
    link: TappedLink
    opened: dict[tuple[str, int], tuple[bytes, int]] = field(default_factory=dict)
    astray: set[tuple[bytes, int]] = field(default_factory=set)


@dataclass(slots=True)
class ModelEdge:
    """A real edge without threads, up or down.

    Attributes:
        target: Of its next life.
        lives: Its starts.
    """

    name: str
    broker: SteeredBroker
    clock: Clock
    options: Mapping[str, object]
    kv_tokens: int
    tap: Callable[[Life, str, bytes], None]
    target: MarkovScript = TARGET
    life: Life | None = None
    lives: int = 0
    draining: bool = False
    sink: Sink = field(default_factory=Sink)

    def start(self) -> None:
        self.lives += 1
        settings = EdgeSettings.model_validate({"fleet": FLEET, "edge": self.name, **without_tuning(self.options)})
        words, name = self.target.words, "one" if self.target is TARGET else "other"
        verifier = ScriptedVerifier(
            self.target, words, context=256, budget_tokens=self.kv_tokens, end_tokens=(END,), name=name
        )
        will = Will(self._topic, self._state(Presence.OFFLINE, verifier.info.target_id))
        link = TappedLink(self.broker, self.name, self._published, will=will)
        orchestrator = assemble(
            settings,
            verifier=verifier,
            link=link,
            sink=self.sink,
            clock=self.clock,
            now=self.clock.now,
            first_handle=self.first_handle,
        )
        tune(orchestrator, {"gather_share": 0.0, **self.options})
        self.life, self.draining = Life(orchestrator, verifier, self.target, link), False
        link.on_connection(lambda up: self._announce() if up else None)
        link.start(timeout_s=1.0)
        self.broker.pump()

    def crash(self) -> None:
        self.life = None
        self.broker.forget(self.name)

    def drain(self) -> None:
        life = self._alive
        self.draining = life.orchestrator.handlers.draining = True
        leave_opens(life.link, fleet=FLEET)
        self._announce()

    def end(self) -> None:
        life = self._alive
        self.drain()
        life.orchestrator.receive_last(wait_s=0.0)
        migrate_sessions(
            life.orchestrator.sessions, answers=life.orchestrator.answers, scheduler=life.orchestrator.scheduler
        )
        self._publish(Presence.OFFLINE)
        life.link.stop()
        self.life = None
        self.broker.pump()

    def work(self) -> bool:
        """Compute until there is nothing left; return whether anything was computed."""
        for count in range(STEPS):
            if self.life is None or not self.life.orchestrator.step():
                self.broker.pump()
                return count > 0
        raise AssertionError(f"the edge still computes after {STEPS} steps")

    def compute(self) -> None:
        """Finish one step; the next, if there is one, has been computed but decides nothing yet."""
        if self.life is None:
            return
        self.life.orchestrator.step()
        if self.computing:
            running = self.life.orchestrator._running
            assert running is not None
            concurrent.futures.wait([running.future])  # or a run would not repeat exactly

    @property
    def computing(self) -> bool:
        return self.life is not None and self.life.orchestrator._running is not None

    def look_after(self, quarantines: Quarantines) -> None:
        if self.life is not None:
            handlers = self.life.orchestrator.handlers
            handlers.apply_quarantines(quarantines)
            handlers.expire()
            handlers.flush()
            handlers.recorder.flush()
            self.broker.pump()

    @property
    def first_handle(self) -> int:
        """Return the first handle of its present or next life; no two lives begin with the same."""
        return 2000 * self.lives + 1000 * int(self.name.rpartition("-")[2])

    @property
    def _alive(self) -> Life:
        assert self.life is not None
        return self.life

    @property
    def _topic(self) -> str:
        return build(Topic.EDGE_STATE, fleet=FLEET, edge=self.name)

    def _state(self, presence: Presence, target_id: bytes) -> bytes:
        return encode_json(edge_state(presence, edge=self.name, target_id=target_id.hex()))

    def _announce(self) -> None:
        self._publish(Presence.DRAINING if self.draining else Presence.ONLINE)

    def _publish(self, presence: Presence) -> None:
        life = self._alive
        life.link.publish(self._topic, self._state(presence, life.verifier.info.target_id), retain=True)

    def _published(self, topic: str, payload: bytes) -> None:
        if self.life is not None:
            self.tap(self.life, topic, payload)

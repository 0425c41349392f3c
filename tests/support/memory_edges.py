"""Whole edge services over a broker in memory, each on a thread of its own, with one session log."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleet_common.mqtt.link import Message
from fleet_common.mqtt.settings import LinkSettings
from fleet_device.requests.generate import GenerateRequest, Generation, RequestContext
from fleet_device.service import DeviceService
from fleet_device.settings import OfflinePolicy
from fleet_edge.service import EdgeService
from fleet_edge.settings import EdgeSettings
from schemas.control import EdgeState, Presence, decode_json
from schemas.policy import Mode, SamplingPolicy
from schemas.topics import Topic, build, wildcard
from tests.support.log_records import rows_of
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_device import TalkingDrafter, settings
from tests.support.memory_fleet import END, FLEET, TARGET, Clock, lossless_text, terms
from tests.support.memory_link import MemoryLink
from tests.support.scripted_verifier import ScriptedVerifier
from tests.support.tuning import tune
from tests.support.waiting import PATIENCE_S, until

PROMPT = (1, 2)
SEED = 6  # its output has no end token
LENGTH = 40
POLICY = SamplingPolicy(mode=Mode.COUPLED, temperature=0.8, top_k=5, top_p=0.93, seed=SEED)
DRAIN_S = 10.0


def undisturbed() -> tuple[int, ...]:
    """Return the output that the fleet must generate, whatever happens to it."""
    return tuple(lossless_text(terms(SEED, mode=Mode.COUPLED, max_new_tokens=LENGTH)))


@dataclass
class RunningEdge:
    service: EdgeService
    clock: Clock
    drain: threading.Event = field(default_factory=threading.Event)
    whole_drain: threading.Event = field(default_factory=threading.Event)
    stop: threading.Event = field(default_factory=threading.Event)
    calls: list[str] = field(default_factory=list)
    drained: int | None = None
    handed_over: int | None = None

    def __post_init__(self) -> None:
        self.service.start()
        tune(self.service.orchestrator, {"gather_share": 0.0})
        self._thread = threading.Thread(target=self._run, name=self.service.settings.edge)
        self._thread.start()

    @property
    def sessions(self) -> int:
        return len(self.service.orchestrator.sessions)

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(PATIENCE_S)
        assert self.ended

    def reach_the_deadline(self) -> None:
        """End the time limit of a drain, and thereby the edge."""
        self.clock.seconds += DRAIN_S
        self.join()

    def _run(self) -> None:
        try:
            self.service.run(
                self.stop,
                drain=self.drain,
                whole_drain=self.whole_drain,
                on_step=lambda: self._call("step"),
                on_end=lambda: self._call("end"),
                on_drain=self._note_drain,
            )
        finally:
            self.handed_over = self.service.stop()

    def _note_drain(self, sessions: int) -> None:
        self.drained = sessions

    def _call(self, name: str) -> None:
        if self.calls[-1:] != [name]:
            self.calls.append(name)


class Site:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = MemoryBroker()
        self.states: list[tuple[str, Presence]] = []
        self.opens = 0
        ears = MemoryLink(self.broker, "ears")
        ears.subscribe(wildcard(Topic.EDGE_STATE, fleet=FLEET), self._hear_state)
        ears.subscribe(wildcard(Topic.OPEN, fleet=FLEET), self._hear_open)
        ears.start(timeout_s=1.0)

    @contextmanager
    def edge(self, name: str = "edge-1", **options: Any) -> Iterator[RunningEdge]:
        chosen = EdgeSettings.model_validate(
            {
                "fleet": FLEET,
                "edge": name,
                "db": f"sqlite:///{self.folder / 'fleet.sqlite3'}",
                "spool": self.folder / name,
                "drain_s": DRAIN_S,
                **options,
            }
        )
        verifier = ScriptedVerifier(TARGET, TARGET.words, context=256, budget_tokens=1 << 20, end_tokens=(END,))
        clock = Clock()
        edge = RunningEdge(EdgeService(chosen, verifier, make_link=self._link, clock=clock), clock)
        try:
            until(lambda: (name, Presence.ONLINE) in self.states)
            yield edge
        finally:
            edge.stop.set()
            edge.join()

    @contextmanager
    def device(self, name: str = "device-1", **options: Any) -> Iterator[DeviceService]:
        chosen = settings(device=name, offline=OfflinePolicy.WAIT, answer_s=4.0, **options)
        state = build(Topic.STATE, fleet=FLEET, device=name)
        with DeviceService(chosen, TalkingDrafter(), make_link=self._link) as service:
            # The agent's work after a new connection must be over when a request begins.
            until(lambda: self.broker.retained(state) is not None)
            yield service

    def state(self, name: str) -> Presence | None:
        kept = self.broker.retained(build(Topic.EDGE_STATE, fleet=FLEET, edge=name))
        return None if kept is None else decode_json(EdgeState, kept).presence

    def rows(self, query: str) -> list[dict[str, Any]]:
        return rows_of(f"sqlite:///{self.folder / 'fleet.sqlite3'}", query)

    def _link(self, link: LinkSettings) -> MemoryLink:
        return MemoryLink(self.broker, link.client_id, will=link.will)

    def _hear_state(self, message: Message) -> None:
        state = decode_json(EdgeState, message.payload)
        self.states.append((state.edge, state.presence))

    def _hear_open(self, _message: Message) -> None:
        self.opens += 1


class Writing:
    """A generation on a thread; `act` runs on that thread at `at` tokens."""

    def __init__(self, device: DeviceService, *, at: int, disturb: Callable[[], None]) -> None:
        self._at = at
        self._disturb: Callable[[], None] | None = disturb
        self._written = 0
        self._outcome: list[Generation | BaseException] = []
        self._thread = threading.Thread(target=self._write, args=(device,), name="writing")
        self._thread.start()

    def finish(self) -> Generation:
        self._thread.join(PATIENCE_S)
        (outcome,) = self._outcome
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _write(self, device: DeviceService) -> None:
        try:
            done = device.agent.generate(
                GenerateRequest(PROMPT, policy=POLICY, max_new_tokens=LENGTH), RequestContext(on_tokens=self._count)
            )
        except BaseException as error:  # noqa: BLE001 - raised again by `finish`
            self._outcome.append(error)
        else:
            self._outcome.append(done)

    def _count(self, tokens: Sequence[int]) -> None:
        self._written += len(tokens)
        if self._disturb is not None and self._written >= self._at:
            disturb, self._disturb = self._disturb, None
            disturb()

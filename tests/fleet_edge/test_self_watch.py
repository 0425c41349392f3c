from collections import Counter
from dataclasses import dataclass, field

import pytest

from fleet_edge.answers.recorder import Recorder
from fleet_edge.batching.scheduler import KvMemory
from fleet_edge.metrics import Figures
from fleet_edge.observer import LoopState, SelfWatch
from fleet_edge.session_log import queries
from fleet_edge.session_log.database import Store
from fleet_edge.session_log.event_codes import EVENT_CODES
from fleet_edge.session_log.views import ACTIVE_WITHIN, MachineState
from schemas.control import Presence
from tests.support.memory_fleet import Clock, Sink, edge_state


@dataclass
class _Counters:
    spooled: int = 9
    replayed: int = 4


@dataclass
class _Writer:
    counters: _Counters = field(default_factory=_Counters)


class _Observer:
    def __init__(self, clock: Clock) -> None:
        self.edge, self.writer = "edge-1", _Writer()
        self.figures, self.memory = Figures(clock), KvMemory(computed=25, retained=50, free=25)
        self.answer: LoopState | None = LoopState(running=3, waiting=1, dropped=0, draining=False, away="")

    def loop_state(self) -> LoopState | None:
        return self.answer

    def device_states(self) -> Counter[MachineState]:
        return self.figures.device_states(())

    def active_devices(self) -> int:
        return self.figures.active_devices(())


class Scene:
    def __init__(self) -> None:
        self.clock, self.sink = Clock(), Sink()
        self.observer = _Observer(self.clock)
        self.recorder = Recorder(self.sink, "edge-1", self.clock.now)
        self.watch = SelfWatch(self.observer, self.recorder, 64, self.clock, self.clock.now)  # type: ignore[arg-type]

    def look(self) -> None:
        self.clock.seconds += 10.0
        self.watch.observe()

    def codes(self) -> list[str]:
        told = [(event.kind, event.code) for event in self.sink.of("event")]
        assert set(told) <= {(each.kind, each.code) for each in EVENT_CODES}
        return [code for _, code in told]


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_load_is_that_of_the_last_seconds(scene: Scene) -> None:
    figures = scene.observer.figures
    for _ in range(2):
        figures.step.observe(0.04)
        figures.batch_sessions.observe(3)
        figures.queue_time.observe(0.002)
        figures.generation_tokens["draft"] += 100
        scene.look()
    load = scene.sink.of("load")[-1]
    assert (load.open_sessions, load.max_sessions, load.spooled_records) == (3, 64, 5)
    assert (load.step_ms, load.batch_sessions, load.queue_ms) == (pytest.approx(40.0), 3.0, pytest.approx(2.0))
    assert (load.tokens_per_s, load.kv_usage) == (pytest.approx(10.0), 0.25)
    scene.look()
    idle = scene.sink.of("load")[-1]
    assert (idle.step_ms, idle.batch_sessions, idle.queue_ms, idle.tokens_per_s) == (None, None, None, 0.0)


def test_load_counts_connected_and_active_devices(scene: Scene) -> None:
    for device, presence in {"idle": Presence.ONLINE, "gone": Presence.OFFLINE, "busy": Presence.ONLINE}.items():
        scene.observer.figures.heard(device, presence)
    scene.clock.seconds += ACTIVE_WITHIN.total_seconds()
    scene.observer.figures.heard("busy")
    scene.look()
    load = scene.sink.of("load")[-1]
    assert (load.devices_active, load.devices_connected) == (1, 2)
    assert load.memory_bytes is not None
    assert load.memory_bytes > 10_000_000


def test_an_edge_that_writes_is_online_whatever_another_of_its_name_has_written(scene: Scene, store: Store) -> None:
    own = scene.recorder.sightings
    own.own(edge_state(Presence.ONLINE))
    scene.clock.seconds += 5.0
    Recorder(scene.sink, "edge-1", scene.clock.now).sightings.own(edge_state(Presence.OFFLINE))
    scene.look()
    store.apply(scene.sink)
    with store.engine.connect() as connection:
        (edge,) = queries.read_edges(connection, now=scene.clock.now())
    assert edge.state is MachineState.ONLINE
    own.own(edge_state(Presence.OFFLINE))  # while its target is away, or once it has stopped
    scene.look()
    assert scene.sink.of("edge")[-1].presence is Presence.OFFLINE


def test_a_loop_that_hangs_is_told_once_and_again_when_it_answers(scene: Scene) -> None:
    answer, scene.observer.answer = scene.observer.answer, None
    scene.look()
    assert scene.codes() == []  # a machine that is busy
    scene.look()
    scene.look()
    scene.observer.answer = answer
    scene.look()
    scene.look()
    assert scene.codes() == ["hangs", "hangs-no-more"]
    assert "after 30 s" in scene.sink.of("event")[-1].sentence


def test_what_an_inbox_drops_is_counted(scene: Scene) -> None:
    scene.observer.answer = LoopState(running=3, waiting=1, dropped=40, draining=False, away="")
    scene.look()
    scene.look()
    assert [(event.code, event.count) for event in scene.sink.of("event")] == [("inbox-full", 40)]

from dataclasses import replace

import pytest

from fleet_edge.answers.recorder import Recorder
from fleet_edge.service import LifeEvents
from fleet_edge.session_log.event_codes import EVENT_CODES
from fleet_edge.session_log.views import EdgeView, MachineState
from fleet_edge.verifiers.contract import TargetInfo
from schemas.control import Presence
from schemas.vocabulary import Vocabulary
from tests.fleet_edge.store.samples import START
from tests.support.memory_fleet import Clock, Sink

BEFORE = EdgeView(
    edge="edge-1",
    software="0.1.0",
    target="small",
    target_id="00" * 8,
    presence=Presence.OFFLINE.value,
    state=MachineState.OFFLINE,
    first_seen_at=START,
    seen_at=START,
    presence_since=None,
    vocabulary=None,
    certificate_until=None,
    loading=None,
    loading_at=None,
    load_at=None,
    open_sessions=None,
    max_sessions=None,
    batch_sessions=None,
    step_ms=None,
    queue_ms=None,
    tokens_per_s=None,
    kv_usage=None,
    spooled_records=None,
)


TARGET = TargetInfo("large", Vocabulary.of(["a", "b"]), context=8, end_tokens=()).identified(b"large")


class Scene:
    def __init__(self) -> None:
        self.clock, self.sink = Clock(), Sink()
        recorder = Recorder(self.sink, "edge-1", self.clock.now)
        self.life = LifeEvents(recorder, "0.2.0", TARGET, self.clock)

    def told(self) -> list[tuple[str, str]]:
        told = [(event.kind, event.code) for event in self.sink.of("event")]
        assert set(told) <= {(each.kind, each.code) for each in EVENT_CODES}
        return told

    def sentences(self) -> list[str]:
        return [event.sentence for event in self.sink.of("event")]


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_an_edge_that_is_new_only_starts(scene: Scene) -> None:
    scene.life.started(None)
    assert scene.told() == [("edge", "started")]


def test_a_run_that_ended_without_saying_so_and_what_differs_from_it_are_told(scene: Scene) -> None:
    scene.life.started(replace(BEFORE, presence=Presence.DRAINING.value))
    codes = [code for _, code in scene.told()]
    assert codes == ["ended-unexpectedly", "software-changed", "target-changed", "started"]
    assert "2026-03-04 10:30:00 UTC" in scene.sentences()[0]


def test_a_run_that_ended_as_it_was_told_to_is_nothing_to_tell(scene: Scene) -> None:
    scene.life.started(replace(BEFORE, software="0.2.0", target="large", target_id=TARGET.target_id.hex()))
    assert scene.told() == [("edge", "started")]


def test_another_file_of_the_same_name_is_told(scene: Scene) -> None:
    scene.life.started(replace(BEFORE, software="0.2.0", target="large"))
    assert scene.told() == [("edge", "target-changed"), ("edge", "started")]


def test_a_broker_that_goes_away_is_told_when_it_goes_and_for_how_long_when_it_is_back(scene: Scene) -> None:
    scene.life.link(up=True)
    scene.life.link(up=False)
    scene.clock.seconds += 7.25
    scene.life.link(up=False)
    scene.clock.seconds += 5.0
    scene.life.link(up=True)
    assert scene.told() == [("broker", "connection-lost"), ("broker", "connection-back")]
    assert "after 12.2 s" in scene.sentences()[1]


def test_an_edge_that_ends_leaves_the_broker_without_losing_it(scene: Scene) -> None:
    scene.life.draining(3)
    scene.life.stopped(1)
    scene.life.link(up=False)
    assert scene.told() == [("edge", "draining"), ("edge", "stopped")]

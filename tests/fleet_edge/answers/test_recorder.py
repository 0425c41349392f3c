from collections.abc import Callable
from datetime import timedelta

import pytest

from fleet_edge.answers.recorder import DeviceRates, Recorder
from schemas.messages import Close
from schemas.reasons import EndReason
from tests.fleet_edge.store.samples import COUNTERS, START, after
from tests.support.drafts import TOY, arrived, draft, edge_session, open_message, result
from tests.support.memory_fleet import Sink


def test_each_device_has_its_own_share_of_each_span() -> None:
    rates = DeviceRates(3)
    assert [rates.admit("a", after(0)) for _ in range(5)] == [True] * 3 + [False] * 2
    assert rates.admit("b", after(0))
    assert rates.admit("a", after(60))


def test_a_clock_that_is_set_back_begins_a_new_span() -> None:
    rates = DeviceRates(1)
    assert rates.admit("a", after(0))
    assert not rates.admit("a", after(1))
    assert rates.admit("a", after(-3600))
    assert rates.admit("a", after(0))


class Scene:
    def __init__(self) -> None:
        self.at = START
        self.sink = Sink()
        self.recorder = Recorder(self.sink, "edge-1", lambda: self.at)

    def close(self, number: int, *, then: Callable[[], None] = lambda: None, **fields: object) -> None:
        told = {name: getattr(COUNTERS, name) for name in COUNTERS.__slots__}
        named = {"session": number.to_bytes(8, "big"), "handle": None, "digest": 0}
        message = Close.model_validate({**named, "reason": EndReason.STOP, **told, **fields})
        self.recorder.record_unknown_end("sensor-1", message, then=then)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_flood_of_closes_of_sessions_that_never_were_leaves_little_behind(scene: Scene) -> None:
    for number in range(300):
        scene.close(number)
    scene.recorder.flush()
    reported = scene.sink.of("reported")
    assert (len(reported), {record.device for record in reported}) == (8, {"sensor-1"})
    last = scene.sink.of("event")[-1]
    assert (last.device, last.kind, last.code, last.count) == ("sensor-1", "close", "unknown-session", 292)
    scene.at += timedelta(minutes=1)
    scene.close(300)
    assert len(scene.sink.of("reported")) == 9


def test_texts_written_without_an_edge_are_all_kept_those_over_the_rate_later(scene: Scene) -> None:
    confirmed: list[int] = []
    waiting = list(range(100))
    minutes = 0
    while waiting:
        for number in list(waiting):
            scene.close(number, then=lambda number=number: confirmed.append(number), unverified=5, age_s=3600.0)
        waiting = [number for number in waiting if number not in confirmed]
        scene.at += timedelta(minutes=1)
        minutes += 1
    reported = scene.sink.of("reported")
    assert (len(reported), len({record.session for record in reported}), minutes) == (100, 100, 4)
    assert {record.counters.unverified for record in reported} == {5}
    assert all(record.at <= scene.at - timedelta(hours=1) for record in reported)


def test_a_flood_of_requests_for_samples_is_not_a_row_each_and_hides_no_round(scene: Scene) -> None:
    session = edge_session()
    scene.recorder.record_open(session, open_message(), target=TOY, size=100)
    for number in range(100):
        tokens, tried = ((1,), None) if number == 99 else ((), 16)
        counts = (9,) * len(tokens)
        asked = arrived(draft(round_=number, tokens=tokens, counts=counts, tried=tried), at=0.0)
        judged = result(asked, tested=len(tokens))
        scene.recorder.record_verdict(session, judged, form="samples", downlink_bytes=900)
    rounds = [record.round for record in scene.sink.of("round")]
    assert rounds == [*range(30), 99]


def test_of_drafts_that_are_hardly_ever_accepted_a_sample_is_logged(scene: Scene) -> None:
    session = edge_session()
    scene.recorder.record_open(session, open_message(), target=TOY, size=100)
    for number in range(100):
        drafted = arrived(draft(round_=number, tokens=(1,), counts=(9,)), at=0.0)
        judged = result(drafted, tested=1, background=number != 99)
        scene.recorder.record_verdict(session, judged, form="sparse", downlink_bytes=900)
    assert [record.round for record in scene.sink.of("round")] == [*range(30), 99]

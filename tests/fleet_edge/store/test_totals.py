from fleet_edge.counters import SEGMENT_COUNTERS
from fleet_edge.session_log import SessionLog
from fleet_edge.store.database import Store
from fleet_edge.store.records import segment_number
from fleet_edge.store.totals import Grouping
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.samples import OTHER, SEGMENT, SESSION, after


def test_stats_add_up_whole_and_by_name(fleet_log: SessionLog) -> None:
    [(name, total)] = fleet_log.stats().items()
    assert (name, total.sessions, total.segments, total.tokens) == ("all", 3, 4, 47)
    assert total.acceptance == (15 + 5 + 15) / 60
    by_device = fleet_log.stats(by=Grouping.DEVICE)
    assert {name: tally.tokens for name, tally in by_device.items()} == {"sensor-1": 40, "sensor-2": 7}
    assert list(by_device) == ["sensor-1", "sensor-2"], "the most tokens first"
    by_draft = fleet_log.stats(by=Grouping.DRAFT)
    assert {name: tally.tokens for name, tally in by_draft.items()} == {
        "SmolLM2-135M Q4_0": 40,
        "SmolLM2-135M Q2_K": 7,
    }
    by_edge = fleet_log.stats(by=Grouping.EDGE)
    assert {name: tally.sessions for name, tally in by_edge.items()} == {"edge-1": 3, "edge-2": 1}
    assert fleet_log.stats(since=after(3600))["all"].tokens == 7


def test_every_counter_is_stored_added_up_and_rolled_up(store: Store, log: SessionLog) -> None:
    counted = {name: number for number, name in enumerate(SEGMENT_COUNTERS, start=1)}
    other = {"session": OTHER, "segment": SEGMENT + 1}
    records = (
        samples.opened(),
        samples.progress(**counted),
        samples.opened(**other),
        samples.progress(**other, **counted),
    )
    store.apply(records)
    total = log.stats()["all"]
    [hour] = log.hours("sensor-1")
    session = log.session(SESSION)
    for name, number in counted.items():
        assert getattr(session.counted, name) == number, name
        assert getattr(total, name) == getattr(hour.counted, name) == 2 * number, name


def test_usage_adds_up_by_application_of_each_device(store: Store, log: SessionLog) -> None:
    for number, (app, tokens) in enumerate([("alarms", 10), ("alarms", 5), (None, 3)]):
        own = {"session": f"{number:016x}", "segment": SEGMENT + number}
        store.apply([samples.opened(**own, app=app), samples.progress(**own, tokens=tokens)])
    found = log.stats(by="app")
    assert {name: tally.tokens for name, tally in found.items()} == {"sensor-1 alarms": 15, "sensor-1 -": 3}


def test_a_session_resumed_at_one_edge_counts_there_once(store: Store, log: SessionLog) -> None:
    again = {"session": SESSION, "segment": segment_number(after(50))}
    store.apply([samples.opened(), samples.opened(**again, at=after(50))])
    for by in (None, *Grouping):
        [tally] = log.stats(by=by).values()
        assert (tally.sessions, tally.segments) == (1, 2)
    later = log.stats(since=after(10))["all"]
    assert (later.sessions, later.segments) == (0, 1), "a session belongs to the time in which it was opened"

from fleet_edge.session_log.counters import SEGMENT_COUNTERS
from fleet_edge.session_log.database import Store
from fleet_edge.session_log.log import SessionLog
from fleet_edge.session_log.records import segment_number
from fleet_edge.session_log.rollups import Dimension
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.samples import OTHER, SEGMENT, SESSION, after


def test_usage_adds_up_whole_and_by_name(fleet_log: SessionLog) -> None:
    [whole] = fleet_log.usage()
    total = whole.counted
    assert (total.sessions, total.segments, total.tokens) == (3, 4, 47)
    assert total.acceptance == (15 + 5 + 15) / 60
    by_device = fleet_log.usage(by=["device"])
    assert [(each.device, each.counted.tokens) for each in by_device] == [("sensor-1", 40), ("sensor-2", 7)]
    by_draft = fleet_log.usage(by=["draft_model", "quantization"])
    assert [(each.draft_model, each.quantization, each.counted.tokens) for each in by_draft] == [
        ("SmolLM2-135M", "Q4_0", 40),
        ("SmolLM2-135M", "Q2_K", 7),
    ]
    by_edge = fleet_log.usage(by=["edge"])
    assert {each.edge: each.counted.sessions for each in by_edge} == {"edge-1": 3, "edge-2": 1}
    assert fleet_log.usage(since=after(3600))[0].counted.tokens == 7


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
    [whole], [hour] = log.usage(), log.usage(device="sensor-1", grain="hour")
    session = log.session(SESSION)
    for name, number in counted.items():
        assert getattr(session.counted, name) == number, name
        assert getattr(whole.counted, name) == getattr(hour.counted, name) == 2 * number, name


def test_usage_adds_up_by_application_of_each_device(store: Store, log: SessionLog) -> None:
    for number, (app, tokens) in enumerate([("alarms", 10), ("alarms", 5), (None, 3)]):
        own = {"session": f"{number:016x}", "segment": SEGMENT + number}
        store.apply([samples.opened(**own, app=app), samples.progress(**own, tokens=tokens)])
    found = log.usage(by=["device", "app"])
    assert [(each.device, each.app, each.counted.tokens) for each in found] == [
        ("sensor-1", "alarms", 15),
        ("sensor-1", None, 3),
    ]


def test_a_session_resumed_at_one_edge_counts_there_once(store: Store, log: SessionLog) -> None:
    again = {"session": SESSION, "segment": segment_number(after(50))}
    store.apply([samples.opened(), samples.opened(**again, at=after(50))])
    for asked in ({}, {"grain": "hour"}, *({"by": [name]} for name in Dimension)):
        [found] = log.usage(**asked)
        assert (found.counted.sessions, found.counted.segments) == (1, 2)
    later = log.usage(since=after(10))[0].counted
    assert (later.sessions, later.segments) == (0, 1), "a session belongs to the time in which it was opened"

import random
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

from sqlalchemy import text

from fleet_edge.answers.device_log import EventCounts
from fleet_edge.session_log.database import Store
from fleet_edge.session_log.event_codes import Severity
from fleet_edge.session_log.records import Record
from tests.support.log_records import of_kind

START = datetime(2026, 3, 4, 10, 30, tzinfo=UTC)


class Scene:
    def __init__(self, **bounds: int) -> None:
        self.at = START
        self.written: list[Record] = []
        ids = iter(range(1_000_000))
        self.events = EventCounts(
            self.written.append, "edge-1", lambda: self.at, new_id=lambda: f"{next(ids)}", **bounds
        )

    def note(self, times: int = 1, **changes: object) -> None:
        usual = {"kind": "fault", "code": "tokens-differ", "sentence": "The prefix differs.", "device": "sensor-1"}
        for _ in range(times):
            self.events.note(**{**usual, **changes})  # type: ignore[arg-type]

    @property
    def records(self) -> list[SimpleNamespace]:
        return of_kind(self.written, "event")

    @property
    def last(self) -> list[tuple[str | None, str, int]]:
        rows = {record.id: record for record in self.records}
        return [(row.device, row.code, row.count) for row in rows.values()]


def test_the_first_is_written_at_once_and_the_others_as_one_count() -> None:
    scene = Scene()
    scene.note(session=b"\0" * 8)
    assert [(record.count, record.session) for record in scene.records] == [(1, "00" * 8)]
    scene.at += timedelta(seconds=5)
    scene.note(2999, sentence="Another sentence.", session=b"\1" * 8)
    assert len(scene.records) == 1
    scene.events.flush()
    scene.events.flush()  # nothing more happened
    first, last = scene.records
    assert (last.id, last.count, last.at, last.last_at) == (first.id, 3000, START, scene.at)
    assert (last.sentence, last.session) == ("The prefix differs.", "00" * 8)


def test_a_new_minute_is_a_new_event_and_completes_the_old_one() -> None:
    scene = Scene()
    scene.note(3)
    scene.at += timedelta(minutes=1)
    scene.note(2)
    scene.events.flush()
    assert scene.last == [("sensor-1", "tokens-differ", 3), ("sensor-1", "tokens-differ", 2)]


def test_a_clock_that_is_set_back_loses_no_count() -> None:
    scene = Scene()
    scene.note(3)
    scene.at -= timedelta(hours=1)
    scene.note(2)
    scene.at += timedelta(hours=1)
    scene.note(4)
    scene.events.flush()
    assert sum(count for _, _, count in scene.last) == 9


def test_devices_kinds_and_codes_are_counted_apart() -> None:
    scene = Scene()
    for device in ("sensor-1", "sensor-2"):
        for kind, code in (("fault", "tokens-differ"), ("refused", "tokens-differ"), ("fault", "counts")):
            scene.note(2, device=device, kind=kind, code=code)
    scene.events.flush()
    assert [count for _, _, count in scene.last] == [2] * 6


def test_one_devices_many_codes_are_bounded_and_cost_others_nothing() -> None:
    scene = Scene(max_codes=4)
    for number in range(1000):
        scene.note(code=f"code-{number}")
    scene.note(device="sensor-2")
    scene.events.flush()
    assert scene.last == [
        *(("sensor-1", f"code-{number}", 1) for number in range(3)),
        ("sensor-1", "other", 997),
        ("sensor-2", "tokens-differ", 1),
    ]


def test_many_devices_are_bounded_and_every_event_is_counted() -> None:
    scene = Scene(max_events=5)
    for number in range(1000):
        scene.note(device=f"sensor-{number}")
    scene.events.flush()
    assert scene.last == [*((f"sensor-{number}", "tokens-differ", 1) for number in range(4)), (None, "other", 996)]


def test_the_database_holds_the_counts_whatever_the_order_and_repetition(store: Store) -> None:
    scene = Scene()
    for number in range(500):
        scene.note(code=f"code-{number % 3}")
        scene.at += timedelta(seconds=1)
        if number % 7 == 0:
            scene.events.flush()
    scene.events.flush()
    chance = random.Random(7)
    replayed = scene.written + chance.sample(scene.written, len(scene.written) // 2)
    chance.shuffle(replayed)
    store.apply(replayed)
    with store.engine.connect() as connection:
        rows, total = connection.execute(text("SELECT count(*), sum(count) FROM events")).one()
    assert (rows, total) == (3 * 9, 500)


def test_two_runs_of_an_edge_in_one_minute_do_not_overwrite_each_other(store: Store) -> None:
    for count in (5, 3):
        EventCounts(lambda record: store.apply([record]), "edge-1", lambda: START).note(
            kind="fault", code="tokens-differ", sentence="It differs.", device="sensor-1", times=count
        )
    with store.engine.connect() as connection:
        assert connection.scalar(text("SELECT sum(count) FROM events")) == 8


def test_what_all_edges_see_alike_is_one_event(store: Store) -> None:
    for edge in ("edge-1", "edge-2"):
        events = EventCounts(lambda record: store.apply([record]), edge, lambda: START)
        usual = {"kind": "device", "code": "offline", "sentence": "It is gone."}
        events.note(**usual, device="sensor-1", shared=True)
        events.note(**usual, device="sensor-2", shared=True)
    with store.engine.connect() as connection:
        assert connection.execute(text("SELECT device, count FROM events ORDER BY device")).all() == [
            ("sensor-1", 1),
            ("sensor-2", 1),
        ]


def test_an_event_is_as_grave_as_the_table_says_or_whoever_logs_it() -> None:
    scene = Scene()
    scene.note(kind="edge", code="hangs")
    scene.note(kind="alert", code="opened", severity=Severity.ERROR)
    scene.note(kind="unheard", code="of")
    assert [record.severity for record in scene.records] == [Severity.ERROR, Severity.ERROR, Severity.WARNING]

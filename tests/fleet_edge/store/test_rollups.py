import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from fleet_edge.session_log import housekeeping, totals
from fleet_edge.session_log.database import Store, open_store
from fleet_edge.session_log.errors import StoreUnavailable
from fleet_edge.session_log.housekeeping import Pace
from fleet_edge.session_log.periods import BEGINNING, DAY, Grain, ceiling, floor
from fleet_edge.session_log.records import Record, segment_number
from fleet_edge.session_log.rollups import Dimension
from fleet_edge.session_log.totals import UsageFilter
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.samples import START, after

BEGIN = datetime(2025, 11, 20, 7, 30, tzinfo=UTC)
SPAN = timedelta(days=100)
NOW = START + timedelta(days=200)


@dataclass(frozen=True)
class Stay:
    session: int
    at: datetime
    device: str
    edge: str
    app: str | None
    draft_model: str
    tokens: int


def _write(store: Store, stay: Stay) -> None:
    key = {"session": f"{stay.session:016x}", "segment": segment_number(stay.at), "device": stay.device}
    opened = samples.opened(
        **key, edge=stay.edge, app=stay.app, draft_model=stay.draft_model, at=stay.at, resumed_tokens=0
    )
    progress = samples.progress(**key, tokens=stay.tokens, first_token_ms=30.0, at=stay.at + timedelta(seconds=2))
    store.apply([opened, progress])


def _apply(store: Store, records: list[Record]) -> None:
    """Write as an edge does: again, if others held the lock for longer than a write waits for it."""
    while True:
        try:
            return store.apply(records)
        except StoreUnavailable:
            continue


def _stays(chance: random.Random, *, session: int, before: datetime) -> Iterator[Stay]:
    """Return the segments of a session: mostly one, now and then others at any edge."""
    at = BEGIN + chance.random() * (before - BEGIN)
    device, app = chance.choice(["a", "b", "c"]), chance.choice([None, "alarms"])
    while True:
        edge, draft = chance.choice(["north", "south"]), chance.choice(["small", "tiny"])
        whole = datetime.fromtimestamp(int(at.timestamp()), UTC)
        yield Stay(session, whole, device, edge, app, draft, chance.randrange(1, 100))
        at += chance.choice([timedelta(minutes=5), timedelta(hours=3), timedelta(days=2)])
        if at > before or chance.random() < 0.7:
            return


WAYS: dict[str, tuple[tuple[Dimension, ...], Grain | None, Callable[[Stay], tuple[object, ...]]]] = {
    "whole": ((), None, lambda _stay: ()),
    "device": ((Dimension.DEVICE,), None, lambda stay: (stay.device,)),
    "edge": ((Dimension.EDGE,), None, lambda stay: (stay.edge,)),
    "app": ((Dimension.DEVICE, Dimension.APP), None, lambda stay: (stay.device, stay.app)),
    "draft": ((Dimension.DRAFT_MODEL, Dimension.QUANTIZATION), None, lambda stay: (stay.draft_model, "Q4_0")),
    "hour": ((), Grain.HOUR, lambda stay: (floor(Grain.HOUR, stay.at),)),
    "day": ((), Grain.DAY, lambda stay: (floor(Grain.DAY, stay.at),)),
    "month": ((), Grain.MONTH, lambda stay: (floor(Grain.MONTH, stay.at),)),
}
"""Dimensions, grain, and the key of a row."""
Sums = dict[tuple[object, ...], tuple[int, int, int]]


def _rounded(period: UsageFilter, way: str, *, now: datetime, purged: datetime) -> UsageFilter:
    """Return the period that is added up: a long one, or one of purged segments, is of whole hours or days."""
    since = period.since or BEGINNING
    by, grain, _ = WAYS[way]
    length, of_device = (period.until or now) - since, Dimension.DEVICE in by
    if since >= purged and length <= (timedelta(days=2) if of_device else timedelta(hours=12)):
        return period
    hourly = not of_device and (grain is Grain.HOUR or length <= timedelta(days=8))
    kept = Grain.HOUR if hourly else Grain.DAY
    return UsageFilter(since=floor(kept, since), until=None if period.until is None else ceiling(kept, period.until))


def _expected(stays: list[Stay], period: UsageFilter, way: str) -> Sums:
    sums: Sums = {}
    for stay in stays:
        if (period.since and stay.at < period.since) or (period.until and stay.at >= period.until):
            continue
        key = WAYS[way][2](stay)
        earlier = [
            other
            for other in stays
            if (other.session, other.at < stay.at) == (stay.session, True)
            if way != "edge" or other.edge == stay.edge
        ]
        sessions, segments, tokens = sums.get(key, (0, 0, 0))
        sums[key] = (sessions + (not earlier), segments + 1, tokens + stay.tokens)
    return sums or ({(): (0, 0, 0)} if way == "whole" else {})


def _found(store: Store, period: UsageFilter, way: str, *, now: datetime = NOW) -> Sums:
    by, grain, _ = WAYS[way]
    with store.engine.connect() as connection:
        found = totals.usage(connection, now=now, period=period, by=by, grain=grain)
    return {
        (*([] if grain is None else [view.start]), *(getattr(view, name) for name in by)): (
            view.counted.sessions, view.counted.segments, view.counted.tokens,
        )
        for view in found
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_totals_are_what_was_written_at_any_time(store: Store, seed: int) -> None:
    chance = random.Random(seed)
    now = BEGIN
    stays: list[Stay] = []
    purged_until = BEGIN  # periods begin and end with an hour before this
    while now < BEGIN + SPAN:
        now += chance.choice([timedelta(hours=1), timedelta(days=1), timedelta(days=9)])
        for _ in range(chance.randrange(1, 6)):
            new = [stay for stay in _stays(chance, session=len(stays), before=now) if stay.at >= purged_until]
            chance.shuffle(new)  # what an edge has spooled comes late
            for stay in new:
                _write(store, stay)
                if chance.random() < 0.1:
                    _write(store, chance.choice([stay, *new]))  # a batch that was spooled although it was stored
            stays += dict.fromkeys(stay for stay in new)
        if chance.random() < 0.2:
            housekeeping.purge_sessions(store.engine, before=now - 30 * DAY, pace=Pace(50))
            purged_until = max(purged_until, ceiling(Grain.HOUR, now - 30 * DAY))
        since = now - chance.random() * (now - BEGIN)
        until = chance.choice([None, since + chance.random() * (now - since)])
        short = now - chance.random() * timedelta(days=10)
        limits = [(None, None), (since, None), (since, until), (short, None), (short, short + timedelta(hours=9))]
        for period in (UsageFilter(since=begin, until=end) for begin, end in limits):
            for by in WAYS:
                rounded = _rounded(period, by, now=now, purged=purged_until)
                assert _found(store, period, by, now=now) == _expected(stays, rounded, by), (now, period, by)
    begin = floor(Grain.DAY, now - 9 * DAY)
    _check_minutes(store, [stay for stay in stays if stay.at >= begin], since=begin, now=now)


def _check_minutes(store: Store, stays: list[Stay], *, since: datetime, now: datetime) -> None:
    for grain in (Grain.MINUTE, Grain.FIVE_MINUTES):
        with store.engine.connect() as connection:
            views = totals.usage(connection, now=now, period=UsageFilter(since=since), grain=grain)
        expected = Counter[datetime | None]()
        for stay in stays:
            expected[floor(grain, stay.at)] += stay.tokens
        assert {view.start: view.counted.tokens for view in views} == expected
    for grain in (Grain.MINUTE, Grain.HOUR, Grain.DAY):
        with store.engine.connect() as connection:
            found = totals.active(connection, now=now, since=since, grain=grain)
        devices: dict[datetime, set[str]] = {}
        for stay in stays:
            devices.setdefault(floor(grain, stay.at), set()).add(stay.device)
        assert found == {start: len(names) for start, names in devices.items()}


def test_minutes_become_hours_where_segments_are_purged(store: Store) -> None:
    for number, hours in enumerate((0.1, 0.2, 30.1)):
        _write(store, Stay(number, _at(hours), "a", "north", None, "small", 10))
    assert _beginning(store) == _at(0.1)
    housekeeping.purge_sessions(store.engine, before=floor(Grain.DAY, _at(30)), pace=Pace(10))
    with store.engine.connect() as connection:
        found = totals.usage(connection, now=NOW, grain=Grain.MINUTE)
        latencies = totals.latencies(connection, now=NOW, grain=Grain.MINUTE)
    assert {view.start: view.counted.tokens for view in found} == {_at(0): 20, _at(30): 10}
    assert {start: own[totals.Measure.FIRST_TOKEN].count for start, own in latencies.items()} == {
        _at(0): 2,
        _at(30): 1,
    }
    assert _beginning(store) == _at(0)


def _beginning(store: Store) -> datetime | None:
    with store.engine.connect() as connection:
        return totals.beginning(connection)


def _at(hours: float) -> datetime:
    return START.replace(minute=0) + timedelta(hours=hours)


def _stay(hours: float, *, session: int = 1, tokens: int = 5) -> Stay:
    return Stay(session, _at(hours), "a", "north", None, "small", tokens)


def test_a_session_whose_beginning_comes_late_is_counted_once_and_in_its_own_time(store: Store) -> None:
    later, first = _stay(5), _stay(1)
    for stay in (later, first, later):
        _write(store, stay)
    assert _found(store, UsageFilter(), "whole") == {(): (1, 2, 10)}
    assert _found(store, UsageFilter(since=_at(4)), "whole", now=_at(6)) == {(): (0, 1, 5)}


def test_what_changes_after_the_end_of_a_session_counts_once(store: Store) -> None:
    ended = [
        samples.opened(),
        samples.progress(tokens=20, first_token_ms=9.0, gap_p95_ms=4.0),
        samples.closed(counters=None),
    ]
    later = samples.progress(tokens=25, gap_p95_ms=4.0, at=after(9))
    for records in (ended, ended, [later], ended, [samples.reported(tokens=25)]):
        store.apply(records)
    for by in WAYS:
        assert list(_found(store, UsageFilter(), by).values()) == [(1, 1, 25)]
    with store.engine.connect() as connection:
        measured = totals.latencies(connection, now=NOW)[None]
    assert {measure: own.count for measure, own in measured.items()} == {
        totals.Measure.FIRST_TOKEN: 1,
        totals.Measure.GAP: 1,
    }


def test_what_comes_after_its_purge_is_in_no_total(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    _write(store, _stay(0))
    housekeeping.purge_sessions(store.engine, before=_at(48), pace=Pace(10))
    _write(store, _stay(0))
    _write(store, _stay(2, session=3, tokens=9))
    assert "came so late that they are in no total" in caplog.text
    housekeeping.purge_sessions(store.engine, before=_at(24), pace=Pace(10))
    _write(store, _stay(30))
    for by in WAYS:
        assert sum(tokens for _, _, tokens in _found(store, UsageFilter(), by).values()) == 5


def test_latencies_are_those_of_the_segments_by_any_grain(store: Store) -> None:
    for number in range(100):
        key = {"session": f"{number:016x}", "segment": segment_number(_at(number))}
        store.apply([samples.opened(**key, at=_at(number)), samples.progress(**key, first_token_ms=2.0 * number)])
    with store.engine.connect() as connection:
        found = totals.latencies(connection, now=NOW)[None][totals.Measure.FIRST_TOKEN]
        parts = [totals.latencies(connection, now=NOW, grain=grain) for grain in (Grain.HOUR, Grain.DAY, Grain.MONTH)]
        within = totals.latencies(connection, now=NOW, period=UsageFilter(since=_at(10.5), until=_at(60.5)))[None]
    for by_time in parts:
        assert totals.Distribution.total(each[totals.Measure.FIRST_TOKEN] for each in by_time.values()) == found
    assert found.count == 100
    assert within[totals.Measure.FIRST_TOKEN].count == 51, "of whole hours"
    assert found.quantile(0.5) == pytest.approx(2 * 49, rel=0.05)
    assert found.quantile(0.95) == pytest.approx(2 * 94, rel=0.05)


def test_two_edges_that_write_one_session_at_a_time_count_it_once(
    database_url: str,
) -> None:
    writers = [open_store(database_url) for _ in range(4)]
    keys = [{"session": f"{number:016x}", "segment": segment_number(_at(number))} for number in range(40)]
    records = [
        record
        for key in keys
        for record in (samples.opened(**key), *(samples.progress(**key, tokens=tokens) for tokens in (5, 9, 20)))
    ]

    def write(place: int) -> None:
        own = records.copy()
        random.Random(place).shuffle(own)
        for start in range(0, len(own), 20):
            _apply(writers[place], own[start : start + 20])

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(len(writers))))
    assert _found(writers[0], UsageFilter(), "whole") == {(): (40, 40, 800)}
    assert sum(tokens for _, _, tokens in _found(writers[0], UsageFilter(), "device").values()) == 800
    for writer in writers:
        writer.close()

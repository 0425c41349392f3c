import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import func, select

from fleet_edge.store import housekeeping, rolling, totals
from fleet_edge.store.database import Store
from fleet_edge.store.models import DeviceRollupRow, FleetRollupRow, RollupRow
from fleet_edge.store.periods import DAY, Grain, Marks, cover, floor, following
from fleet_edge.store.records import segment_number
from fleet_edge.store.rolling import roll_up
from fleet_edge.store.totals import Grouping, UsageFilter
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.samples import START

BEGIN = datetime(2025, 11, 20, 7, 30, tzinfo=UTC)
SPAN = timedelta(days=100)


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
    progress = samples.progress(**key, tokens=stay.tokens, at=stay.at + timedelta(seconds=2))
    store.apply([opened, progress])


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


def _expected(stays: list[Stay], period: UsageFilter, by: Grouping | None) -> dict[str, tuple[int, int, int]]:
    sums: dict[str, tuple[int, int, int]] = {}
    for stay in stays:
        if (period.since and stay.at < period.since) or (period.until and stay.at >= period.until):
            continue
        name = {
            None: "all",
            Grouping.DEVICE: stay.device,
            Grouping.EDGE: stay.edge,
            Grouping.APP: f"{stay.device} {stay.app or '-'}",
            Grouping.DRAFT: f"{stay.draft_model} Q4_0",
            Grouping.HOUR: f"{stay.at:%Y-%m-%d %H:00}",
            Grouping.DAY: f"{stay.at:%Y-%m-%d}",
            Grouping.MONTH: f"{stay.at:%Y-%m}-01",
        }[by]
        earlier = [
            other
            for other in stays
            if (other.session, other.at < stay.at) == (stay.session, True)
            if by is not Grouping.EDGE or other.edge == stay.edge
        ]
        sessions, segments, tokens = sums.get(name, (0, 0, 0))
        sums[name] = (sessions + (not earlier), segments + 1, tokens + stay.tokens)
    return sums or ({"all": (0, 0, 0)} if by is None else {})


def _found(store: Store, period: UsageFilter, by: Grouping | None) -> dict[str, tuple[int, int, int]]:
    with store.engine.connect() as connection:
        found = totals.stats(connection, period=period, by=by)
    return {name: (tally.sessions, tally.segments, tally.tokens) for name, tally in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_totals_are_what_was_written_at_any_time(store: Store, seed: int) -> None:
    chance = random.Random(seed)
    now = BEGIN
    stays: list[Stay] = []
    purged_until = BEGIN  # periods begin and end with a month before this
    while now < BEGIN + SPAN:
        now += chance.choice([timedelta(hours=1), timedelta(days=1), timedelta(days=9)])
        for _ in range(chance.randrange(1, 6)):
            new = [stay for stay in _stays(chance, session=len(stays), before=now) if stay.at > purged_until]
            chance.shuffle(new)  # what an edge has spooled comes late
            for stay in new:
                _write(store, stay)
            stays += new
        if chance.random() < 0.7:
            roll_up(store.engine, now=now)
        if chance.random() < 0.2:
            roll_up(store.engine, now=now)
            housekeeping.purge_rollups(
                store.engine,
                hours_before=floor(Grain.DAY, now - 10 * DAY),
                days_before=floor(Grain.MONTH, now - 60 * DAY),
                chunk=50,
            )
            housekeeping.purge_sessions(store.engine, before=floor(Grain.DAY, now - 30 * DAY), chunk=50)
            purged_until = max(purged_until, following(Grain.MONTH, floor(Grain.MONTH, now - 30 * DAY)))
        since = now - chance.random() * (now - BEGIN)
        until = chance.choice([None, since + chance.random() * (now - since)])
        if since < purged_until:
            since, until = floor(Grain.MONTH, since), None
        for period in (UsageFilter(), UsageFilter(since=since), UsageFilter(since=since, until=until)):
            for by in (None, *set(Grouping) - {Grouping.HOUR, Grouping.DAY}):
                assert _found(store, period, by) == _expected(stays, period, by), (now, period, by)
    for grouping, age in ((Grouping.HOUR, 9 * DAY), (Grouping.DAY, 50 * DAY)):
        period = UsageFilter(since=max(floor(Grain.DAY, now - age), floor(Grain.MONTH, BEGIN)))
        assert _found(store, period, grouping) == _expected(stays, period, grouping)
    _check_minutes(store, [stay for stay in stays if stay.at >= now - 9 * DAY], since=now - 9 * DAY)


def _check_minutes(store: Store, stays: list[Stay], *, since: datetime) -> None:
    for grain in (Grain.MINUTE, Grain.FIVE_MINUTES):
        with store.engine.connect() as connection:
            views = totals.usage(connection, period=UsageFilter(since=since), grain=grain)
        expected = Counter[datetime | None]()
        for stay in stays:
            expected[floor(grain, stay.at)] += stay.tokens
        assert {view.start: view.counted.tokens for view in views} == expected
    for grain in (Grain.MINUTE, Grain.HOUR, Grain.DAY):
        with store.engine.connect() as connection:
            found = totals.active(connection, since=since, grain=grain)
        devices: dict[datetime, set[str]] = {}
        for stay in stays:
            devices.setdefault(floor(grain, stay.at), set()).add(stay.device)
        assert found == {start: len(names) for start, names in devices.items()}


def test_minutes_become_hours_where_segments_are_purged(store: Store) -> None:
    for number, hours in enumerate((0.1, 0.2, 30.1)):
        _write(store, Stay(number, _at(hours), "a", "north", None, "small", 10))
    assert _beginning(store) == _at(0.1)
    roll_up(store.engine, now=_at(80))
    assert _beginning(store) == _at(0.1)
    housekeeping.purge_sessions(store.engine, before=floor(Grain.DAY, _at(30)), chunk=10)
    with store.engine.connect() as connection:
        found = totals.usage(connection, grain=Grain.MINUTE)
        latencies = totals.latencies(connection, grain=Grain.MINUTE)
    assert {view.start: view.counted.tokens for view in found} == {_at(0): 20, _at(30.1): 10}
    assert {start: own[totals.Measure.QUEUE].count for start, own in latencies.items()} == {_at(0): 2, _at(30.1): 1}
    assert _beginning(store) == floor(Grain.DAY, _at(0))


def _beginning(store: Store) -> datetime | None:
    with store.engine.connect() as connection:
        return totals.beginning(connection)


def _at(hours: float) -> datetime:
    return START.replace(minute=0) + timedelta(hours=hours)


def _stay(hours: float, *, session: int = 1, tokens: int = 5) -> Stay:
    return Stay(session, _at(hours), "a", "north", None, "small", tokens)


def _rolled(store: Store, grain: Grain) -> dict[str, int]:
    """Return the tokens of each device; sums over devices are stored next to them."""
    query = select(RollupRow.device, func.sum(RollupRow.__table__.c.tokens)).where(RollupRow.grain == grain)
    with store.engine.connect() as connection:
        found = {name: int(tokens) for name, tokens in connection.execute(query.group_by(RollupRow.device))}
        for row in (FleetRollupRow, DeviceRollupRow):
            all_tokens = select(func.sum(row.__table__.c.tokens)).where(row.grain == grain)
            assert int(connection.scalar(all_tokens) or 0) == sum(found.values())
    return found


def test_a_session_whose_beginning_comes_late_is_counted_once_and_in_its_own_time(store: Store) -> None:
    later, first = _stay(5), _stay(1)
    _write(store, later)
    roll_up(store.engine, now=_at(6))
    _write(store, first)
    for _ in range(2):
        roll_up(store.engine, now=_at(6))
    assert _found(store, UsageFilter(), None) == {"all": (1, 2, 10)}
    assert _found(store, UsageFilter(since=_at(4)), None) == {"all": (0, 1, 5)}


def test_an_hour_that_is_written_while_it_is_made_is_made_anew(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(store, _stay(0))
    rows = rolling._rows

    def written_meanwhile(*arguments: Any) -> list[dict[str, Any]]:
        found = rows(*arguments)
        monkeypatch.undo()
        _write(store, _stay(0.5, session=2))
        return found

    monkeypatch.setattr(rolling, "_rows", written_meanwhile)
    assert roll_up(store.engine, now=_at(1)) == 1
    assert _rolled(store, Grain.HOUR) == {"a": 10}
    with store.engine.connect() as connection:
        assert Marks.read(connection).stale == []


def test_an_hour_that_is_always_written_is_left_for_later(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(store, _stay(0))
    rows, sessions = rolling._rows, itertools.count(2)

    def written_meanwhile(*arguments: Any) -> list[dict[str, Any]]:
        found = rows(*arguments)
        _write(store, _stay(0.5, session=next(sessions), tokens=1))
        return found

    monkeypatch.setattr(rolling, "_rows", written_meanwhile)
    assert roll_up(store.engine, now=_at(1)) == 0
    assert _rolled(store, Grain.HOUR) == {}
    assert _found(store, UsageFilter(), None) == {"all": (4, 4, 8)}


def test_what_comes_after_its_day_was_made_is_in_the_day_and_the_month(store: Store) -> None:
    now = _at(24 * 60)
    _write(store, _stay(0))
    roll_up(store.engine, now=now)
    assert _rolled(store, Grain.DAY) == _rolled(store, Grain.MONTH) == {"a": 5}
    _write(store, _stay(1, session=2, tokens=7))
    roll_up(store.engine, now=now)
    assert _rolled(store, Grain.DAY) == _rolled(store, Grain.MONTH) == {"a": 12}


def test_late_records_count_in_what_is_still_kept(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    now = _at(24 * 60)
    _write(store, _stay(0))
    roll_up(store.engine, now=now)
    housekeeping.purge_rollups(
        store.engine, hours_before=floor(Grain.DAY, now), days_before=floor(Grain.MONTH, START), chunk=10
    )
    _write(store, _stay(1, session=2, tokens=7))
    roll_up(store.engine, now=now)
    assert _rolled(store, Grain.DAY) == _rolled(store, Grain.MONTH) == {"a": 12}
    housekeeping.purge_sessions(store.engine, before=floor(Grain.DAY, now), chunk=10)
    _write(store, _stay(2, session=3, tokens=9))
    roll_up(store.engine, now=now)
    assert _rolled(store, Grain.MONTH) == {"a": 12}
    assert "came so late that they are in no total" in caplog.text
    assert _found(store, UsageFilter(), None) == {"all": (2, 2, 12)}


def test_days_are_not_purged_before_their_month_is_made(store: Store) -> None:
    _write(store, _stay(0))
    roll_up(store.engine, now=_at(48))
    late = _at(24 * 400)
    housekeeping.purge_rollups(store.engine, hours_before=late, days_before=late, chunk=10)
    assert (_rolled(store, Grain.HOUR), _rolled(store, Grain.DAY)) == ({}, {"a": 5})


def test_a_long_time_is_few_pieces(store: Store) -> None:
    for hours in (0, 30, 24 * 40, 24 * 200):
        _write(store, _stay(hours, session=int(hours) + 1))
    roll_up(store.engine, now=_at(24 * 201))
    with store.engine.connect() as connection:
        pieces = cover(Marks.read(connection), since=None, until=None)
    assert [piece.grain for piece in pieces] == [Grain.MONTH, Grain.DAY, Grain.HOUR]


def test_latencies_are_those_of_the_rounds_rolled_up_or_not(store: Store) -> None:
    for number in range(100):
        key = {"session": f"{number:016x}", "segment": segment_number(_at(number))}
        store.apply([samples.opened(**key, at=_at(number)), samples.progress(**key, rounds=2, queue_ms=4.0 * number)])
        if number == 72:
            roll_up(store.engine, now=_at(72))
    with store.engine.connect() as connection:
        found = totals.latencies(connection)[None][totals.Measure.QUEUE]
    assert found.count == 100
    assert found.quantile(0.5) == pytest.approx(2 * 49, rel=0.05)
    assert found.quantile(0.95) == pytest.approx(2 * 94, rel=0.05)

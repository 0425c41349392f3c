import logging
import threading
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import pytest
from apscheduler.schedulers import base as apscheduler

from fleet_edge import jobs as edge_jobs
from fleet_edge.jobs import EdgeJobs, JobSettings
from fleet_edge.session_log.database import Store
from fleet_edge.session_log.records import segment_number
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.rows import all_rows
from tests.fleet_edge.store.samples import after
from tests.support.waiting import PATIENCE_S


def _nothing() -> None:
    pass


def _jobs(store: Store, **changes: object) -> EdgeJobs:
    given = {"expire_leases": _nothing, "flush_progress": _nothing, "flush_log": _nothing}
    given |= {"evaluate_alerts": _nothing}
    arguments = {**given, "apply_quarantines": lambda _quarantines: None, "now": lambda: after(0), **changes}
    return EdgeJobs(store, **arguments)  # type: ignore[arg-type]


def test_each_chore_can_be_done_on_an_empty_store(store: Store) -> None:
    jobs = _jobs(store)
    assert set(jobs.names) == {
        "expire-leases",
        "flush-progress",
        "flush-log",
        "read-quarantines",
        "evaluate-alerts",
        "close-abandoned",
        "purge",
        "give-back-memory",
        "watch-clock",
    }
    assert all(jobs.run(name) for name in jobs.names)


def test_chores_go_by_the_clock_and_the_ages_they_are_given(store: Store) -> None:
    old = {"session": "aa" * 8, "segment": segment_number(after(-40 * 86400))}
    store.apply(
        [
            samples.device_seen(at=after(-3600)),
            samples.opened(**old, at=after(-40 * 86400)),
            samples.opened(),
            samples.judged(at=after(-86400)),
            samples.event(at=after(-40 * 86400)),
        ]
    )
    settings = JobSettings(rounds_days=23 / 24, sessions_days=30)
    jobs = _jobs(store, settings=settings, now=lambda: after(3601))
    assert all(jobs.run(name) for name in jobs.names)
    rows = all_rows(store)
    assert [row["session"] for row in rows["sessions"]] == [samples.SESSION]
    assert (rows["rounds"], rows["events"]) == ([], [])
    assert {(row["grain"], row["device"], row["start"]) for row in rows["rollups"]} == {
        ("hour", "", samples.START.replace(minute=0)),
        ("day", "", samples.START.replace(hour=0, minute=0)),
        ("day", "sensor-1", samples.START.replace(hour=0, minute=0)),
        ("hour", "", datetime(2026, 1, 23, 10, tzinfo=UTC)),
        ("day", "", datetime(2026, 1, 23, tzinfo=UTC)),
        ("day", "sensor-1", datetime(2026, 1, 23, tzinfo=UTC)),
    }, "totals stay when their sessions go"
    settings = JobSettings(rounds_days=23 / 24, sessions_days=30, totals_days=39)
    assert _jobs(store, settings=settings, now=lambda: after(3601)).run("purge")
    assert {row["start"].date() for row in all_rows(store)["rollups"]} == {samples.START.date()}


def test_a_chore_that_fails_is_logged_and_leaves_the_others_be(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise KeyError("a bug")

    jobs = _jobs(store, expire_leases=broken)
    assert not jobs.run("expire-leases")
    assert jobs.run("flush-progress")
    assert "expire-leases" in caplog.text
    assert "Traceback" in caplog.text


def test_an_absent_database_costs_one_sentence(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.apply([samples.opened()])
    with store.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE rounds")
    jobs = _jobs(store)
    assert not jobs.run("purge")
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "purge" in record.getMessage()
    assert record.exc_info is None
    assert "\n" not in record.getMessage()


def test_the_scheduler_does_chores_by_itself_even_after_one_failed(store: Store) -> None:
    again = threading.Event()
    failures: list[int] = []

    def fail_once_then_tell() -> None:
        failures.append(1)
        if len(failures) > 1:
            again.set()
        raise ValueError("always")

    settings = JobSettings(lease_every_s=0.01, progress_every_s=0.01)
    jobs = _jobs(store, expire_leases=fail_once_then_tell, settings=settings)
    jobs.start()
    assert again.wait(PATIENCE_S)
    jobs.stop()
    jobs.stop()  # again: nothing to do


def test_stopping_waits_for_the_chore_under_way(store: Store) -> None:
    entered, stopped = threading.Event(), threading.Event()
    left_behind: list[bool] = []

    def slow() -> None:
        entered.set()
        jobs._stopping.wait(PATIENCE_S)
        left_behind.append(stopped.wait(0.2))  # long enough for a stop that does not wait to return

    jobs = _jobs(store, expire_leases=slow, settings=JobSettings(lease_every_s=0.01))
    jobs.start()
    assert entered.wait(PATIENCE_S)
    jobs.stop()
    stopped.set()
    assert left_behind == [False]


def test_a_job_that_is_set_again_while_the_edge_stops_does_not_hang_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge_jobs, "EVERY_S", 0.01)
    ran, set_again, stopped = threading.Event(), threading.Event(), threading.Event()
    jobs = _jobs(store, evaluate_alerts=ran.set)
    add_job = jobs._scheduler.add_job

    def add_late(*arguments: object, **more: object) -> None:
        if ran.is_set():
            set_again.set()
            stopped.wait(0.2)  # long enough for the scheduler to begin its end
        add_job(*arguments, **more)

    monkeypatch.setattr(jobs._scheduler, "add_job", add_late)
    jobs.start()
    assert set_again.wait(PATIENCE_S)
    stopping = threading.Thread(target=jobs.stop, daemon=True)
    stopping.start()
    stopping.join(PATIENCE_S)
    assert not stopping.is_alive()


def test_stopping_does_not_wait_for_a_long_purge(store: Store) -> None:
    for number in range(5):
        key = {"session": f"{number:016x}", "segment": segment_number(after(-400 * 86400 + number))}
        store.apply([samples.opened(**key, at=after(-400 * 86400 + number))])
    store.apply([samples.edge_load(at=after(-400 * 86400 + 86400 * day)) for day in range(401)])
    jobs = _jobs(store, settings=JobSettings(purge_chunk=1))
    jobs.stop()  # while it purges, say: it looks between two chunks
    assert jobs.run("purge")
    assert len(all_rows(store)["sessions"]) == 4
    assert _jobs(store, settings=JobSettings(purge_chunk=1)).run("purge")
    assert all_rows(store)["sessions"] == []


def test_an_absent_database_is_reported_once_per_outage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(f"sqlite:///{tmp_path / 'mounted' / 'fleet.sqlite3'}")
    jobs = _jobs(store)
    for _ in range(5):
        assert not jobs.run("read-quarantines")
        assert jobs.run("flush-log")
    assert len(caplog.records) == 1
    (tmp_path / "mounted").mkdir()
    store.open()
    assert all(jobs.run(name) for name in jobs.names)
    store.close()
    assert not jobs.run("read-quarantines")
    assert len(caplog.records) == 2


def test_what_a_job_deletes_closes_or_cannot_do_is_told(store: Store) -> None:
    told: list[str] = []
    old = {"session": "bb" * 8, "segment": segment_number(after(-400 * 86400))}
    store.apply([samples.opened(**old, at=after(-400 * 86400)), samples.opened(), samples.edge_load(at=after(86340))])

    def fail() -> None:
        raise ValueError("planted")

    jobs = _jobs(store, now=lambda: after(86400), flush_log=fail, tell=lambda _kind, code, *_, **__: told.append(code))
    assert jobs.run("close-abandoned")
    assert jobs.run("purge")
    assert not jobs.run("flush-log")
    assert told == ["abandoned", "purged", "job-failed"]
    ends = {row["end_code"] for row in all_rows(store)["sessions"]}
    assert ends == {"abandoned"}


@pytest.mark.parametrize("step", [timedelta(hours=1), timedelta(hours=-1), timedelta(days=365), timedelta(days=-365)])
def test_a_step_of_the_wall_clock_neither_stops_nor_repeats_a_job(
    store: Store, step: timedelta, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stepped(datetime):
        by = timedelta()

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + cls.by

    for module in (apscheduler, edge_jobs):
        monkeypatch.setattr(module, "datetime", Stepped)
    monkeypatch.setattr(edge_jobs, "EVERY_S", 0.02)
    monkeypatch.setattr(edge_jobs, "_CLOCK_EVERY_S", 0.02)
    purges, steps, often = list[int](), threading.Semaphore(0), ("expire_leases", "flush_progress", "evaluate_alerts")
    monkeypatch.setattr(EdgeJobs, "_purge", lambda _self: purges.append(1))
    runs = {name: threading.Semaphore(0) for name in often}
    jobs = _jobs(
        store,
        **{name: run.release for name, run in runs.items()},
        tell=lambda _kind, code, *_, **__: steps.release() if code == "clock-stepped" else None,
        settings=JobSettings(lease_every_s=0.02, progress_every_s=0.02),
        now=lambda: Stepped.now(UTC),
    )
    jobs.start()
    for by in (step, timedelta()):  # there and back
        for run in runs.values():
            assert run.acquire(timeout=PATIENCE_S)
        Stepped.by = by
        assert steps.acquire(timeout=PATIENCE_S)
        for name, run in runs.items():
            while run.acquire(blocking=False):
                pass
            for _ in range(5):
                assert run.acquire(timeout=PATIENCE_S), name
    jobs.stop()
    assert len(purges) <= 2  # at once after a step forward, otherwise in an hour


DAY_S = 86_400


def _year(store: Store, until_day: int = 0) -> list[str]:
    """Store a session and an edge's load for each day of the year before a day; return the sessions."""
    records = []
    for day in range(until_day - 364, until_day + 1):
        at = after(day * DAY_S)
        key = {"session": f"{day + 10_000:016x}", "segment": segment_number(at)}
        records += [samples.opened(**key, at=at), samples.closed(**key, at=at), samples.edge_load(at=at)]
    store.apply(records)
    return _sessions(store)


def _sessions(store: Store) -> list[str]:
    return [row["session"] for row in all_rows(store)["sessions"]]


@pytest.mark.parametrize("days", [-400, -3, 3, 400, 4000])
def test_a_wrong_clock_purges_no_session(store: Store, days: int) -> None:
    kept, told = _year(store), list[str]()
    at = after(days * DAY_S + 3600)
    # What an edge records by the wrong clock before it purges.
    store.apply([samples.edge_load(edge="edge-2", at=at), samples.edge_seen(edge="edge-2", at=at)])
    key = {"session": "ab" * 8, "segment": segment_number(at)}
    store.apply([samples.opened(**key, edge="edge-2", at=at)])
    jobs = _jobs(store, now=lambda: at, tell=lambda _kind, code, *_, **__: told.append(code))
    for _ in range(2):
        assert jobs.run("purge")
    assert set(_sessions(store)) == {*kept, "ab" * 8}
    assert told == ["clock-in-doubt"]


def test_after_a_step_forward_open_sessions_are_not_abandoned(store: Store) -> None:
    store.apply([samples.opened(), samples.edge_load(at=after(0))])
    jobs = _jobs(store, now=lambda: after(7 * 3600))
    assert jobs.run("close-abandoned")
    assert [row["reason"] for row in all_rows(store)["sessions"]] == [None]
    store.apply([samples.edge_load(at=after(7 * 3600 - 60))])
    assert jobs.run("close-abandoned")
    assert [row["reason"] for row in all_rows(store)["sessions"]] == ["lost"]


def test_a_fleet_that_was_off_for_months_is_purged_after_a_month(store: Store) -> None:
    kept, told = _year(store), list[str]()
    jobs = {
        day: _jobs(store, now=lambda day=day: after(day * DAY_S), tell=lambda _kind, code, *_, **__: told.append(code))
        for day in (100, 129, 131)
    }
    store.apply([samples.edge_load(at=after(100 * DAY_S))])
    assert jobs[100].run("purge")
    assert told == ["clock-in-doubt"]
    store.apply([samples.edge_load(at=after(day * DAY_S)) for day in range(101, 130)])
    assert jobs[129].run("purge")
    assert len(_sessions(store)) == len(kept) - 28, "the days after the gap have passed"
    store.apply([samples.edge_load(at=after(day * DAY_S)) for day in range(130, 132)])
    assert jobs[131].run("purge")
    assert len(_sessions(store)) == len(kept) - 130
    assert told == ["clock-in-doubt", "clock-in-doubt", "purged", "purged"]


def test_an_edge_that_rests_at_weekends_keeps_sessions_a_few_days_longer(store: Store) -> None:
    kept = _year(store)
    with store.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM edge_loads WHERE minute / 1440 % 7 >= 5")
    assert _jobs(store, now=lambda: after(30 * DAY_S), settings=JobSettings(sessions_days=300)).run("purge")
    assert 250 < len(_sessions(store)) < len(kept) - 60

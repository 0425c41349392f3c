import itertools
from dataclasses import replace

import pytest

from fleet_edge.jobs import EdgeJobs, JobSettings
from fleet_edge.session_log import housekeeping
from fleet_edge.session_log.database import Store
from fleet_edge.session_log.log import SessionLog
from fleet_edge.session_log.records import Record
from tests.fleet_edge.store import samples
from tests.fleet_edge.store.rows import all_rows, clear
from tests.fleet_edge.store.samples import COUNTERS, OTHER, SESSION, START, after

ALONE = replace(COUNTERS, unverified=25, wall_ms=2000.0)


def test_a_text_of_which_no_edge_knew_is_a_session_and_is_one_however_often_it_is_told(
    store: Store, log: SessionLog
) -> None:
    own = {"session": OTHER, "counters": ALONE, "app": "meter"}
    told = samples.reported(**own, at=after(10))
    for batch in ([told], [told, told], [samples.reported(**own, at=after(11))]):
        store.apply(batch)
    (session,) = all_rows(store)["sessions"]
    assert (session["session"], session["device_unverified"], session["reason"]) == (OTHER, 25, "stop")
    assert (session["opened_at"], session["tokens"]) == (after(8), 20)
    (view,) = log.sessions()
    assert (view.device_unverified, view.counted.tokens, view.edge, view.app) == (25, 0, None, "meter")


def test_a_text_that_lost_its_edge_is_the_session_that_it_was_in_any_order(store: Store) -> None:
    records: list[Record] = [
        samples.opened(),
        samples.progress(),
        samples.closed(counters=None, at=after(20)),
        samples.reported(session=SESSION, counters=ALONE, at=after(15)),
    ]
    seen = []
    for order in itertools.permutations(records):
        for record in order:
            store.apply([record])
        seen.append(all_rows(store)["sessions"])
        clear(store)
    assert all(rows == seen[0] for rows in seen)
    (session,) = seen[0]
    assert (session["device_unverified"], session["opened_at"], session["target"]) == (25, START, "SmolLM2")


def test_an_unknown_close_with_unverified_tokens_is_kept_as_long_as_a_session(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device may invent 30 a minute."""
    monkeypatch.setattr(housekeeping, "database_now", lambda _connection: None)  # the test has a time of its own
    day = 86_400.0
    for number in range(20):
        at = after(-4 * day * number)
        record = samples.reported(session=f"{number:016x}", counters=ALONE, app="meter", at=at)
        store.apply([record])
        if number % 2:
            store.apply([record])  # the device repeats what is not confirmed
    jobs = EdgeJobs(
        store,
        expire_leases=lambda: None,
        flush_progress=lambda: None,
        flush_log=lambda: None,
        apply_quarantines=lambda _quarantines: None,
        evaluate_alerts=lambda: None,
        now=lambda: after(day),
        settings=JobSettings(sessions_days=30),
    )
    assert jobs.run("purge")
    rows = all_rows(store)
    assert [row["session"] for row in rows["sessions"]] == [f"{number:016x}" for number in range(8)]
    assert rows["reported_closes"] == rows["rounds"] == rows["segments"] == rows["rollups"] == rows["events"] == []

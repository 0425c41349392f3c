from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fleet_admin.advice import Given, PlanningError, find_drafts
from fleet_edge.session_log.database import open_store
from fleet_edge.session_log.records import segment_number
from tests.fleet_edge.store import samples


def log_of(folder: Path, *, sessions: int, ago: timedelta, edge_only: int = 0) -> str:
    """Return the URL of a log of sessions, each of 20 tested tokens, 15 accepted, 50 drafted in 600 ms."""
    url = f"sqlite:///{folder / 'fleet.sqlite3'}"
    at = datetime.now(UTC) - ago
    with open_store(url) as store:
        for number in range(sessions):
            of = {"session": f"{number:016x}", "segment": segment_number(at + timedelta(seconds=number))}
            end = at + timedelta(seconds=number + 5)
            store.apply(
                [
                    samples.opened(**of, at=at + timedelta(seconds=number)),
                    samples.progress(**of, edge_only=edge_only, at=end),
                    samples.closed(**of, at=end),
                ]
            )
    return url


def test_what_is_given_needs_no_log(tmp_path: Path) -> None:
    drafts = find_drafts(Given(12.0, 0.8, 35.0), db=f"sqlite:///{tmp_path / 'none'}")
    assert (drafts.draft_ms, drafts.acceptance, drafts.round_trip_ms) == (12.0, 0.8, 35.0)
    assert set(drafts.sources.values()) == {"as given"}


def test_the_last_week_of_the_log_tells_what_was_not_given(tmp_path: Path) -> None:
    url = log_of(tmp_path, sessions=6, ago=timedelta(days=2))
    drafts = find_drafts(Given(), db=url)
    assert drafts.acceptance == pytest.approx(15 / 20)
    assert drafts.draft_ms == pytest.approx(600 / 50)
    # A device waited 900 ms, of which the edge used 210, in ten rounds.
    assert drafts.round_trip_ms == pytest.approx((900 - 210) / 10)
    assert "6 sessions" in drafts.sources["acceptance"]
    mixed = find_drafts(Given(draft_ms=5.0), db=url)
    assert (mixed.draft_ms, mixed.sources["draft_ms"]) == (5.0, "as given")


def test_a_log_of_sessions_that_the_edge_has_written_tells_no_round_trip(tmp_path: Path) -> None:
    url = log_of(tmp_path, sessions=6, ago=timedelta(days=2), edge_only=15)
    drafts = find_drafts(Given(), db=url)
    assert drafts.round_trip_ms == 20.0
    assert "assumed" in drafts.sources["round_trip_ms"]


@pytest.mark.parametrize(("sessions", "ago"), [(6, timedelta(days=9)), (2, timedelta(days=1))])
def test_a_log_that_is_old_or_says_little_is_one_sentence(tmp_path: Path, sessions: int, ago: timedelta) -> None:
    url = log_of(tmp_path, sessions=sessions, ago=ago)
    with pytest.raises(PlanningError, match="--draft-ms") as failed:
        find_drafts(Given(), db=url)
    assert "\n" not in str(failed.value)

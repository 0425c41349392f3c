import pytest

from fleet_device.pacing.contract import RoundTrips
from fleet_device.requests.generate import Generation
from fleet_device.service import DeviceTotals
from fleet_device.session.states import SessionCounters
from schemas.reasons import EndReason


def text(round_trips: RoundTrips, *, wait_ms: float = 0.0) -> Generation:
    counters = SessionCounters(drafted=8, tested=8, accepted=6, rounds=4, draft_ms=80.0, wait_ms=wait_ms)
    return Generation(
        session=bytes(8), tokens=(1,) * 10, reason=EndReason.LENGTH, counters=counters, closed=None, wall_ms=1.0,
        first_ms=None, resumes=0, drafts=4, round_trips=round_trips,
    )  # fmt: skip


def test_totals_add_up_over_texts() -> None:
    totals = DeviceTotals()
    totals.add(text(RoundTrips()))
    told = totals.add(text(RoundTrips()))
    assert (told.sessions, told.tokens, told.acceptance, told.mean_draft) == (2, 20, 0.75, 2.0)
    assert told.draft_ms_per_token == 10.0


def test_the_round_trip_is_smoothed_over_drafts_and_not_over_texts() -> None:
    totals = DeviceTotals()
    totals.add(text(RoundTrips(count=64, total_ms=64 * 100.0)))
    after_one = totals.add(text(RoundTrips(count=1, total_ms=500.0))).round_trip_ms
    assert after_one is not None
    assert 100.0 < after_one < 120.0
    after_many = totals.add(text(RoundTrips(count=200, total_ms=200 * 500.0))).round_trip_ms
    assert after_many == pytest.approx(500.0, abs=2.0)


def test_a_text_without_verdicts_leaves_the_round_trip_as_it_was() -> None:
    totals = DeviceTotals()
    totals.add(text(RoundTrips(count=2, total_ms=100.0)))
    assert totals.add(text(RoundTrips())).round_trip_ms == 50.0

"""Token times: the first token, and the 95th percentile of the rest, beside what the same gaps say exactly."""

import random

import pytest

from fleet_edge.sessions.token_times import TokenTimes


def test_the_first_token_is_told_from_the_open_on_and_gaps_are_shared_by_those_that_come_together() -> None:
    times = TokenTimes()
    times.begin(committed=10, at=5.0)
    assert (times.first_token_ms, times.gap_p95_ms) == (None, None)
    times.grew(committed=13, at=5.5)
    assert (times.first_token_ms, times.gap_p95_ms) == (500.0, None)
    times.grew(committed=17, at=5.9)
    assert times.gap_p95_ms == pytest.approx(100.0, rel=0.05)
    times.grew(committed=17, at=9.0)  # nothing new
    assert times.gap_p95_ms == pytest.approx(100.0, rel=0.05)


def test_one_in_twenty_is_slower_than_the_percentile_within_a_twentieth() -> None:
    rng = random.Random(4)
    times, at, gaps, committed = TokenTimes(), 0.0, [], 0
    times.begin(committed=0, at=at)
    times.grew(committed=(committed := 1), at=at)
    for _ in range(2000):
        new, gap = rng.randint(1, 6), rng.lognormvariate(-3.0, 0.8)
        at += gap * new
        committed += new
        times.grew(committed=committed, at=at)
        gaps += [gap * 1e3] * new
    exact = sorted(gaps)[int(0.95 * len(gaps))]
    assert times.gap_p95_ms == pytest.approx(exact, rel=0.05)
    assert len(times._gaps) < 100


def test_tokens_at_one_instant_are_no_trouble() -> None:
    times = TokenTimes()
    times.begin(committed=0, at=0.0)
    for number in range(1, 4):
        times.grew(committed=number, at=0.0)
    assert times.first_token_ms == 0.0
    assert times.gap_p95_ms == pytest.approx(0.01, rel=0.05)

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_device.pacing.estimates import AcceptanceEstimate, Trend


def test_acceptance_begins_at_what_is_usual_and_moves_to_what_is_seen() -> None:
    acceptance = AcceptanceEstimate()
    assert acceptance.rate == pytest.approx(0.7)
    for _ in range(60):
        acceptance.add(tested=5, accepted=1)
    assert acceptance.rate == pytest.approx(0.2, abs=0.02)
    for _ in range(300):
        acceptance.add(tested=5, accepted=4)
    assert acceptance.rate == pytest.approx(0.8, abs=0.02)


def test_acceptance_stays_below_one_and_a_verdict_on_nothing_changes_nothing() -> None:
    acceptance = AcceptanceEstimate()
    acceptance.add(tested=0, accepted=0)
    assert acceptance.rate == pytest.approx(0.7)
    for _ in range(1000):
        acceptance.add(tested=16, accepted=16)
    assert 0.99 < acceptance.rate < 1.0


@pytest.mark.parametrize(("before", "after"), [(0.9, 0.4), (0.4, 0.9)])
def test_another_kind_of_text_is_noticed_within_a_text(before: float, after: float) -> None:
    rng, acceptance = random.Random(4), AcceptanceEstimate()
    for rate, tokens in ((before, 400), (after, 60)):
        for _ in range(tokens):
            acceptance.add(tested=1, accepted=rng.random() < rate)
    assert abs(acceptance.rate - after) < 0.15


def test_chance_is_no_other_kind_of_text() -> None:
    """Of what stays the same as much is remembered as before; seeds 0 to 19, whose worst is far within the bound."""
    for seed in range(20):
        rng, acceptance, far = random.Random(seed), AcceptanceEstimate(), 0
        for number in range(2000):
            acceptance.add(tested=1, accepted=rng.random() < 0.7)
            far += number > 200 and abs(acceptance.rate - 0.7) > 0.12
        assert far < 200


def test_slope_and_intercept_are_estimated_from_noisy_times() -> None:
    rng, trend = random.Random(3), Trend()
    for _ in range(400):
        tokens = rng.randint(0, 8)
        trend.add(0.1 + 0.004 * tokens + rng.uniform(-0.005, 0.005), tokens=tokens)
    assert trend.slope == pytest.approx(0.004, rel=0.25)
    assert trend.at(0) == pytest.approx(0.1, rel=0.05)


def test_drafts_that_hardly_vary_make_no_slope_of_noise() -> None:
    rng, trend = random.Random(4), Trend()
    for number in range(400):
        trend.add(0.1 + rng.uniform(-0.03, 0.03), tokens=5 if number % 16 == 0 else 4)
        assert trend.slope < 0.004
    same = Trend()
    for _ in range(9):
        same.add(rng.uniform(0.05, 0.15), tokens=4)
    assert same.slope == 0.0


def test_a_longer_draft_is_never_thought_to_be_answered_sooner() -> None:
    trend = Trend()
    for tokens in range(8):
        trend.add(1.0 - 0.1 * tokens, tokens=tokens)
    assert trend.slope == 0.0


@given(st.lists(st.tuples(st.floats(0.001, 1.0), st.integers(0, 9)), min_size=1, max_size=20), st.floats(0.0, 2.0))
def test_whatever_a_step_is_said_to_take_without_a_draft_no_time_is_negative(
    measured: list[tuple[float, int]], said: float
) -> None:
    trend = Trend()
    for seconds, tokens in measured:
        trend.add(seconds, tokens=tokens)
    for start, slope in (trend.from_start(said), trend.with_slope(said)):
        assert start >= 0.0
        assert slope >= 0.0


def test_drafts_of_like_length_leave_open_what_their_tokens_take() -> None:
    alike, unlike = Trend(), Trend()
    for number in range(64):
        alike.add(0.025, tokens=4)
        unlike.add(0.021 + 0.001 * (number % 9), tokens=number % 9)
    assert alike.from_start(0.015) == pytest.approx((0.015, 0.0025))
    assert alike.from_start(0.001)[0] == pytest.approx(0.005)  # a token takes no more than the text's own
    assert alike.from_start(9.0)[0] == pytest.approx(0.025)
    assert unlike.from_start(0.015)[0] > 0.018  # here it is known
    assert alike.with_slope(0.002) == pytest.approx((0.017, 0.002))
    assert alike.with_slope(1.0) == pytest.approx((0.005, 0.005))


def test_what_others_have_found_counts_until_there_is_more_of_its_own() -> None:
    acceptance = AcceptanceEstimate()
    acceptance.note_reported(0.95)
    acceptance.add(tested=10, accepted=5)
    assert 0.7 < acceptance.rate < 0.9
    alone = AcceptanceEstimate()
    alone.add(tested=10, accepted=5)
    assert alone.rate < 0.6
    for _ in range(40):
        acceptance.add(tested=10, accepted=5)
    assert acceptance.rate == pytest.approx(0.5, abs=0.02)


def test_one_outlier_hardly_moves_an_estimate_and_a_lasting_change_does() -> None:
    trend = Trend()
    for _ in range(20):
        trend.add(0.05)
    trend.add(30.0)
    assert trend.at(0) == pytest.approx(0.05)
    trend.add(0.05)
    for _ in range(60):
        trend.add(0.4)
    assert trend.at(0) == pytest.approx(0.4, rel=0.15)


@given(
    st.lists(
        st.tuples(st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 1e6), st.integers(0, 64)), max_size=60
    )
)
def test_impossible_measurements_leave_finite_estimates(measured: list[tuple[float, int]]) -> None:
    trend = Trend()
    for seconds, tokens in measured:
        trend.add(seconds, tokens=tokens)
    for tokens in (0, 1, 16):
        assert math.isfinite(trend.at(tokens))
        assert trend.at(tokens) >= -1e-9 * max(1.0, trend.at(16))
    assert trend.slope >= 0.0


def test_what_is_common_to_devices_is_what_all_have_found() -> None:
    """However lucky one of them is: who alone drafts, or alone does not, slows down all."""
    lucky, poor = AcceptanceEstimate(), AcceptanceEstimate()
    assert lucky.common == lucky.rate  # nobody has said anything
    for each, accepted in ((lucky, 7), (poor, 5)):
        each.note_reported(0.75)
        for _ in range(16):
            each.add(tested=8, accepted=accepted)
    assert poor.rate < lucky.rate - 0.1
    assert poor.common == lucky.common == 0.75


@pytest.mark.parametrize(("told", "accepted"), [(0.7, 8), (0.7, 3)])
def test_a_device_whose_texts_are_quite_others_goes_by_its_own(told: float, accepted: int) -> None:
    own = AcceptanceEstimate()
    own.note_reported(told)
    for _ in range(50):
        own.add(tested=8, accepted=accepted)
    assert own.common == own.rate != told

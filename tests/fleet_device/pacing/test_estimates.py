import math
import random
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, strategies as st

from fleet_device.pacing.contract import Plan, SharedSteps
from fleet_device.pacing.estimates import AcceptanceEstimate, Conditions, Trend


def test_acceptance_begins_at_what_is_usual_and_moves_to_what_is_seen() -> None:
    acceptance = AcceptanceEstimate()
    assert acceptance.rate == pytest.approx(0.7)
    for _ in range(60):
        acceptance.add(tested=5, accepted=1)
    assert acceptance.rate == pytest.approx(0.2, abs=0.02)
    for _ in range(300):
        acceptance.add(tested=5, accepted=4)
    assert acceptance.rate == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(("before", "after"), [(0.9, 0.4), (0.4, 0.9)])
def test_another_kind_of_text_is_noticed_within_a_text(before: float, after: float) -> None:
    rng, acceptance = random.Random(4), AcceptanceEstimate()
    for rate, tokens in ((before, 400), (after, 60)):
        for _ in range(tokens):
            acceptance.add(tested=1, accepted=rng.random() < rate)
    assert abs(acceptance.rate - after) < 0.15


def test_chance_is_no_other_kind_of_text() -> None:
    """Constant data is remembered as long as before; seeds 0 to 19, whose worst is far within the bound."""
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
def test_no_time_without_a_draft_is_negative(measured: list[tuple[float, int]], said: float) -> None:
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
    assert alike.from_start(0.001)[0] == pytest.approx(0.005)  # a token takes no more than the request's own time
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
    """However lucky one device is: if only one drafts, or only one does not, all slow down."""
    lucky, poor = AcceptanceEstimate(), AcceptanceEstimate()
    assert lucky.common == lucky.rate  # nobody has said anything
    for each, accepted in ((lucky, 7), (poor, 5)):
        each.note_reported(0.75)
        for _ in range(16):
            each.add(tested=8, accepted=accepted)
    assert poor.rate < lucky.rate - 0.1
    assert poor.common == lucky.common == 0.75


@pytest.mark.parametrize(("told", "accepted"), [(0.7, 8), (0.7, 3)])
def test_a_device_whose_requests_are_quite_others_goes_by_its_own(told: float, accepted: int) -> None:
    own = AcceptanceEstimate()
    own.note_reported(told)
    for _ in range(50):
        own.add(tested=8, accepted=accepted)
    assert own.common == own.rate != told


NETWORK_S = 0.02


@dataclass
class World:
    """A device and an edge, event by event, with noisy times: the formulas must predict it."""

    conditions: Conditions
    plan: Plan
    rng: random.Random
    now: float = 0.0
    unread: int = 0  # tokens besides the last one that the draft model has not seen

    def rate(self, cycles: int) -> float:
        return sum(self.cycle() for _ in range(cycles)) / self.now

    def cycle(self) -> int:
        """Draft until a token is rejected or no draft can be sent; return the committed tokens."""
        conditions, tokens = self.conditions, self.plan.tokens
        step_s = end_s = self.now - 10.0  # the edge's last step
        verdicts: list[tuple[float, int]] = []
        while True:
            if not self.draft(verdicts):
                break
            arrives_s = self.now + NETWORK_S / 2
            if arrives_s > step_s:
                step_s = max(arrives_s, end_s)
                end_s = step_s + self.about(conditions.compute_s + tokens * conditions.compute_token_s)
            accepted = next((n for n in range(tokens) if self.rng.random() >= conditions.acceptance), tokens)
            verdicts.append((end_s + self.about(conditions.beside_s - NETWORK_S / 2), accepted))
            under_way = sum(at > self.now for at, _ in verdicts)
            if not self.plan.ahead or under_way >= conditions.window:
                break
        committed = 1
        for at, accepted in verdicts:
            self.now = max(self.now, at)
            self.unread = int(accepted == tokens)
            committed += accepted
            if accepted < tokens:
                break
        return committed

    def draft(self, verdicts: list[tuple[float, int]]) -> bool:
        """Draft; return False if a rejection became known meanwhile."""
        for _ in range(self.plan.tokens):
            self.now += self.about(self.conditions.token_s * (1 + self.unread))
            self.unread = 0
            if any(at <= self.now and accepted < self.plan.tokens for at, accepted in verdicts):
                return False
        return True

    def about(self, seconds: float) -> float:
        return seconds * self.rng.uniform(0.8, 1.2)


def conditions(acceptance: float, answer_s: float, **others: float) -> Conditions:
    times = {"token_s": 0.015, "compute_s": 0.045, "compute_token_s": 0.002, **others}
    return Conditions(acceptance=acceptance, beside_s=answer_s - 0.045, window=4, **times)


PLANS = [Plan(0), Plan(1), Plan(4), Plan(9), *(Plan(tokens, ahead=True) for tokens in (1, 2, 4, 9))]


@pytest.mark.parametrize("plan", PLANS, ids=repr)
@pytest.mark.parametrize("answer_s", [0.07, 0.12, 0.3])
@pytest.mark.parametrize("acceptance", [0.3, 0.7, 0.96])
def test_the_rate_is_the_one_that_is_seen(plan: Plan, answer_s: float, acceptance: float) -> None:
    under = conditions(acceptance, answer_s)
    seen = World(under, plan, random.Random(1)).rate(4000)
    # 4,000 cycles measure the rate to 2 %. Noisy times, whose mean the formulas use, fill a window more often.
    assert under.rate(plan) == pytest.approx(seen, rel=0.15 if plan.ahead else 0.03)


SIXTEEN = SharedSteps(requests=16, writing_s=0.12, step_s=0.04, request_s=0.005, token_s=0.004)


def shared(steps: SharedSteps, **others: Any) -> Conditions:
    given = {"acceptance": 0.8, "token_s": 0.01, "beside_s": 0.02, "window": 4, **others}
    return Conditions(shared=steps, **given)


@pytest.mark.parametrize("plan", [Plan(1), Plan(4), Plan(4, ahead=True)], ids=repr)
def test_more_requests_make_each_slower(plan: Plan) -> None:
    rates = [shared(replace(SIXTEEN, requests=requests)).rate(plan) for requests in (2, 4, 8, 16, 64)]
    assert all(more < fewer for fewer, more in pairwise(rates))
    assert 64 * rates[-1] >= 2 * rates[0]  # but all together generate more


def test_a_token_more_costs_the_steps_of_all() -> None:
    """A single device would estimate 4 ms for drafts of a token; sixteen of them lengthen a step by 64 ms."""
    alone = Conditions(acceptance=0.8, token_s=0.01, beside_s=0.02, compute_s=0.12, compute_token_s=0.004)
    together = shared(SIXTEEN, beside_s=0.02)
    assert alone.more_s(Plan(4)) == pytest.approx(0.014)
    assert together.more_s(Plan(4)) > 0.04


def test_where_steps_are_short_beside_the_way_a_draft_waits_for_no_other() -> None:
    """Two remote requests hardly ever share a step."""
    steps = SharedSteps(requests=2, writing_s=0.02, step_s=0.01, request_s=0.005, token_s=0.001)
    alone = Conditions(acceptance=0.8, token_s=0.01, beside_s=1.0, compute_s=0.015, compute_token_s=0.001)
    assert shared(steps, beside_s=1.0).rate(Plan(4)) == pytest.approx(alone.rate(Plan(4)), rel=0.02)


def test_the_answer_of_requests_that_are_waited_for_together_is_the_step_of_all() -> None:
    """The edge holds its step for drafts that are about to come, because one step is faster than two."""
    under = shared(SIXTEEN, beside_s=0.001, token_s=0.001)
    # The last one follows a bonus token, for which others have drafted on average.
    last_s = 0.001 * (1.0 - 0.8**2)
    assert under.answer_s(2) == pytest.approx(0.001 + last_s + 0.04 + 16 * (0.005 + 2 * 0.004))


def test_drafts_that_meet_in_a_step_meet_ever_after() -> None:
    """The longer a step compared with the rest of a round, the fewer requests stay apart, until a step has all."""
    steps = SharedSteps(requests=16, writing_s=0.1, step_s=0.02, request_s=0.004, token_s=0.002)
    together_s, alone_s = 0.02 + 16 * 0.006, 0.02 + 0.006
    assert steps.waiting_s(1, outside_s=0.05) == pytest.approx((together_s, 0.0))
    assert alone_s < sum(steps.waiting_s(1, outside_s=0.25)) < 0.8 * together_s
    assert sum(steps.waiting_s(1, outside_s=10.0)) == pytest.approx(alone_s, rel=0.1)


def test_drafting_ahead_counts_for_less_the_more_requests_there_are() -> None:
    trusts = [replace(SIXTEEN, requests=requests).trust for requests in (2, 4, 8, 16, 1000)]
    assert trusts == sorted(trusts, reverse=True)
    assert trusts[0] > 0.95
    assert trusts[-2] == trusts[-1] == 0.75


def test_tokens_that_are_computed_anyway_cost_nothing() -> None:
    free = replace(SIXTEEN, free=1)
    for plan in (Plan(1), Plan(1, ahead=True)):
        assert shared(free).rate(plan) > shared(SIXTEEN).rate(plan)
    together_s = 0.001 + 0.001 * (1.0 - 0.8) + 0.04 + 16 * 0.005
    assert shared(free, beside_s=0.001, token_s=0.001).answer_s(1) == pytest.approx(together_s)
    assert shared(free).rate(Plan(0)) == shared(SIXTEEN).rate(Plan(0))


@pytest.mark.parametrize(
    ("compute_s", "compute_token_s", "acceptance", "tokens", "simulated"),
    [
        (0.0644, 0.0171, 0.8, 2, 16.5),
        (0.0644, 0.0171, 0.8, 4, 15.5),
        (0.0644, 0.0171, 0.6, 2, 11.4),
        (0.0650, 0.0022, 0.8, 3, 23.5),
        (0.0650, 0.0022, 0.6, 2, 15.8),
    ],
)
def test_drafts_that_share_a_step_lengthen_it(
    compute_s: float, compute_token_s: float, acceptance: float, tokens: int, simulated: float
) -> None:
    """Rates of a simulation of one device with drafts of 15 ms a token, 28 ms of line and a window of four."""
    conditions = Conditions(
        acceptance=acceptance,
        token_s=0.015,
        beside_s=0.028,
        compute_s=compute_s,
        compute_token_s=compute_token_s,
        window=4,
    )
    assert conditions.rate(Plan(tokens, ahead=True)) == pytest.approx(simulated, rel=0.08)

import itertools
from dataclasses import replace
from typing import Any

import pytest

from fleet_admin.planning.advice import conditions_of
from fleet_admin.planning.scenario import EdgeLimits, Plan, RunTiming, Scenario, auto, drafting, streaming
from fleet_admin.planning.simulation import SimulationResult, simulate
from fleet_device.pacing.contract import Plan as DraftPlan
from fleet_device.pacing.contract import SharedSteps
from fleet_device.pacing.estimates import Conditions
from fleet_edge.step_time import StepCurve
from tests.fleet_admin.planning.curves import AVX2, CHEAP_TOKENS, LLAMA_CPP, constant

PLANS = {
    "stream": streaming,
    "1": drafting(1),
    "4": drafting(4),
    "16": drafting(16),
    "1 ahead": drafting(1, ahead=True),
    "4 ahead": drafting(4, ahead=True),
    "auto": auto,
}
AT_ONCE = EdgeLimits(piece_s=0.0)
GUESSES = EdgeLimits(max_guess=8)
SHORT = RunTiming(window_s=5.0, settle_s=1.0)


def scenario(**parts: Any) -> Scenario:
    given: dict[str, Any] = {
        "curve": AVX2, "devices": 1, "draft_s": 0.01, "acceptance": 0.7, "round_trip_s": 0.02, "timing": SHORT,
    }  # fmt: skip
    return Scenario(**given | parts)


# What must be so whatever happens


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(("acceptance", "guess_rate"), [(0.0, 0.0), (0.6, 0.0), (1.0, 0.0), (0.6, 0.7)])
def test_every_text_is_written_to_its_end_and_not_beyond(plan: Plan, acceptance: float, guess_rate: float) -> None:
    rates = {"acceptance": acceptance, "guess_rate": guess_rate, "limits": GUESSES}
    outcome = simulate(scenario(devices=5, plan=plan, **rates, texts=3, text_tokens=50, pause_s=0.2, message_s=0.001))
    texts = [text for device in outcome.devices for text in device.texts]
    assert len(texts) == 15
    assert [text.tokens for text in texts] == [50] * 15
    assert all(text.ended_at is not None for text in texts)
    # Each token is accepted, drawn by the target after a draft, or from edge-only decoding.
    counts = outcome.counts
    drawn = outcome.tokens - counts.accepted - counts.streamed
    assert 0 <= drawn <= counts.verdicts
    assert counts.accepted <= counts.tested <= counts.drafted


def test_what_comes_twice_over_a_long_line_counts_once() -> None:
    outcome = simulate(scenario(plan=streaming, limits=AT_ONCE, round_trip_s=0.2, texts=1, text_tokens=200))
    assert outcome.counts.streamed == 200
    assert rate(outcome) == pytest.approx(1000.0 / 13.0)


def test_the_same_scenario_comes_to_the_same() -> None:
    given = scenario(devices=4, plan=auto, pause_s=0.3)
    first, again = simulate(given), simulate(given)
    assert [[text.pieces for text in device.texts] for device in first.devices] == [
        [text.pieces for text in device.texts] for device in again.devices
    ]
    other = simulate(replace(given, seed=1))
    assert [text.pieces for text in other.devices[0].texts] != [text.pieces for text in first.devices[0].texts]


def test_acceptance_comes_out_as_it_went_in() -> None:
    # 6,000 tokens: five standard errors, so that a right simulation fails for fewer than one seed in a million.
    outcome = simulate(scenario(plan=drafting(3), acceptance=0.63, texts=1, text_tokens=6000))
    tested = outcome.counts.tested
    assert abs(outcome.counts.accepted / tested - 0.63) < 5 * (0.63 * 0.37 / tested) ** 0.5


# Closed forms


def rate(outcome: SimulationResult) -> float:
    (text,) = outcome.devices[0].texts
    (first_at, first), (last_at, _) = text.pieces[0], text.pieces[-1]
    return (text.tokens - first) / (last_at - first_at)


def test_what_the_edge_writes_for_one_device_comes_every_step() -> None:
    outcome = simulate(scenario(plan=streaming, limits=AT_ONCE, texts=1, text_tokens=500, round_trip_s=0.05))
    assert rate(outcome) == pytest.approx(1000.0 / 13.0)
    # Open and answer, request and answer; the prompt is computed while the grant is in flight, as far as possible.
    (text,) = outcome.devices[0].texts
    assert text.pieces[0][0] - text.asked_at >= 0.1


@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_a_device_whose_drafts_all_stand_has_a_round_of_draft_line_and_step(tokens: int) -> None:
    outcome = simulate(scenario(plan=drafting(tokens), acceptance=1.0, texts=1, text_tokens=(tokens + 1) * 100))
    # After the edge's token the draft model reads that one as well.
    round_s = (tokens + 1) * 0.01 + 0.02 + AVX2.step_ms(1, tokens + 1) / 1e3
    assert rate(outcome) == pytest.approx((tokens + 1) / round_s, rel=1e-6)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("tokens", [4, 8])
@pytest.mark.parametrize("curve", [AVX2, CHEAP_TOKENS], ids=["AVX2", "cheap tokens"])
def test_one_device_writes_as_fast_as_its_pacing_reckons(curve: StepCurve, tokens: int, ahead: bool) -> None:
    given = scenario(curve=curve, plan=drafting(tokens, ahead=ahead), texts=1, text_tokens=4000)
    formula = conditions_of(given, devices=1, tokens=tokens).rate(DraftPlan(tokens, ahead))
    # Random deviation in 4,000 tokens; and after a rejection, drafting ahead waits for the step of a void draft, which
    # the formula leaves out.
    assert rate(simulate(given)) == pytest.approx(formula, rel=0.15 if ahead else 0.05)


@pytest.mark.slow
def test_a_queue_of_single_tokens_waits_as_an_m_d_1_queue_does() -> None:
    service_s, load = 0.01, 0.5
    outcome = simulate(
        scenario(
            curve=constant(1e3 * service_s),
            devices=400,
            plan=streaming,
            limits=EdgeLimits(step_tokens=1, piece_s=0.0),
            round_trip_s=0.0,
            text_tokens=1,
            prompt_tokens=1,
            pause_s=400 * service_s / load,
            timing=RunTiming(window_s=100.0, settle_s=0.0, patience_s=0.0),
        )
    )
    waits = [
        text.pieces[0][0] - text.asked_at - service_s
        for device in outcome.devices
        for text in device.texts
        if text.pieces
    ]
    assert len(waits) > 4000
    expected = load * service_s / (2 * (1 - load))
    # The waits' standard error is below 4 % of it; the seed is fixed.
    assert sum(waits) / len(waits) == pytest.approx(expected, rel=0.15)
    assert outcome.busy == pytest.approx(load, rel=0.05)


def test_devices_that_write_together_share_each_step() -> None:
    outcome = simulate(scenario(devices=16, plan=streaming, limits=AT_ONCE, text_tokens=2000, round_trip_s=0.0))
    assert outcome.pace == pytest.approx(1000.0 / 68.0, rel=0.02)


@pytest.mark.parametrize("round_trip_s", [0.02, 0.1])
@pytest.mark.parametrize("plan", [DraftPlan(0), DraftPlan(2), DraftPlan(4), DraftPlan(4, ahead=True)], ids=repr)
def test_sixteen_devices_reach_the_pace_they_estimate(plan: DraftPlan, round_trip_s: float) -> None:
    """An edge whose steps take 40 ms, 5 ms more per request, and 4 ms per further token of one."""
    curve = StepCurve(
        rows={texts: tuple((tokens, 40.0 + texts * (1.0 + 4.0 * tokens)) for tokens in (1, 17)) for texts in (1, 64)},
        prefill=((1, 40), (64, 41)),
    )
    steps = SharedSteps(texts=16, writing_s=0.12, step_s=0.04, text_s=0.005, token_s=0.004)
    under = Conditions(acceptance=0.8, token_s=0.01, beside_s=round_trip_s, window=4, shared=steps)
    given = scenario(
        curve=curve, devices=16, plan=drafting(plan.tokens, ahead=plan.ahead), acceptance=0.8, text_tokens=1000
    )
    # Devices that have synchronized share more or fewer steps than random ones.
    assert simulate(replace(given, round_trip_s=round_trip_s)).pace == pytest.approx(under.rate(plan), rel=0.3)


# What must not get better or worse


@pytest.mark.parametrize("plan", [streaming, drafting(4)], ids=["stream", "4"])
def test_more_devices_get_no_more_each(plan: Plan) -> None:
    paces = [simulate(scenario(devices=devices, plan=plan)).pace for devices in (1, 4, 16, 64)]
    assert all(after <= 1.02 * before for before, after in itertools.pairwise(paces)), paces


def test_distance_costs_what_is_streamed_nothing_but_the_first_token() -> None:
    near, far = (
        simulate(scenario(plan=streaming, limits=AT_ONCE, round_trip_s=seconds, text_tokens=400, prompt_tokens=1))
        for seconds in (0.0, 0.15)
    )
    assert far.pace == pytest.approx(near.pace, rel=0.02)
    assert far.first_s - near.first_s == pytest.approx(0.3, abs=0.03)


def test_the_edges_own_time_for_messages_slows_it() -> None:
    free, dear = (simulate(scenario(devices=4, plan=drafting(4), message_s=seconds)) for seconds in (0.0, 0.01))
    assert dear.tokens_per_s < free.tokens_per_s


def test_guesses_that_are_right_save_steps_where_a_token_costs_little_and_are_left_out_where_it_costs_much() -> None:
    def rate_of(curve: StepCurve, guess_rate: float) -> float:
        asked = scenario(curve=curve, plan=streaming, texts=1, text_tokens=600, guess_rate=guess_rate, limits=GUESSES)
        return rate(simulate(asked))

    assert rate_of(CHEAP_TOKENS, 0.8) > 2.5 * rate_of(CHEAP_TOKENS, 0.0)
    assert rate_of(AVX2, 0.3) > 0.95 * rate_of(AVX2, 0.0)


# What the product does


def test_a_device_that_chooses_streams_where_tokens_are_dear_and_drafts_where_they_are_cheap() -> None:
    dear, cheap = (simulate(scenario(curve=curve, plan=auto)) for curve in (AVX2, CHEAP_TOKENS))
    assert dear.counts.streamed > 0.9 * dear.tokens
    assert cheap.counts.streamed < 0.2 * cheap.tokens
    assert cheap.mean_draft > 3


@pytest.mark.parametrize("devices", [4, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("acceptance", [0.6, 0.95])
@pytest.mark.parametrize("round_trip_s", [0.02, 0.1])
def test_devices_that_choose_come_to_what_is_best_for_all(acceptance: float, round_trip_s: float, devices: int) -> None:
    """Drafts of different lengths are computed one after another, so a device that deviates slows down all."""
    given = scenario(
        curve=LLAMA_CPP, devices=devices, acceptance=acceptance, round_trip_s=round_trip_s, text_tokens=2000
    )
    alone, *drafted = (simulate(replace(given, plan=PLANS[plan])).pace for plan in ("stream", "1", "4", "4 ahead"))
    chosen = simulate(replace(given, plan=auto, timing=replace(SHORT, settle_s=10.0))).pace
    assert chosen > 0.9 * alone
    assert chosen > 0.8 * max(drafted)

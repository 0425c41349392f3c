import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from fleet_device.drafters.contract import Prospect
from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import DraftOutcome, FixedPacing, Plan, SharedSteps
from fleet_device.pacing.estimates import Conditions
from fleet_device.pacing.plans import best_plan, best_repetition
from schemas.fields import EdgeLoad

LONGEST, WINDOW = 16, 4
STEP_S = 0.04
START = Plan(4)


def conditions(acceptance: float, answer_s: float, *, token_s: float = 0.013, slope: float = 0.001) -> Conditions:
    return Conditions(
        acceptance=acceptance,
        token_s=token_s,
        beside_s=answer_s - min(STEP_S, answer_s / 2),
        compute_s=min(STEP_S, answer_s / 2),
        compute_token_s=slope,
        window=WINDOW,
    )


def best(under: Conditions, *, longest: int = LONGEST, ahead: bool | None = None, last: Plan | None = None) -> Plan:
    return best_plan(under, under, longest=longest, ahead=ahead, last=last)


acceptances = st.floats(0.0, 0.99)
times = st.floats(1e-4, 2.0)


@given(acceptances, times, times, st.integers(0, 16))
def test_the_shortest_good_plan_is_chosen(acceptance: float, token_s: float, answer_s: float, longest: int) -> None:
    under = conditions(acceptance, answer_s, token_s=token_s)
    every = [Plan(n) for n in range(longest + 1)] + [Plan(n, ahead=True) for n in range(1, longest + 1)]
    highest, chosen = max(map(under.rate, every)), best(under, longest=longest)
    assert chosen in every
    assert under.rate(chosen) >= 0.98 * highest
    assert all(under.rate(plan) < 0.98 * highest for plan in every[: every.index(chosen)])


def test_small_changes_of_the_measurements_do_not_change_the_plan() -> None:
    def at(answer_s: float, last: Plan | None = None) -> Plan:
        return best(conditions(0.75, answer_s), ahead=False, last=last)

    steps = [0.03 + 0.0005 * number for number in range(200)]
    turns = [answer_s for answer_s in steps if at(answer_s) != at(answer_s + 0.0005)]
    assert turns
    for answer_s in turns:
        assert at(answer_s + 0.0005, last=at(answer_s)) == at(answer_s)


def verified(plan: Plan, accepted: int, step_s: float, **more: Any) -> DraftOutcome:
    """Return the outcome of a draft that an edge 25 ms away has verified in a step of `step_s`."""
    outcome = DraftOutcome(
        tokens=plan.tokens,
        ahead=plan.ahead,
        accepted=accepted,
        token_s=0.009,
        answer_s=0.025 + step_s,
        compute_s=step_s,
    )
    return replace(outcome, **more)


def lesson(plan: Plan, accepted: int, *, answer_s: float = 0.05, **more: Any) -> DraftOutcome:
    given = {"token_s": 0.013, "answer_s": answer_s} | more
    return verified(plan, min(accepted, plan.tokens), min(STEP_S, answer_s / 2), **given)


def stood(plan: Plan, acceptance: float, rng: random.Random) -> int:
    return next((n for n in range(plan.tokens) if rng.random() >= acceptance), plan.tokens)


def follow(
    pacing: AdaptivePacing,
    rounds: int,
    learn: Callable[[Plan], DraftOutcome],
    *,
    token_s: float | None = None,
    step_s: float = 0.0,
    longest: int = LONGEST,
) -> list[Plan]:
    """Let it choose, and tell it what became of its drafts and how quickly the edge wrote; return the plans."""
    plans = []
    for _ in range(rounds):
        plan = pacing.plan(longest=longest, window=WINDOW)
        plans.append(plan)
        if not plan.edge_only:
            pacing.learn(learn(plan))
        elif token_s is not None:
            pacing.learn_edge_only(plan.tokens, token_s * plan.tokens, step_s=step_s)
    return plans


def drafts_of(plans: list[Plan]) -> list[Plan]:
    return [plan for plan in plans if not plan.edge_only]


def drafted(
    pacing: AdaptivePacing | FixedPacing, plan: Plan, chance: Callable[[], float]
) -> tuple[Plan, tuple[float, ...]]:
    """Draft as a session does, each token with a probability; return the resulting plan."""
    chances: list[float] = []
    while len(chances) < plan.tokens and not (plan.may_stop and chances and not pacing.goes_on(chances)):
        chances.append(chance())
    return replace(plan, tokens=len(chances), may_stop=False), tuple(chances)


def live(
    pacing: AdaptivePacing,
    rounds: int,
    *,
    acceptance: float,
    answer_s: float | Callable[[Plan], float],
    seed: int = 1,
) -> list[Plan]:
    answers_s = answer_s if callable(answer_s) else lambda _plan: answer_s
    rng, plans = random.Random(seed), []
    for _ in range(rounds):
        plan, _ = drafted(pacing, pacing.plan(longest=LONGEST, window=WINDOW), lambda: acceptance)
        plans.append(plan)
        pacing.learn(lesson(plan, stood(plan, acceptance, rng), answer_s=answers_s(plan) * rng.uniform(0.8, 1.2)))
    return plans


def test_it_starts_with_the_fixed_plan_and_the_first_verdict_of_a_text_is_not_timed() -> None:
    pacing = AdaptivePacing()
    for _ in range(9):
        assert pacing.plan(longest=LONGEST, window=WINDOW) == START
        pacing.learn(lesson(START, 4, token_s=3.0, answer_s=9.0, opening=True))
    assert pacing.plan(longest=2, window=WINDOW) == Plan(2)
    # With those times as its own, it would draft little or endlessly.
    live(pacing, 3, acceptance=0.7, answer_s=0.05)
    assert pacing.conditions(WINDOW).token_s == pytest.approx(0.013, rel=0.2)
    assert pacing.conditions(WINDOW).answer_s(0) == pytest.approx(0.05, rel=0.2)


def test_it_learns_to_draft_ahead_with_a_distant_edge_and_to_wait_with_a_near_one() -> None:
    pacing = AdaptivePacing()
    assert all(plan.ahead for plan in live(pacing, 60, acceptance=0.95, answer_s=0.4)[-20:])
    assert sum(plan.ahead for plan in live(pacing, 400, acceptance=0.5, answer_s=0.004)[-128:]) == 1


@pytest.mark.parametrize("ahead", [False, True])
def test_whether_to_draft_ahead_is_not_chosen_where_it_is_set(ahead: bool) -> None:
    for answer_s in (0.001, 1.0):
        plans = live(AdaptivePacing(ahead=ahead), 60, acceptance=0.9, answer_s=answer_s)
        assert {plan.ahead for plan in plans} == {ahead}


def test_an_edge_that_allows_no_draft_tokens_gets_none() -> None:
    for ahead in (None, False, True):
        pacing = AdaptivePacing(ahead=ahead)
        live(pacing, 20, acceptance=0.9, answer_s=0.1)
        assert {pacing.plan(longest=0, window=1).tokens for _ in range(40)} == {0}


def test_a_device_that_has_stopped_drafting_finds_out_when_its_drafts_are_good_again() -> None:
    pacing = AdaptivePacing()
    assert live(pacing, 300, acceptance=0.0, answer_s=0.05)[-2].tokens == 0
    assert live(pacing, 1500, acceptance=0.98, answer_s=0.05)[-2].tokens > 0


def test_the_second_token_that_the_draft_model_reads_behind_a_bonus_is_not_taken_for_slowness() -> None:
    pacing = AdaptivePacing(ahead=False)
    follow(pacing, 50, lambda plan: lesson(plan, LONGEST, token_s=0.013 * (plan.tokens + 1) / max(1, plan.tokens)))
    assert pacing.conditions(WINDOW).token_s == pytest.approx(0.013, rel=0.02)


def test_a_draft_that_queues_behind_another_does_not_tell_the_answer_time() -> None:
    pacing = AdaptivePacing(ahead=True)
    for _ in range(30):
        plan = pacing.plan(longest=LONGEST, window=WINDOW)
        pacing.learn(lesson(plan, plan.tokens, answer_s=0.1))
        pacing.learn(lesson(plan, 0, answer_s=0.2))
    # The first of each pair, less half a token, the mean delay of a drafting device.
    assert pacing.conditions(WINDOW, ahead=True).answer_s(0) == pytest.approx(0.1 - 0.013 / 2, rel=0.1)


def test_drafting_ahead_is_taken_up_again_when_answers_get_faster() -> None:
    pacing = AdaptivePacing()

    def gone_on(rounds: int, *, slow_s: float) -> int:
        plans = live(pacing, rounds, acceptance=0.95, answer_s=lambda plan: slow_s if plan.ahead else 0.15)
        return sum(plan.ahead for plan in plans[-128:])

    assert gone_on(300, slow_s=0.15) > 120
    assert gone_on(300, slow_s=0.6) < 8
    assert gone_on(800, slow_s=0.15) > 64


def live_with_edge_only(
    pacing: AdaptivePacing,
    rounds: int,
    *,
    acceptance: float,
    token_s: float,
    round_trip_s: float,
    edge_only_s: float,
    row: float = 0.2,
    slow: Callable[[float, Plan], float] = lambda _at, _plan: 1.0,
    seed: int = 3,
) -> tuple[list[Plan], float]:
    """Follow the plans where edge-only decoding is possible; return them and the tokens per second.

    Each draft token lengthens the edge's step by `row` of it; `slow` is the factor on the times of a plan after a
    number of seconds.
    """
    rng, plans, tokens, seconds = random.Random(seed), list[Plan](), 0, 0.0
    edge_only = False
    for _ in range(rounds):
        plan, _ = drafted(pacing, pacing.plan(longest=LONGEST, window=WINDOW), lambda: acceptance)
        plans.append(plan)
        if plan.edge_only:
            seconds += 0.0 if edge_only else round_trip_s
            for _ in range(plan.tokens // 2):
                took = edge_only_s * rng.uniform(0.8, 1.2) * slow(seconds, plan)
                pacing.learn_edge_only(1, took)
                tokens, seconds = tokens + 1, seconds + took
        else:
            accepted = stood(plan, acceptance, rng)
            factor = slow(seconds, plan)
            step_s = factor * edge_only_s * (1.0 + row * plan.tokens)
            answer_s = (round_trip_s + step_s) * rng.uniform(0.9, 1.1)
            # The first token after edge-only decoding is not timed.
            its_s = math.nan if edge_only and plan.tokens == 1 else factor * token_s
            pacing.learn(verified(plan, accepted, step_s, token_s=its_s, answer_s=answer_s))
            seconds += answer_s + (round_trip_s if edge_only else 0.0) + plan.tokens * factor * token_s
            tokens += accepted + 1
        edge_only = plan.edge_only
    return plans, tokens / seconds


# The pace of edge-only decoding, and of a device whose drafts are useful or useless.
@pytest.mark.parametrize("round_trip_s", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("edge_only_s", [0.013, 0.1])
@pytest.mark.parametrize("acceptance", [0.1, 0.7, 0.97])
@pytest.mark.parametrize("row", [0.06, 0.2, 0.25], ids=["dense at 7B", "dense and small", "experts"])
def test_choosing_is_hardly_slower_than_edge_only(
    round_trip_s: float, edge_only_s: float, acceptance: float, row: float
) -> None:
    place = {
        "acceptance": acceptance, "token_s": 0.013, "round_trip_s": round_trip_s, "edge_only_s": edge_only_s, "row": row
    }  # fmt: skip
    _, chosen = live_with_edge_only(AdaptivePacing(ahead=False, edge_only=None), 400, **place)
    _, always = live_with_edge_only(AdaptivePacing(edge_only=True), 400, **place)
    _, never = live_with_edge_only(AdaptivePacing(ahead=False), 400, **place)
    assert chosen >= 0.97 * always
    assert chosen >= 0.92 * max(always, never)


DEMO = {"acceptance": 0.85, "token_s": 0.0035, "round_trip_s": 0.002, "edge_only_s": 0.0196}
"""Two cores and a target of 135 million parameters: drafting yields 1.3 times the tokens of edge-only decoding."""


def drafts_start_slowly(at: float, plan: Plan) -> float:
    """Code is compiled and files are read."""
    return 1.0 if plan.edge_only or at >= 1.0 else 4.0


def others_are_busy(at: float, plan: Plan) -> float:
    """Other devices take the processor, from drafts more than from the edge."""
    return 1.0 if at >= 10.0 else 1.8 if plan.edge_only else 4.0


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("slow", [drafts_start_slowly, others_are_busy])
def test_drafts_that_were_slow_at_first_are_taken_once_they_are_quick(
    slow: Callable[[float, Plan], float], seed: int
) -> None:
    pacing = AdaptivePacing(ahead=False, edge_only=None)
    plans, _ = live_with_edge_only(pacing, 120, slow=slow, seed=seed, **DEMO)
    assert drafts_of(plans[60:])
    assert len(drafts_of(plans[90:])) > 20


def half_busy(seed: int) -> Callable[[float, Plan], float]:
    """Another program takes a core from time to time."""
    rng = random.Random(100 + seed)
    return lambda _at, _plan: rng.uniform(2.0, 5.0) if rng.random() < 0.3 else 1.0


@pytest.mark.parametrize("busy", [False, True])
def test_noise_does_not_take_a_device_from_drafts_that_gain_a_seventh(busy: bool) -> None:
    """On a half-busy machine too: its estimates vary by more than what drafts must gain to be taken up."""
    place = {"acceptance": 0.65, "token_s": 0.0045, "round_trip_s": 0.002, "edge_only_s": 0.0225, "row": 0.15}
    edge_only = 0
    for seed in range(8):
        slow = half_busy(seed) if busy else lambda _at, _plan: 1.0
        plans, _ = live_with_edge_only(AdaptivePacing(ahead=False, edge_only=None), 300, slow=slow, seed=seed, **place)
        edge_only += sum(plan.edge_only for plan in plans[100:])
    assert edge_only <= 0.06 * 8 * 200


def test_a_trial_does_not_end_with_one_slow_draft() -> None:
    """Another program took the processor during it; the other drafts of the trial show what is usual."""
    pacing, factors = AdaptivePacing(ahead=False, edge_only=None), [3.0] * 3 + [2.0] * 3 + [3.0]

    def learn(plan: Plan) -> DraftOutcome:
        step_s = (factors.pop(0) if factors else 1.0) * 0.02 * (1.0 + 0.1 * plan.tokens)
        return verified(plan, plan.tokens, step_s, token_s=0.0035, answer_s=step_s + 0.002)

    plans = list[Plan]()
    while factors:  # a first trial, and the slow draft of the second one
        plans += follow(pacing, 1, learn, token_s=0.02, step_s=0.02)
    assert plans[-2].edge_only
    assert len(drafts_of(follow(pacing, 7, learn, token_s=0.02, step_s=0.02))) == 7


@pytest.mark.parametrize("seed", range(8))
def test_a_choice_from_before_the_edge_became_quicker_is_not_settled(seed: int) -> None:
    pacing = AdaptivePacing(ahead=False, edge_only=None)
    live_with_edge_only(pacing, 40, slow=lambda _at, plan: 3.0 if plan.edge_only else 8.0, seed=seed, **DEMO)
    assert pacing.choice().plan == "edge-only"
    assert pacing.choice().settled
    for _ in range(6):  # the first three may be a trial
        plan = pacing.plan(longest=LONGEST, window=WINDOW)
        for _ in range(plan.tokens // 2 if plan.edge_only else 0):
            pacing.learn_edge_only(1, DEMO["edge_only_s"])
    assert not pacing.choice().settled


@pytest.mark.parametrize("seed", range(8))
def test_drafts_that_were_slow_next_to_other_requests_are_tried_again_without_them(seed: int) -> None:
    """Edge-only decoding is no quicker than with them: something else takes the processor now."""
    pacing, rng = AdaptivePacing(ahead=False, edge_only=None), random.Random(seed)

    def learn(plan: Plan, factor: float) -> DraftOutcome:
        step_s = factor * 0.02 * (1.0 + 0.1 * plan.tokens)
        return verified(plan, stood(plan, 0.75, rng), step_s, token_s=factor * 0.0035, answer_s=step_s + 0.002)

    pacing.note_load(EdgeLoad(requests=3, writing_ms=24.0, step_ms=20.0, request_ms=2.0, token_ms=4.0))
    follow(pacing, 60, lambda plan: learn(plan, 4.0), token_s=0.024, step_s=0.024)
    assert pacing.choice().plan == "edge-only"
    assert pacing.choice().settled
    pacing.note_load(EdgeLoad(requests=1, token_ms=2.0))
    follow(pacing, 1, lambda plan: learn(plan, 1.0), token_s=0.026, step_s=0.024)
    assert not pacing.choice().settled
    assert len(drafts_of(follow(pacing, 60, lambda plan: learn(plan, 1.0), token_s=0.026, step_s=0.024)[30:])) > 20


@pytest.mark.parametrize(("edge_only_s", "drafts"), [(0.013, False), (0.1, True)])
def test_a_choice_is_settled_once_both_ways_are_measured_and_one_has_been_taken_for_a_while(
    edge_only_s: float, drafts: bool
) -> None:
    pacing, rng = AdaptivePacing(ahead=False, edge_only=None), random.Random(3)

    def learn(plan: Plan) -> DraftOutcome:
        step_s = edge_only_s * (1.0 + 0.2 * plan.tokens)
        return verified(plan, stood(plan, 0.8, rng), step_s, token_s=0.013, answer_s=step_s + 0.02)

    for _ in range(8):
        follow(pacing, 1, learn, token_s=edge_only_s, step_s=edge_only_s)
        assert not pacing.choice().settled
    follow(pacing, 92, learn, token_s=edge_only_s, step_s=edge_only_s)
    assert pacing.choice().settled
    assert (pacing.choice().plan == "draft") is drafts
    before, plan = pacing.choice().plan, pacing.choice().plan
    edge_only_s = 0.113 - edge_only_s
    for _ in range(200):
        if plan != before:
            break
        assert pacing.choice().settled
        follow(pacing, 1, learn, token_s=edge_only_s, step_s=edge_only_s)
        plan = pacing.choice().plan
    assert plan != before
    assert not pacing.choice().settled


def begun(token_s: float, step_s: float, load: EdgeLoad, *, longest: int = LONGEST) -> AdaptivePacing:
    """Return a pacing that has seen edge-only decoding and is about to draft."""
    pacing = AdaptivePacing(ahead=False, edge_only=None)
    pacing.note_load(load)
    pacing.plan(longest=longest, window=WINDOW)
    for _ in range(8):
        pacing.learn_edge_only(1, token_s, step_s=step_s)
    return pacing


@pytest.mark.parametrize("step_s", [0.35, 0.0])
def test_what_was_measured_on_a_busy_edge_does_not_count_on_one_that_is_not(step_s: float) -> None:
    """It uses the edge's present steps; where the earlier ones are unknown, an empty draft's time."""
    plans = follow(
        begun(0.4, step_s, EdgeLoad(requests=1)), 50, lambda plan: verified(plan, 0, 0.1, token_s=0.013, answer_s=0.12)
    )
    assert any(plan.edge_only for plan in plans)


@pytest.mark.parametrize("told_ms", [None, 3.0])
def test_drafts_that_are_slow_by_their_own_tokens_do_not_make_the_edge_seem_slow(told_ms: float | None) -> None:
    """Two cores: 15 ms for a token, 24 ms for four. Edge-only decoding was twice as fast, and was never tried again."""
    pacing = begun(0.016, 0.015, EdgeLoad(requests=1, token_ms=told_ms), longest=3)
    plans = follow(pacing, 40, lambda plan: verified(plan, plan.tokens, 0.015 + 0.003 * plan.tokens), longest=3)
    assert sum(plan.edge_only for plan in plans[10:]) > 20


@pytest.mark.parametrize(("told", "most"), [(False, 2), (True, 0)])
def test_a_load_that_has_grown_since_the_edge_wrote_is_noticed_by_its_steps(told: bool, most: int) -> None:
    """Otherwise drafts would be compared with an idle edge's decoding, and given up where they pay."""
    pacing = begun(0.016, 0.015, EdgeLoad(requests=1, acceptance=0.95))

    def learn(plan: Plan) -> DraftOutcome:
        if told:
            pacing.note_load(EdgeLoad(requests=8, writing_ms=120.0, step_ms=20.0, request_ms=12.5, token_ms=4.0))
        return verified(plan, plan.tokens, 0.12 + 0.004 * plan.tokens)

    plans = follow(pacing, 50, learn, token_s=0.12, step_s=0.12)  # before it is tried again in any case
    assert sum(plan.edge_only for plan in plans) <= most


def test_an_edge_that_has_no_other_text_is_not_taken_for_busy_because_two_rows_take_twice_what_one_does() -> None:
    """One core: 12 ms for a row, 28 ms for two, 6 ms for each further one; edge-only decoding yields 75 tokens/s."""
    pacing, rng = AdaptivePacing(edge_only=None), random.Random(1)
    pacing.note_load(EdgeLoad(requests=1, token_ms=6.0, acceptance=0.9))

    def learn(plan: Plan) -> DraftOutcome:
        return verified(plan, stood(plan, 0.9, rng), 0.0125 + (0.01 + 0.006 * plan.tokens if plan.tokens else 0.0))

    assert len(drafts_of(follow(pacing, 200, learn, token_s=0.0133, step_s=0.0125))) < 40


SIXTEEN = EdgeLoad(requests=16, writing_ms=120.0, step_ms=40.0, request_ms=5.0, token_ms=4.0)
"""Requests on one core: edge-only decoding yields eight tokens per second for each."""


@pytest.mark.parametrize(("acceptance", "drafts"), [(0.95, True), (0.5, False)])
def test_where_requests_share_steps_it_is_drafted_if_that_were_quicker_for_all(acceptance: float, drafts: bool) -> None:
    """It holds whatever the present steps are; a single device would gain with poor drafts too."""
    pacing, rng = AdaptivePacing(ahead=False, edge_only=None), random.Random(5)
    pacing.note_load(SIXTEEN)

    def learn(plan: Plan) -> DraftOutcome:
        return verified(plan, stood(plan, acceptance, rng), 0.16 + 0.004 * plan.tokens)

    plans = follow(pacing, 80, learn, token_s=0.16, step_s=0.16)
    assert (len(drafts_of(plans[30:])) > 40) is drafts


def test_devices_that_are_alike_draft_alike_where_requests_share_steps() -> None:
    """Sixteen devices with random estimates of the same acceptance."""

    def device(seed: int) -> list[Plan]:
        pacing, rng = AdaptivePacing(ahead=False, edge_only=False), random.Random(seed)
        pacing.note_load(SIXTEEN)
        return follow(pacing, 60, lambda plan: verified(plan, stood(plan, 0.8, rng), 0.16))

    chosen = {plan for seed in range(16) for plan in device(seed)[30:]}
    assert not any(plan.may_stop for plan in chosen)
    assert {plan.tokens for plan in chosen} <= {0, 1, 2, 4}  # computes requests with equally many tokens at once


def test_the_wait_for_a_step_is_not_taken_for_the_way_where_requests_share_steps() -> None:
    """It depends on other devices and is estimated; where it cannot be, it counts as part of the round trip."""
    under = {}
    for load in (EdgeLoad(requests=1), SIXTEEN):
        pacing = AdaptivePacing(ahead=False)
        pacing.note_load(load)
        follow(pacing, 40, lambda plan: verified(plan, plan.tokens, 0.16, queue_s=0.08, answer_s=0.265))
        under[load.requests] = pacing.conditions(WINDOW)
    assert under[1].beside_s == pytest.approx(0.105)
    assert under[16].beside_s == pytest.approx(0.025)
    assert under[16].shared == SharedSteps(requests=16, writing_s=0.12, step_s=0.04, request_s=0.005, token_s=0.004)
    assert under[1].shared is None


def test_other_drafts_that_a_step_has_verified_are_not_taken_for_its_load() -> None:
    """Three drafts of a token each are verified at once: 13 ms, and 7 ms for each of them."""
    pacing = AdaptivePacing(edge_only=None)
    pacing.note_load(EdgeLoad(requests=1, token_ms=7.0, acceptance=0.8))
    draft = verified(Plan(1, ahead=True), 1, 0.013 + 0.007 * 3, chained=2)
    follow(pacing, 20, lambda _: draft, token_s=0.1, step_s=0.013)
    assert pacing.conditions(WINDOW, ahead=True).compute_s == pytest.approx(0.013)


def test_where_others_found_a_draft_model_good_a_bad_start_does_not_silence_it() -> None:
    """Few of its first tokens were accepted, by chance; with edge-only decoding a device hardly notices that."""
    drafts, times = {}, {"token_s": 0.02, "answer_s": 0.13}
    for told in (None, 0.95):
        pacing = begun(0.1, 0.1, EdgeLoad(requests=1, token_ms=1.0, acceptance=told))
        begin = follow(pacing, 4, lambda plan: verified(plan, 0, 0.1, **times), token_s=0.1, step_s=0.1)
        assert drafts_of(begin)
        plans = follow(pacing, 56, lambda plan: verified(plan, plan.tokens, 0.1, **times), token_s=0.1, step_s=0.1)
        drafts[told] = len(drafts_of(plans))
    assert drafts[0.95] > 40
    assert drafts[0.95] > drafts[None]


def test_drafts_end_where_the_draft_model_is_unsure_and_go_on_where_it_is_sure() -> None:
    """Nearly all sure tokens (0.99) are accepted, and a third of the others (0.3)."""
    rng, pacing = random.Random(8), AdaptivePacing(ahead=False)

    def chance() -> float:
        return 0.99 if rng.random() < 0.8 else 0.3

    for _ in range(300):
        plan, chances = drafted(pacing, pacing.plan(longest=LONGEST, window=WINDOW), chance)
        accepted = next((n for n, each in enumerate(chances) if rng.random() >= each), plan.tokens)
        pacing.learn(lesson(plan, accepted, chances=chances))
    pacing.plan(longest=LONGEST, window=WINDOW)
    assert pacing.goes_on((0.99,) * 4)
    assert not pacing.goes_on((0.99, 0.3, 0.3))


def test_what_a_draft_model_says_of_itself_is_believed_as_far_as_it_has_proven_true() -> None:
    rng, pacing = random.Random(9), AdaptivePacing(ahead=False)
    for _ in range(200):
        plan, chances = drafted(pacing, pacing.plan(longest=LONGEST, window=WINDOW), lambda: 0.99)
        pacing.learn(lesson(plan, stood(plan, 0.5, rng), chances=chances))
    pacing.plan(longest=LONGEST, window=WINDOW)
    assert not pacing.goes_on((0.99,) * 4)


def test_stopping_where_it_is_unsure_brings_more_than_any_fixed_length() -> None:
    """Tokens per second on 4,000 drafts of a well-calibrated model; deterministic by its seeds."""

    def rate(pacing: AdaptivePacing | FixedPacing) -> float:
        rng, committed, seconds = random.Random(10), 0, 0.0
        for _ in range(4000):
            plan, chances = drafted(
                pacing, pacing.plan(longest=LONGEST, window=WINDOW), lambda: 0.98 if rng.random() < 0.75 else 0.35
            )
            accepted = next((n for n, each in enumerate(chances) if rng.random() >= each), plan.tokens)
            pacing.learn(lesson(plan, accepted, answer_s=0.06, chances=chances))
            committed, seconds = committed + accepted + 1, seconds + 0.06 + 0.013 * plan.tokens
        return committed / seconds

    best_fixed = max(rate(FixedPacing(tokens)) for tokens in range(1, 13))
    assert rate(AdaptivePacing(ahead=False)) > 1.03 * best_fixed


TIMES = st.none() | st.just(0.0) | st.floats(0.0, 65e3)
LOADS = st.builds(
    EdgeLoad,
    requests=st.integers(1, (1 << 16) - 1),
    writing_ms=TIMES,
    step_ms=TIMES,
    request_ms=TIMES,
    token_ms=TIMES,
    acceptance=st.none() | st.floats(0.0, 1.0),
    free=st.integers(0, 16),
)
ANY_TIME = st.floats(0.0) | st.just(math.nan)
OUTCOMES = st.tuples(st.integers(0, 64), st.floats(0.0, 1.0), st.booleans(), ANY_TIME, ANY_TIME, st.booleans())


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.none() | LOADS, OUTCOMES), min_size=1, max_size=30),
    st.sampled_from([None, False]),
    st.sampled_from([None, False, True]),
)
def test_any_measurement_gives_a_plan(events: list[Any], edge_only: bool | None, drafts_ahead: bool | None) -> None:
    pacing = AdaptivePacing(ahead=drafts_ahead, edge_only=edge_only)
    prospect = Prospect(chances=(0.9, 0.8, 0.7), token_s=0.0001, catch_up_s=0.001)
    for load, (tokens, share, ahead, answer_s, compute_s, opening) in events:
        if load is not None:
            pacing.note_load(load)
        plan = pacing.plan(longest=LONGEST, window=WINDOW)
        assert plan.edge_only or 0 <= plan.tokens <= LONGEST
        weighed = pacing.weigh(plan, prospect, longest=LONGEST, window=WINDOW)
        assert weighed.edge_only or 0 <= weighed.tokens <= LONGEST
        assert pacing.choice().reason
        if plan.edge_only:
            pacing.learn_edge_only(tokens, answer_s, step_s=compute_s)
        else:
            more = {"answer_s": answer_s, "queue_s": compute_s / 2, "opening": opening}
            pacing.learn(verified(Plan(tokens, ahead=ahead), int(share * tokens), compute_s, **more))
            pacing.goes_on((0.5, 1.0))


NEAR = Conditions(acceptance=0.9, token_s=0.010, beside_s=0.002, compute_s=0.020, compute_token_s=0.003)
SURE = Prospect(tuple(0.97**n for n in range(1, 17)), token_s=0.0001, catch_up_s=0.005)
UNSURE = Prospect(tuple(0.4**n for n in range(1, 5)), token_s=0.0001, catch_up_s=0.005)


def choose(prospect: Prospect, conditions: Conditions = NEAR, *, rate: float) -> Plan | None:
    return best_repetition(prospect, waiting=conditions, drafting_ahead=None, longest=16, rate=rate)


def test_what_is_sure_is_drafted_from_earlier_text_and_at_length() -> None:
    plan = choose(SURE, rate=NEAR.rate(Plan(4)))
    assert plan.repeats
    assert plan.tokens >= 8
    assert 0.0 < plan.least <= SURE.chances[plan.tokens - 1]


@pytest.mark.parametrize(
    ("prospect", "faster"),
    [(UNSURE, 1), (SURE, 10), (replace(SURE, catch_up_s=0.2), 1)],
    ids=["unsure", "slower than the edge", "much to catch up"],
)
def test_what_promises_less_than_the_plan_is_not_repeated(prospect: Prospect, faster: int) -> None:
    assert choose(prospect, rate=faster * NEAR.rate(Plan(4))) is None


def test_where_requests_share_steps_it_is_shorter() -> None:
    """A further token lengthens the steps of all sixteen."""
    shared = SharedSteps(requests=16, writing_s=0.1, step_s=0.03, request_s=0.005, token_s=0.006)
    rate = NEAR.rate(Plan(4))
    free, dear = choose(SURE, rate=rate / 8), choose(SURE, replace(NEAR, shared=shared), rate=rate / 8)
    assert dear.tokens < free.tokens


def measured() -> AdaptivePacing:
    pacing = AdaptivePacing(ahead=False)
    for _ in range(5):
        pacing.learn(lesson(Plan(4), 4))
    return pacing


def test_a_device_that_chooses_takes_it_once_it_has_measured() -> None:
    pacing = AdaptivePacing(ahead=False)
    plan = pacing.plan(longest=16, window=1)
    assert pacing.weigh(plan, SURE, longest=16, window=1) == plan
    pacing = measured()
    plan = pacing.plan(longest=16, window=1)
    assert pacing.weigh(plan, SURE, longest=16, window=1).repeats
    assert not pacing.weigh(plan, UNSURE, longest=16, window=1).repeats


def test_without_a_model_what_is_unsure_is_not_drafted_at_all() -> None:
    pacing = measured()
    plan = pacing.plan(longest=16, window=1)
    hardly = Prospect((0.02,), token_s=0.0001, catch_up_s=0.0, alone=True)
    assert pacing.weigh(plan, hardly, longest=16, window=1) == Plan(0)
    assert pacing.weigh(plan, replace(SURE, alone=True), longest=16, window=1).tokens > 4


def test_what_becomes_of_it_says_nothing_of_the_model() -> None:
    pacing = measured()
    before = pacing.conditions(1)
    for _ in range(20):
        pacing.learn(lesson(Plan(4), 0, token_s=0.0001, repeats=True))
    after = pacing.conditions(1)
    assert (after.acceptance, after.token_s) == (before.acceptance, before.token_s)


def test_where_drafts_have_a_fixed_length_it_is_taken_where_it_is_sure() -> None:
    fixed = FixedPacing(4)
    assert fixed.weigh(Plan(4), SURE, longest=16, window=1) == Plan(4, repeats=True)
    assert fixed.weigh(Plan(4), UNSURE, longest=16, window=1) == Plan(4)
    assert fixed.weigh(Plan(8, edge_only=True), SURE, longest=16, window=1) == Plan(8, edge_only=True)

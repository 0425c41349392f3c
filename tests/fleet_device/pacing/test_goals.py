import random
from typing import Any

import pytest
from hypothesis import given, strategies as st

from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import DraftOutcome, Plan
from fleet_device.pacing.estimates import Conditions
from fleet_device.pacing.plans import MESSAGE_BYTES, MOST_SLOWER, SPEED, Prices, best_plan, prices_of
from fleet_device.settings import Goal, Power

LONGEST, WINDOW = 16, 4
BOARD = Power(drafting_w=7.0, idle_w=3.0, joules_per_mb=20.0)
ENERGY, BYTES = prices_of(Goal.ENERGY, BOARD), prices_of(Goal.BYTES, BOARD)

CONDITIONS = st.builds(
    Conditions,
    acceptance=st.floats(0.0, 0.99),
    token_s=st.floats(1e-4, 0.2),
    beside_s=st.floats(1e-3, 0.5),
    compute_s=st.floats(0.0, 0.5),
    compute_token_s=st.floats(0.0, 0.05),
    window=st.integers(1, 8),
)


def candidates() -> list[Plan]:
    return [Plan(n) for n in range(LONGEST + 1)] + [Plan(n, ahead=True) for n in range(1, LONGEST + 1)]


def cost(prices: Prices, under: Conditions, plan: Plan) -> float:
    """Return watts times seconds, or bytes, of a token of a plan."""
    committed, seconds = under.cycle(plan)
    drafting_s, drafts = under.drafting(plan)
    sent = drafts * (2 * MESSAGE_BYTES + 5 * plan.tokens) + 100 * (1 - under.acceptance**plan.tokens)
    if prices is BYTES:
        return sent / committed
    watts = BOARD.idle_w * seconds + (BOARD.drafting_w - BOARD.idle_w) * drafting_s
    return (watts + BOARD.joules_per_mb * sent / 1e6) / committed


@pytest.mark.parametrize("prices", [ENERGY, BYTES], ids=["energy", "bytes"])
@given(under=CONDITIONS, edge_only=st.floats(0.0, 100.0))
def test_the_plan_is_the_cheapest_that_is_not_much_slower_than_the_fastest(
    prices: Prices, under: Conditions, edge_only: float
) -> None:
    chosen = best_plan(under, under, longest=LONGEST, prices=prices, edge_only=edge_only)
    rates = {plan: under.rate(plan) for plan in candidates()}
    fastest = max(rates.values())
    bound = min(fastest, max(fastest, edge_only) / MOST_SLOWER) * (1 - 1e-9)
    assert rates[chosen] >= bound
    least = min(cost(prices, under, plan) for plan, rate in rates.items() if rate >= min(fastest, bound * (1 + 1e-6)))
    assert cost(prices, under, chosen) <= least / 0.98 + 1e-9


@given(CONDITIONS, st.floats(0.7, 1.0), st.integers(0, LONGEST), st.sampled_from([None, False, True]))
def test_with_the_goal_speed_the_highest_rate_counts_as_ever(
    under: Conditions, trust: float, longest: int, ahead: bool | None
) -> None:
    rates = {} if ahead and longest else {Plan(n): under.rate(Plan(n)) for n in range(longest + 1)}
    if ahead is not False:
        rates |= {Plan(n, ahead=True): trust * under.rate(Plan(n, ahead=True)) for n in range(1, longest + 1)}
    expected = next(plan for plan, rate in rates.items() if rate >= 0.98 * max(rates.values()))
    chosen = best_plan(under, under, longest=longest, ahead=ahead, trust=trust, edge_only=1e3)
    assert chosen == expected


def test_without_figures_energy_is_the_time_of_the_draft_model() -> None:
    under = Conditions(acceptance=0.7, token_s=0.02, beside_s=0.05, compute_s=0.05)
    chosen = best_plan(under, under, longest=LONGEST, prices=prices_of(Goal.ENERGY, Power()))
    fastest = max(map(under.rate, candidates()))
    needs = {
        plan: under.drafting(plan)[0] / under.cycle(plan)[0]
        for plan in candidates()
        if under.rate(plan) >= fastest / MOST_SLOWER
    }
    assert needs[chosen] <= min(needs.values()) / 0.98


Used = tuple[float, float, float]


def live(
    prices: Prices, *, token_s: float, edge_only_s: float, acceptance: float = 0.8, round_trip_s: float = 0.02
) -> Used:
    """Follow the plans for a while; return tokens/s, joules and bytes per token after learning."""
    pacing, rng = AdaptivePacing(edge_only=None, prices=prices), random.Random(5)
    tokens, seconds, drafting_s, sent = 0, 0.0, 0.0, 0.0
    for number in range(400):
        if number == 100:
            tokens, seconds, drafting_s, sent = 0, 0.0, 0.0, 0.0
        plan = pacing.plan(longest=LONGEST, window=WINDOW)
        if plan.edge_only:
            for _ in range(plan.tokens // 4):
                pacing.learn_edge_only(2, 2 * edge_only_s, step_s=edge_only_s)
            tokens, seconds = tokens + plan.tokens // 2, seconds + edge_only_s * (plan.tokens // 2)
            sent += MESSAGE_BYTES * (1 + plan.tokens // 4)
            continue
        accepted = next((n for n in range(plan.tokens) if rng.random() >= acceptance), plan.tokens)
        step_s = edge_only_s * (1.0 + 0.05 * plan.tokens)
        answer_s = round_trip_s + step_s
        pacing.learn(
            DraftOutcome(
                tokens=plan.tokens, ahead=plan.ahead, accepted=accepted, token_s=token_s, answer_s=answer_s,
                compute_s=step_s,
            )
        )  # fmt: skip
        # Drafting ahead hides the answer: the slower of the two counts.
        draft_s = token_s * plan.tokens
        seconds += max(draft_s, step_s) if plan.ahead and accepted == plan.tokens else draft_s + answer_s
        drafting_s += draft_s + (answer_s if plan.ahead and accepted < plan.tokens else 0.0)
        tokens += accepted + (0 if plan.ahead and accepted == plan.tokens else 1)
        sent += 2 * MESSAGE_BYTES + 5 * plan.tokens + (100 if accepted < plan.tokens else 0)
    joules = 3.0 * seconds + 4.0 * drafting_s + 20e-6 * sent
    return tokens / seconds, joules / tokens, sent / tokens


@pytest.mark.parametrize("token_s", [0.005, 0.04])
@pytest.mark.parametrize("edge_only_s", [0.02, 0.075, 0.2])
def test_each_goal_saves_what_it_names_and_keeps_half_of_the_speed(token_s: float, edge_only_s: float) -> None:
    place: dict[str, Any] = {"token_s": token_s, "edge_only_s": edge_only_s}
    speed, energy, sent = (live(prices, **place) for prices in (SPEED, ENERGY, BYTES))
    assert energy[1] <= 1.05 * min(speed[1], sent[1])
    assert sent[2] <= 1.05 * min(speed[2], energy[2])
    assert min(energy[0], sent[0]) >= speed[0] / MOST_SLOWER / 1.1


@pytest.mark.parametrize("edge_only", [None, False])
def test_while_it_is_throttled_the_draft_model_rests_and_the_reason_is_told(edge_only: bool | None) -> None:
    heat: list[str | None] = [None]
    pacing = AdaptivePacing(edge_only=edge_only, throttled=lambda: heat[0])

    def write(plans: int) -> list[Plan]:
        found = []
        for _ in range(plans):
            plan = pacing.plan(longest=LONGEST, window=WINDOW)
            found.append(plan)
            if plan.edge_only:
                pacing.learn_edge_only(plan.tokens, 0.2 * plan.tokens, step_s=0.2)
            else:
                outcome = DraftOutcome(
                    tokens=plan.tokens, ahead=plan.ahead, accepted=plan.tokens, token_s=0.005, answer_s=0.22,
                    compute_s=0.2,
                )  # fmt: skip
                pacing.learn(outcome)
        return found

    assert write(40)[-1].tokens > 1
    assert pacing.choice().plan != "edge-only"
    heat[0] = "The processor is throttled."
    assert all(plan.edge_only or plan.tokens == 1 for plan in write(10))
    assert all(plan.edge_only == (edge_only is None) for plan in write(10))
    assert heat[0] in pacing.choice().reason
    assert pacing.choice().plan == ("edge-only" if edge_only is None else "draft")
    heat[0] = None
    assert not any(plan.edge_only for plan in write(3))
    assert "throttled" not in pacing.choice().reason


def test_an_edge_that_is_much_slower_alone_is_not_left_alone_to_save_energy() -> None:
    fast, _, _ = live(SPEED, token_s=0.002, edge_only_s=0.3, acceptance=0.95)
    saving, _, _ = live(ENERGY, token_s=0.002, edge_only_s=0.3, acceptance=0.95)
    assert fast > MOST_SLOWER / 0.3
    assert saving >= fast / MOST_SLOWER / 1.1

import pytest

from benchmarks.fleet_load import Written, WrittenTexts, mean_pace
from benchmarks.pacing import CHOSEN, PLANS, STREAM, Outcome, compared


def outcome(*rounds: float, learning: float = 5.0) -> Outcome:
    return {"rounds": list(rounds), "tokens_per_s": sorted(rounds)[len(rounds) // 2], "learning": learning}


def test_chosen_plans_are_compared_round_by_round_with_the_best_fixed_one_and_with_edge_only_decoding() -> None:
    outcomes = {plan: outcome(5.0, 5.0, 5.0) for plan in PLANS}
    outcomes[CHOSEN] = outcome(9.0, 9.0, 40.0, learning=4.0)  # the best of all, but not a fixed plan
    outcomes["4"] = outcome(10.0, 10.0, 10.0)
    outcomes[STREAM] = outcome(6.0, 6.0, 20.0, learning=8.0)
    found = compared(outcomes)
    assert (found["best"], found["auto_over_best"]) == ("4", pytest.approx(0.9))
    assert found["auto_over_stream"] == pytest.approx(1.5)
    assert found["while_learning"] == pytest.approx(0.5)
    assert found["stream_again"] == pytest.approx(5.0 / 6.0)


def test_a_devices_pace_leaves_its_prompt_out_and_the_fleets_counts_it() -> None:
    quick = Written(100.0, [(101.0, 2), (102.0, 3), (103.5, 4)])
    slow = Written(100.5, [(104.0, 1), (106.0, 2)])
    texts = WrittenTexts((quick, slow), seconds=6.0)
    assert texts.tokens == 12
    assert mean_pace([texts]) == pytest.approx((7 + 2) / (2.5 + 2.0))
    assert texts.tokens_per_s == pytest.approx(2.0)

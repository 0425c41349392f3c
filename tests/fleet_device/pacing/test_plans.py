from dataclasses import replace

import pytest

from fleet_device.pacing.contract import Plan, SharedSteps
from fleet_device.pacing.estimates import Conditions
from fleet_device.pacing.plans import Alternatives, prices_of
from fleet_device.settings import Goal, Power

EDGE_ONLY = Plan(32, edge_only=True)
USUAL = Conditions(acceptance=0.8, token_s=0.01, beside_s=0.02, compute_s=0.03, compute_token_s=0.002)
SHARED = SharedSteps(requests=16, writing_s=0.1, step_s=0.03, request_s=0.005, token_s=0.006)
JOULES = prices_of(Goal.ENERGY, Power(drafting_w=7.0, idle_w=3.0, joules_per_mb=20.0))


def reason(conditions: Conditions | None = USUAL, *, chosen: Plan = EDGE_ONLY, **given: object) -> str:
    return Alternatives(
        **{"waiting": conditions, "edge_only": 81.0, "edge_only_value": 81.0, "longest": 8} | given
    ).reason(chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (replace(USUAL, token_s=0.052), "52 ms"),
        (replace(USUAL, acceptance=0.12), "12 %"),
        (replace(USUAL, beside_s=0.47), "470 ms"),
        (replace(USUAL, compute_token_s=0.061), "61 ms"),
        (replace(USUAL, shared=SHARED), "16 requests"),
    ],
    ids=["slow drafts", "bad drafts", "far away", "costly rows", "shared steps"],
)
def test_the_reason_names_both_rates_and_what_keeps_drafting_from_being_faster(
    conditions: Conditions, expected: str
) -> None:
    rate = max(conditions.rate(Plan(tokens)) for tokens in ((1, 2, 4, 8) if conditions.shared else range(1, 9)))
    figure = f"{rate:.0f} tokens/s" if rate >= 10 else f"{rate:.1f} tokens/s"
    found = reason(conditions)
    assert figure in found
    assert "81" in found
    assert expected in found
    assert "80 %" not in found  # the others are as good as they are elsewhere


def test_a_device_that_drafts_says_what_the_edge_alone_would_give() -> None:
    found = reason(edge_only=31.0, edge_only_value=31.0, chosen=Plan(4))
    assert all(figure in found for figure in ("31", "80 %", "10 ms"))


def test_edge_only_decoding_has_another_reason_once_drafts_gain_enough() -> None:
    rate = max(USUAL.rate(Plan(tokens)) for tokens in range(1, 9))
    causes = {
        reason(edge_only=rate / gain, edge_only_value=rate / gain).rpartition(":")[2] for gain in (0.9, 1.05, 1.15)
    }
    assert len(causes) == 3


def test_what_is_not_measured_or_not_allowed_has_no_rate() -> None:
    nothing = reason(None, edge_only=None)
    assert not any(map(str.isdigit, nothing))
    assert "81 tokens/s" in reason(None)
    assert "81" not in reason(edge_only=None, chosen=Plan(4))
    assert reason(longest=0) == reason(None)  # the edge allows no drafts


def test_another_goal_than_speed_has_its_costs_in_the_reason() -> None:
    value = JOULES.edge_only_value(rate=81.0, piece=1.0)
    found = reason(prices=JOULES, edge_only_value=value)
    assert found.count("J a token") == 2

import json
from pathlib import Path

import pytest

from fleet_admin.advice import (
    LARGE_CURVE,
    ServiceLevel,
    Workload,
    drafting,
    edge_only,
    find,
    find_capacity,
)
from fleet_device.pacing.contract import Plan
from fleet_edge.step_curve import read_curve
from tests.support.step_curves import AVX2, CHEAP_TOKENS, EPYC_CORE


def test_an_edge_serves_as_many_streams_as_a_step_leaves_time_for() -> None:
    workload = Workload(curve=AVX2, prompt_tokens=1, text_tokens=1 << 16)

    def capacity(level: ServiceLevel) -> int:
        return find_capacity(lambda devices: edge_only(workload, devices), level)

    # A step may take 125 ms, which is 35 sessions: between 16 (68 ms) and 64 (242 ms).
    assert capacity(ServiceLevel(8.0, 0.25)) == pytest.approx(31.7, abs=1)
    assert capacity(ServiceLevel(8.0, 0.068)) == 16
    assert capacity(ServiceLevel(1000.0, 0.25)) == 0


def test_drafting_pays_where_tokens_are_cheap_and_a_step_is_long() -> None:
    given = {"draft_s": 0.01, "acceptance": 0.7, "round_trip_s": 0.02}
    cheap = find(Workload(curve=CHEAP_TOKENS, **given), ServiceLevel(5.0, 0.4))
    assert cheap.loads[0].pays
    dear = find(Workload(curve=AVX2, **given), ServiceLevel())
    assert dear.pays_with == []
    gains = dear.loads[0].gains
    assert gains[8] > gains[1]  # drafting and the network matter less


def test_the_busier_the_edge_the_less_each_device_gets() -> None:
    workload = Workload(curve=AVX2, draft_s=0.01, acceptance=0.7, round_trip_s=0.02)
    for plan in (Plan(4), Plan(4, ahead=True)):
        rates = [drafting(workload, devices, plan) for devices in (1, 4, 16, 64)]
        each = [rate.tokens_per_s for rate in rates]
        assert each == sorted(each, reverse=True)
        assert rates[-1].busy == pytest.approx(1.0, abs=0.01)


def test_the_balance_is_where_a_step_takes_twice_as_long() -> None:
    assert (AVX2.balance(), CHEAP_TOKENS.balance()) == (3, 161)


def test_estimates_are_within_15_percent_of_the_measured_capacity() -> None:
    """Up to the 16 devices that the curve covers, in residual mode."""
    recorded = json.loads(Path("benchmarks/results/capacity.json").read_text(encoding="utf-8"))
    ratios = {}
    for row in recorded["rows"]:
        if row["devices"] > EPYC_CORE.max_sessions:
            continue
        if row["system"] not in ("edge-only-residual", "dssd-dense"):
            continue
        workload = Workload(
            curve=EPYC_CORE,
            draft_s=(row["draft_token_ms"] or 0.0) / 1e3,
            acceptance=row["acceptance"] or 0.0,
            round_trip_s=row["rtt_ms"] / 1e3,
            text_tokens=round(row["text_tokens"]),
            prompt_tokens=36,
        )
        drafted = row["system"] == "dssd-dense"
        rate = drafting(workload, row["devices"], Plan(4)) if drafted else edge_only(workload, row["devices"])
        name = (row["system"], row["draft"], row["devices"])
        ratios[name] = rate.tokens_per_s * row["devices"] / row["tokens_per_s"]
    assert len(ratios) == 9
    assert all(0.85 <= ratio <= 1.15 for ratio in ratios.values()), ratios


@pytest.mark.parametrize(("prompt_tokens", "more_ms"), [(60, 250.0), (4000, 105.0)])
def test_prompts_lengthen_steps_no_more_than_the_scheduler_lets_them(prompt_tokens: int, more_ms: float) -> None:
    curve = read_curve(LARGE_CURVE)
    rate = edge_only(Workload(curve=curve, prompt_tokens=prompt_tokens, text_tokens=32), 4)
    assert rate.gap_s * 1e3 == pytest.approx(curve.step_ms(4, 1) + more_ms)

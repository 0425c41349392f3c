import json
from dataclasses import replace
from pathlib import Path

import pytest

from fleet_admin.advice import (
    Assumptions,
    DeviceTraffic,
    ServiceLevel,
    Workload,
    drafting,
    edge_only,
    find,
    find_capacity,
    need_of,
    traffic_of,
)
from fleet_device.pacing.contract import Plan
from schemas.policy import Mode
from tests.support.step_curves import AVX2, CHEAP_TOKENS, EPYC_CORE

TRAFFIC = DeviceTraffic(
    tokens_per_s=10.0, up_messages=0.3, down_messages=0.2, up_bytes=12.0, down_bytes=8.0, verdicts=0.25, texts_per_s=0.1
)
ASSUMED = Assumptions(writing=0.1, headroom=0.5)


def test_what_a_fleet_needs_is_worked_out_from_what_one_device_causes() -> None:
    need = need_of(10_000, per_edge=41, traffic=TRAFFIC, assumptions=ASSUMED)
    assert need.writing == 1000
    assert need.edges == 50  # 20 each
    assert need.messages_per_s == pytest.approx(5000.0)
    assert need.brokers == 1
    assert need.bytes_per_s == pytest.approx(200_000.0)
    assert need.rows_per_s == pytest.approx(1000 * 0.1 * 2 + 1000 * 10 * 0.25)
    assert need.updates_per_s == pytest.approx(1000 / 5)


def test_brokers_are_as_many_as_their_messages_or_connections_need() -> None:
    assert need_of(100_000, per_edge=41, traffic=TRAFFIC, assumptions=ASSUMED).brokers == 5
    quiet = replace(TRAFFIC, tokens_per_s=0.001)
    assert need_of(1_000_000, per_edge=41, traffic=quiet, assumptions=ASSUMED).brokers == 50


def test_a_coupled_draft_costs_the_bytes_that_the_protocol_promises() -> None:
    workload = Workload(curve=CHEAP_TOKENS, acceptance=1.0, text_tokens=600)
    rate = drafting(workload, 1, Plan(5))
    coupled = traffic_of(workload, rate, Assumptions(mode=Mode.COUPLED))
    # Six tokens per round: a draft of at most 36 bytes and a verdict of at most 20, each in a packet with about 15
    # bytes of overhead, and an acknowledgement each way.
    assert 20 / 6 < coupled.up_bytes < (36 + 15 + 4 + 3) / 6
    assert 10 / 6 < coupled.down_bytes < (20 + 15 + 4 + 3) / 6
    assert coupled.verdicts == pytest.approx(1 / 6, rel=0.02)
    assert traffic_of(workload, rate, Assumptions(mode=Mode.RESIDUAL)).up_bytes > coupled.up_bytes


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
        if row["arrivals"] != "at-once" or row["devices"] > EPYC_CORE.most_sessions:
            continue
        if row["system"] not in ("edge-streaming-residual", "dssd-dense"):
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

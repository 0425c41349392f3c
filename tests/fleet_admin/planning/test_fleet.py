from dataclasses import replace

import pytest

from fleet_admin.planning.advice import Assumptions, DeviceTraffic, find_capacity, need_of, traffic_of
from fleet_admin.planning.scenario import EdgeLimits, RunTiming, Scenario, drafting, streaming
from fleet_admin.planning.service_level import ServiceLevel
from fleet_admin.planning.simulation import simulate
from schemas.policy import Mode
from tests.fleet_admin.planning.curves import AVX2, CHEAP_TOKENS

TRAFFIC = DeviceTraffic(
    tokens_per_s=10.0, up_messages=0.3, down_messages=0.2, up_bytes=12.0, down_bytes=8.0, verdicts=0.25, texts_per_s=0.1
)
ASSUMED = Assumptions(writing=0.1, headroom=0.5, broker_messages=1000.0, broker_connections=5000, trace_share=0.5)


def test_what_a_fleet_needs_is_worked_out_from_what_one_device_causes() -> None:
    need = need_of(10_000, per_edge=41, traffic=TRAFFIC, assumptions=ASSUMED)
    assert need.writing == 1000
    assert need.edges == 50  # 20 each
    assert need.messages_per_s == pytest.approx(5000.0)
    assert need.brokers == 5
    assert need.bytes_per_s == pytest.approx(200_000.0)
    assert need.rows_per_s == pytest.approx(1000 * 0.1 * 2 + 1000 * 10 * 0.25 * 0.5)
    assert need.updates_per_s == pytest.approx(1000 / 5)


def test_brokers_are_as_many_as_their_connections_need() -> None:
    need = need_of(100_000, per_edge=41, traffic=replace(TRAFFIC, tokens_per_s=0.001), assumptions=ASSUMED)
    assert need.brokers == 20


def test_a_coupled_text_costs_the_bytes_that_the_protocol_promises() -> None:
    outcome = simulate(
        Scenario(curve=CHEAP_TOKENS, devices=1, plan=drafting(5), acceptance=1.0, texts=1, text_tokens=600)
    )
    coupled = traffic_of(outcome, Assumptions(mode=Mode.COUPLED))
    # Six tokens per round: a draft of at most 36 bytes and a verdict of at most 20, each in a packet with about 15
    # bytes of overhead, and an acknowledgement each way.
    assert 20 / 6 < coupled.up_bytes < (36 + 15 + 4 + 3) / 6
    assert 10 / 6 < coupled.down_bytes < (20 + 15 + 4 + 3) / 6
    assert coupled.verdicts == pytest.approx(1 / 6, rel=0.02)
    assert traffic_of(outcome, Assumptions(mode=Mode.RESIDUAL)).up_bytes > coupled.up_bytes


def test_an_edge_holds_as_many_streams_as_a_step_leaves_time_for() -> None:
    given = Scenario(
        curve=AVX2,
        devices=1,
        plan=streaming,
        limits=EdgeLimits(piece_s=0.0),
        prompt_tokens=1,
        timing=RunTiming(window_s=4.0, settle_s=1.0),
    )
    # A step may take 125 ms, which is 31 sessions: between 16 (68 ms) and 64 (242 ms).
    held = find_capacity(given, ServiceLevel(8.0, 0.25), share=0.95)
    assert held.devices == pytest.approx(31, abs=2)
    assert held.measured
    assert find_capacity(given, ServiceLevel(1000.0, 0.25), share=0.95).devices == 0

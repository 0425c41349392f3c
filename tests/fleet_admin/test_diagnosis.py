from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, strategies as st

from fleet_admin.diagnosis import (
    Busiest,
    Cause,
    Conclusion,
    DeviceFacts,
    EdgeFacts,
    conclude_device,
    conclude_edge,
)
from fleet_admin.token_time import TimePart, TokenTime, token_time
from fleet_edge.session_log.totals import SpentTime
from fleet_edge.session_log.views import DeviceCounters, Tally

ROUNDS, TOKENS = 140, 400

# A device that drafts four tokens of 10 ms, for steps of 40 ms over a link of 15 ms.
REPORTED = DeviceCounters(
    tokens=TOKENS,
    rounds=ROUNDS,
    drafted=560,
    tested=400,
    accepted=280,
    uplink_bytes=0,
    downlink_bytes=0,
    draft_ms=5600.0,
    wait_ms=9400.0,
    wall_ms=15_200.0,
    quota_wait_ms=0.0,
    unverified=0,
)
COUNTED = Tally(
    sessions=4,
    segments=4,
    duration_ms=15_150.0,
    tokens=TOKENS,
    rounds=ROUNDS,
    drafted=560,
    tested=400,
    accepted=280,
    queue_ms=1400.0,
    compute_ms=5600.0,
    batch_sum=2 * ROUNDS,
    prefill_ms=300.0,
)
SOUND = SpentTime(REPORTED, COUNTED)


def longer(ms: float, *, at_edge: str = "", waiting: bool = True, **others: Any) -> SpentTime:
    """Return the sound device's time with so much more, which the edge counts as `at_edge`."""
    wait_ms = REPORTED.wait_ms + ms * waiting
    reported = replace(REPORTED, wait_ms=wait_ms, wall_ms=REPORTED.wall_ms + ms, **others)
    counted = replace(COUNTED, duration_ms=COUNTED.duration_ms + ms)
    if at_edge:
        counted = replace(counted, **{at_edge: getattr(counted, at_edge) + ms})
    return SpentTime(reported, counted)


def time_of(spent: SpentTime) -> TokenTime:
    time = token_time(spent)
    assert time is not None
    return time


OTHERS = [time_of(SOUND)] * 3


def of_device(spent: SpentTime, **given: Any) -> list[Conclusion]:
    known: dict[str, Any] = {"others": OTHERS, "alike": OTHERS} | given
    return conclude_device(DeviceFacts(name="gateway-1", edge="edge-1", own=time_of(spent), **known))


def of_edge(spent: SpentTime, **given: Any) -> list[Conclusion]:
    known: dict[str, Any] = {"others": OTHERS} | given
    return conclude_edge(EdgeFacts(name="edge-1", edge="edge-1", own=time_of(spent), **known))


def refused() -> SpentTime:
    """Return the time of a device whose sessions wait for an edge."""
    spent = longer(20_000.0)
    return replace(spent, counted=COUNTED)


def rejected() -> SpentTime:
    """Return the time of a device of whose drafts the edge accepts nothing."""
    rounds = TOKENS
    reported = replace(REPORTED, rounds=rounds, drafted=4 * rounds, tested=rounds, accepted=0)
    reported = replace(reported, draft_ms=16_000.0, wait_ms=26_000.0, wall_ms=42_200.0)
    counted = replace(COUNTED, rounds=rounds, drafted=4 * rounds, tested=rounds, accepted=0, duration_ms=42_150.0)
    counted = replace(counted, queue_ms=4000.0, compute_ms=16_000.0, batch_sum=2 * rounds)
    return SpentTime(reported, counted)


def edge_only() -> SpentTime:
    """Return the time of a device that uses edge-only decoding, of which each piece has two tokens."""
    nothing = {"drafted": 0, "tested": 0, "accepted": 0, "rounds": 200}
    reported = replace(REPORTED, **nothing, draft_ms=0.0, wait_ms=20_400.0, wall_ms=20_600.0)
    counted = replace(COUNTED, **nothing, edge_only=TOKENS, duration_ms=20_550.0, queue_ms=200.0)
    return SpentTime(reported, replace(counted, compute_ms=200 * 40.0, batch_sum=400))


SLOW_STEPS = longer(14_000.0, at_edge="compute_ms")
BUSY = Busiest("gateway-9", 0.7, 5)
SLOW_DRAFTING = longer(20_000.0, waiting=False, draft_ms=25_600.0)
HOT = "The processor is throttled at 85 °C: the firmware limits its frequency."

PLANTED_IN_DEVICES: dict[str, tuple[Cause, SpentTime, dict[str, Any]]] = {
    "the link": (Cause.LINK, longer(28_000.0), {}),
    "the link of a whole fleet": (Cause.LINK, longer(28_000.0), {"others": [time_of(longer(28_000.0))]}),
    "the link of the only device": (Cause.LINK, longer(28_000.0), {"others": []}),
    "the queue": (Cause.OVERLOADED, longer(20_000.0, at_edge="queue_ms"), {"busiest": BUSY}),
    "its own share": (
        Cause.OWN_SHARE,
        longer(20_000.0, at_edge="queue_ms"),
        {"busiest": replace(BUSY, device="gateway-1")},
    ),
    "steps slower than other devices'": (Cause.SLOW_STEPS, SLOW_STEPS, {}),
    "steps slower than earlier": (Cause.SLOW_STEPS, SLOW_STEPS, {"others": [], "earlier_step_ms": 40.0}),
    "steps that all find slow": (Cause.SLOW_STEPS, longer(40_000.0, at_edge="compute_ms"), {"others": []}),
    "a slow processor": (Cause.SLOW_DRAFTING, SLOW_DRAFTING, {}),
    "a throttled processor": (Cause.THROTTLED, SLOW_DRAFTING, {"throttled": HOT}),
    "a throttled processor, whose draft model rests": (
        Cause.THROTTLED,
        edge_only(),
        {"plan": "edge-only", "plan_reason": HOT, "throttled": HOT},
    ),
    "throttled processors everywhere": (Cause.THROTTLED, SOUND, {"throttled": HOT}),
    "a draft model that is too large": (
        Cause.SLOW_DRAFTING,
        SLOW_DRAFTING,
        {"others": [], "alike": []},
    ),
    "bad drafts": (Cause.REJECTED_DRAFTS, rejected(), {}),
    "bad drafts of the only device": (Cause.REJECTED_DRAFTS, rejected(), {"others": []}),
    "a full edge": (Cause.FULL, refused(), {"refused": {"busy": 40}}),
    "no edge": (Cause.FULL, refused(), {}),
    "a quota": (Cause.QUOTA, longer(20_000.0, quota_wait_ms=20_000.0), {}),
    "prompts": (Cause.PROMPTS, longer(10_000.0, at_edge="prefill_ms"), {}),
    "a compilation": (Cause.GRAMMAR, replace(refused(), counted=replace(COUNTED, grammar_ms=20_000.0)), {}),
    "masks": (
        Cause.GRAMMAR,
        replace(SLOW_STEPS, counted=replace(SLOW_STEPS.counted, grammar_ms=14_000.0)),
        {"earlier_step_ms": 130.0},
    ),
    "edge-only decoding": (Cause.EDGE_ONLY, edge_only(), {"plan": "edge-only", "plan_reason": "The settings say so."}),
}
PLANTED_AT_EDGES: dict[str, tuple[Cause, SpentTime, dict[str, Any]]] = {
    "full": (Cause.FULL, refused(), {"refused": {"busy": 40}}),
    "overloaded": (Cause.OVERLOADED, longer(20_000.0, at_edge="queue_ms"), {}),
    "slow steps": (Cause.SLOW_STEPS, SLOW_STEPS, {"others": [], "earlier_step_ms": 40.0}),
    "grammars": (
        Cause.GRAMMAR,
        replace(SLOW_STEPS, counted=replace(SLOW_STEPS.counted, grammar_ms=14_000.0)),
        {"earlier_step_ms": 130.0},
    ),
    "prompts": (Cause.PROMPTS, longer(10_000.0, at_edge="prefill_ms"), {}),
    "one device": (Cause.ONE_DEVICE, SOUND, {"busiest": replace(BUSY, share=0.9)}),
    "memory": (Cause.KV_MEMORY, longer(10_000.0, at_edge="prefill_ms"), {"kv_usage": 0.95}),
}


@pytest.mark.parametrize("planted", PLANTED_IN_DEVICES)
def test_the_first_conclusion_about_a_device_is_the_planted_cause(planted: str) -> None:
    cause, spent, given = PLANTED_IN_DEVICES[planted]
    assert next(iter(of_device(spent, **given))).cause is cause


@pytest.mark.parametrize("planted", PLANTED_AT_EDGES)
def test_the_first_conclusion_about_an_edge_is_the_planted_cause(planted: str) -> None:
    cause, spent, given = PLANTED_AT_EDGES[planted]
    assert next(iter(of_edge(spent, **given))).cause is cause


def test_the_reason_of_edge_only_decoding_and_the_device_that_takes_most_are_named() -> None:
    reason = "Edge-only decoding 31.0 tokens/s; drafting 12.0 tokens/s with 4 a draft."
    assert reason in of_device(edge_only(), plan="edge-only", plan_reason=reason)[0].sentence
    assert "gateway-9" in of_device(longer(20_000.0, at_edge="queue_ms"), busiest=BUSY)[0].sentence
    assert "gateway-9" in of_edge(SOUND, busiest=replace(BUSY, share=0.9))[0].sentence


def test_a_throttled_device_is_named_though_other_parts_are_longer_and_so_is_the_heat_of_a_slow_one() -> None:
    found = of_device(longer(28_000.0), throttled=HOT)
    assert [each.cause for each in found] == [Cause.LINK, Cause.THROTTLED]
    assert found[1].sentence == HOT
    assert "83 °C" in of_device(SLOW_DRAFTING, temperature_c=83.2)[0].sentence


def test_a_device_that_needs_less_time_than_others_has_no_long_part() -> None:
    slow = time_of(longer(28_000.0, at_edge="compute_ms"))
    assert of_device(longer(2800.0), others=[slow], alike=[slow]) == []


def test_too_few_tokens_allow_no_conclusion() -> None:
    assert token_time(SpentTime(replace(REPORTED, tokens=15), COUNTED)) is None


# Parts


def test_the_parts_of_a_tokens_time_are_what_device_and_edge_have_counted() -> None:
    parts = {part: TOKENS * ms for part, ms in time_of(SOUND).parts.items()}
    assert parts == pytest.approx(
        {
            TimePart.DRAFTING: 5600.0,
            TimePart.LINK: 2050.0,
            TimePart.QUEUE: 1400.0,
            TimePart.STEPS: 5600.0,
            TimePart.PROMPT: 300.0,
            TimePart.GRAMMAR: 0.0,
            TimePart.SESSION: 50.0,
            TimePart.QUOTA: 0.0,
            TimePart.REST: 200.0,
        }
    )


def test_a_device_that_drafts_ahead_waits_for_the_link_in_proportion() -> None:
    """It waits for 2 s of 42 s in which its drafts were away: 28 s of these on the link."""
    spent = SpentTime(replace(REPORTED, wait_ms=2050.0, wall_ms=8000.0), replace(COUNTED, duration_ms=7950.0))
    time = token_time(spent, round_trip_ms=300.0)
    assert time is not None
    assert time.parts[TimePart.LINK] * TOKENS == pytest.approx(2000.0 * (42_000 - 7300) / 42_000)
    assert time.parts[TimePart.STEPS] * TOKENS == pytest.approx(2000.0 * 5600 / 42_000)


def test_each_token_of_edge_only_decoding_counts_a_step_though_its_pieces_have_several() -> None:
    time = time_of(edge_only())
    assert time.parts[TimePart.STEPS] * TOKENS == pytest.approx(TOKENS * 40.0)
    assert time.step_ms == 40.0


FIGURES: st.SearchStrategy[float] = st.floats(0.0, 1e6)


@st.composite
def any_times(draw: st.DrawFn) -> SpentTime:
    def any_of(kind: type) -> dict[str, Any]:
        return {each.name: draw(FIGURES if each.type is float else st.integers(0, 10_000)) for each in fields(kind)}

    return SpentTime(DeviceCounters(**any_of(DeviceCounters)), Tally(**any_of(Tally) | {"sessions": 4, "resampled": 0}))


@given(
    own=any_times(),
    other=any_times(),
    busiest=st.floats(0.0, 1.0),
    kv=st.floats(0.0, 1.0),
    rtt=st.none() | FIGURES,
    hot=st.sampled_from([None, HOT]),
)
def test_shares_add_up_to_one_at_most_and_fall(
    own: SpentTime, other: SpentTime, busiest: float, kv: float, rtt: float | None, hot: str | None
) -> None:
    if (time := token_time(own, round_trip_ms=rtt)) is None:
        return
    assert all(ms >= -1e-6 for ms in time.parts.values())
    assert time.total_ms == pytest.approx(own.reported.wall_ms / own.reported.tokens)
    given_ones: dict[str, Any] = {
        "own": time,
        "others": [each for each in [token_time(other)] if each],
        "busiest": Busiest("gateway-1", busiest, 3),
    }
    device = conclude_device(
        DeviceFacts(name="gateway-1", edge="edge-1", plan="edge-only", throttled=hot, **given_ones)
    )
    edge = conclude_edge(EdgeFacts(name="edge-1", edge="edge-1", kv_usage=kv, **given_ones))
    for found in (device, edge):
        shares = [each.share for each in found]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= 1.0 + 1e-6
        assert len({each.cause for each in found}) == len(found)


@given(st.lists(st.floats(0.9, 1.1), min_size=9, max_size=9))
def test_nothing_is_concluded_about_a_sound_fleet(factors: list[float]) -> None:
    drafting, link, queue, steps, prompts, session, rest, *_ = factors
    at_edge = {"queue_ms": 1400.0 * queue, "compute_ms": 5600.0 * steps, "prefill_ms": 300.0 * prompts}
    wait_ms = sum(at_edge.values()) + 2050.0 * link + 50.0 * session
    draft_ms = 5600.0 * drafting
    wall_ms = wait_ms + draft_ms + 200.0 * rest
    spent = SpentTime(
        replace(REPORTED, draft_ms=draft_ms, wait_ms=wait_ms, wall_ms=wall_ms),
        replace(COUNTED, duration_ms=wall_ms - 50.0 * session, **at_edge),
    )
    busiest, earlier_ms = Busiest("gateway-1", 0.25, 4), 40.0
    assert of_device(spent, busiest=busiest, earlier_step_ms=earlier_ms, plan="draft") == []
    assert of_device(spent, others=[], alike=[]) == []
    assert of_edge(spent, busiest=busiest, earlier_step_ms=earlier_ms, kv_usage=0.5) == []

"""A device under an edge's quotas waits as asked, generates the same tokens, and is never quarantined."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings, strategies as st

from fleet_device.client.decision import EdgeAvailability
from fleet_device.client.messaging import EdgePresences
from fleet_device.errors import DeviceError, SessionRefused
from fleet_device.pacing.contract import FixedPacing
from fleet_edge import limits
from schemas.codec import encode_draft
from schemas.messages import Draft, Fault, Open, Verdict
from schemas.policy import Mode
from schemas.reasons import EndReason, Finish, RefusalCode
from schemas.topics import Topic, build
from tests.support.memory_fleet import EDGE, FLEET, Clock, MemoryFleet, lossless_text, terms
from tests.support.scripted_edge import (
    DEVICE,
    PATIENCE,
    Answers,
    LoneDevice,
    ScriptedEdge,
    accepted,
    fault,
    opened,
    refusal,
)

PACINGS = (FixedPacing(0), FixedPacing(3), FixedPacing(2, ahead=True))


def expected(most: int, seed: int = 6) -> tuple[int, ...]:
    return tuple(lossless_text(terms(seed, mode=Mode.COUPLED, max_new_tokens=most)))


def fleet_with(quotas: dict[str, object], **quarantine: float) -> MemoryFleet:
    return MemoryFleet(settings={"quotas": quotas, "quarantine": quarantine})


def shut_out(fleet: MemoryFleet) -> list[str]:
    fleet.settle()
    guard = fleet.edge.handlers.guard
    return [name for name, standing in guard._standings.items() if standing.strikes.level]


def accept(_message: Open, draft: Draft) -> Answers:
    return [accepted(draft, next=1)]


def answered_first(device: LoneDevice, first: Callable[[Draft], Fault]) -> list[float]:
    """Let an edge answer the first draft with a fault; return the times of all drafts, as they come."""
    times: list[float] = []

    def answer(message: Open, draft: Draft) -> Answers:
        times.append(device.clock())
        return [first(draft)] if len(times) == 1 else accept(message, draft)

    ScriptedEdge(device.broker, on_draft=answer)
    return times


# Drafts over a quota.


@pytest.mark.parametrize("pacing", PACINGS, ids=["alone", "waiting", "ahead"])
def test_a_text_over_the_quota_of_new_tokens_takes_its_time_and_is_the_same(pacing: FixedPacing) -> None:
    fleet = fleet_with({"new_tokens_per_min": 20})
    device = LoneDevice(fleet, pacing=pacing)
    before = device.clock()
    done = device.generate(mode=Mode.COUPLED, most=40)
    assert (done.tokens, done.resumes) == (expected(40), 0)
    assert 45.0 <= device.clock() - before <= 75.0  # the first twenty at once
    assert not shut_out(fleet)


def test_a_draft_that_waits_is_sent_again_when_its_time_has_come_and_not_before() -> None:
    device = LoneDevice()
    times = answered_first(device, lambda draft: fault(draft, retry_s=2.5))
    done = device.generate(most=4)
    assert (done.reason, done.resumes) == (EndReason.LENGTH, 0)
    assert [times[1] - times[0]] == [2.5]
    assert done.counters.quota_wait_ms == 2500.0


def test_a_request_says_how_long_it_waited_for_the_quota_of_the_last_one() -> None:
    device = LoneDevice()
    opens: list[Open] = []

    def answer(message: Open) -> Answers:
        opens.append(message)
        return [refusal(message, RefusalCode.QUOTA, 2.0) if len(opens) == 1 else opened(message)]

    edge = ScriptedEdge(device.broker, on_open=answer, on_draft=accept)
    assert device.generate(most=4).counters.quota_wait_ms == 2000.0
    assert device.generate(most=4).counters.quota_wait_ms == 0.0
    assert [close.quota_wait_ms for close in edge.closes] == [2000.0, None]


def test_a_device_that_sends_too_much_of_everything_waits_with_everything() -> None:
    device = LoneDevice()
    times = answered_first(device, lambda _draft: fault(None, retry_s=0.2))
    device.generate(most=4)
    assert times[1] - times[0] == 1.0


def test_during_a_delay_not_even_missing_tokens_are_asked_for() -> None:
    device = LoneDevice(pacing=FixedPacing(4, edge_only=True))
    times: list[float] = []

    def answer(_message: Open, draft: Draft) -> Answers:
        times.append(device.clock())
        name = {"handle": draft.handle, "round": draft.round, "accepted": 0}
        if len(times) == 1:
            return [fault(None, retry_s=5.0), Verdict.model_validate(name | {"base": 1, "written": (1,)})]
        whole = {"base": draft.base, "written": (1,) * (draft.write or 0), "finish": Finish.LENGTH}
        return [Verdict.model_validate(name | whole)]

    ScriptedEdge(device.broker, on_draft=answer)
    assert device.generate(most=4).tokens == (1, 1, 1, 1)
    assert times == [100.0, 105.0]


def test_a_wait_that_is_longer_than_the_text_may_wait_ends_it_with_the_time() -> None:
    device = LoneDevice()
    edge = ScriptedEdge(
        device.broker, on_draft=lambda _m, d: [fault(d, retry_s=3600.0, sentence="Its tokens are used up.")]
    )
    before = device.clock()
    with pytest.raises(SessionRefused, match=r"^Its tokens are used up\. Ask again in 3600 s\.$") as refused:
        device.generate()
    assert (refused.value.code, refused.value.retry_s) == (RefusalCode.QUOTA, 3600.0)
    assert device.clock() == before
    device.broker.pump()
    assert [close.reason for close in edge.closes] == [EndReason.FAILED]


def test_waits_without_end_are_endured_as_long_as_a_resume_may_take() -> None:
    device = LoneDevice()
    edge = ScriptedEdge(device.broker, on_draft=lambda _m, d: [fault(d, retry_s=1.0, sentence="Another 1 s.")])
    before = device.clock()
    with pytest.raises(SessionRefused, match=r"^Another 1 s\.$"):
        device.generate()
    assert PATIENCE.resume_s - 1.0 <= device.clock() - before <= PATIENCE.resume_s + 1.0
    assert len(edge.drafts) <= PATIENCE.resume_s + 1


# Opens over a quota, or of a device that is shut out.


@pytest.mark.parametrize("code", [RefusalCode.QUOTA, RefusalCode.QUARANTINED])
def test_an_open_is_asked_again_when_its_time_has_come_if_that_is_soon(code: RefusalCode) -> None:
    times: list[float] = []
    device = LoneDevice()

    def answer(message: Open) -> Answers:
        times.append(device.clock())
        return [refusal(message, code, 3.0)] if len(times) == 1 else [opened(message)]

    ScriptedEdge(device.broker, on_open=answer, on_draft=accept)
    assert device.generate(most=4).resumes == 0
    assert times == [100.0, 103.0]


@pytest.mark.parametrize(
    ("sentence", "told"),
    [
        (
            "Shut out for another 900 s; ask its administrator.",
            r"^Shut out for another 900 s; ask its administrator\.$",
        ),
        ("Shut out.", r"^Shut out\. Ask again in 900 s\.$"),
        ("", r"^Ask again in 900 s\.$"),
    ],
)
def test_a_refusal_that_lasts_ends_the_text_at_once_and_names_the_time(sentence: str, told: str) -> None:
    device = LoneDevice()
    edge = ScriptedEdge(device.broker, on_open=lambda m: [refusal(m, RefusalCode.QUARANTINED, 900.0, sentence)])
    before = device.clock()
    with pytest.raises(SessionRefused, match=told) as refused:
        device.generate()
    assert (refused.value.code, refused.value.retry_s) == (RefusalCode.QUARANTINED, 900.0)
    assert device.clock() == before
    assert (len(edge.opens), edge.closes) == (1, [])


def test_a_refusal_without_a_time_does_not_pass() -> None:
    device = LoneDevice()
    edge = ScriptedEdge(
        device.broker, on_open=lambda m: [refusal(m, RefusalCode.QUOTA, None, "Its top_k is too large.")]
    )
    with pytest.raises(SessionRefused, match=r"^Its top_k is too large\.$"):
        device.generate()
    assert len(edge.opens) == 1


def test_until_its_time_has_come_no_edge_hears_of_further_texts() -> None:
    device = LoneDevice()
    edge = ScriptedEdge(device.broker, on_open=lambda m: [refusal(m, RefusalCode.QUOTA, 40.0)])
    with pytest.raises(SessionRefused):
        device.generate()
    device.clock.seconds += 10.0
    for _ in range(100):
        with pytest.raises(SessionRefused, match="30 s") as refused:
            device.generate()
    assert refused.value.retry_s == 30.0
    assert (len(edge.opens), edge.closes) == (1, [])
    device.clock.seconds += 26.0  # the rest is as long as it waits for an edge anyway
    with pytest.raises(SessionRefused):
        device.generate()
    assert len(edge.opens) == 2
    assert device.clock() == 140.0


def test_a_long_quarantine_is_asked_about_once_a_minute_so_that_lifting_it_is_noticed() -> None:
    clock = Clock()
    availability = EdgeAvailability(clock, EdgePresences())
    availability.note_refusal(SessionRefused(RefusalCode.QUARANTINED, "Shut out.", retry_s=math.inf))
    with pytest.raises(SessionRefused, match="60 s"):
        availability.check_refusal(5.0)
    clock.seconds += 60.0
    availability.check_refusal(0.0)


@pytest.mark.parametrize("code", [RefusalCode.BUSY, RefusalCode.VOCABULARY])
def test_what_is_no_fault_of_the_device_stands_against_no_other_text(code: RefusalCode) -> None:
    availability = EdgeAvailability(Clock(), EdgePresences())
    availability.note_refusal(SessionRefused(code, "No.", retry_s=30.0))
    assert availability.refused_s == 0.0


def test_a_device_that_is_shut_out_while_it_writes_ends_in_a_sentence_and_then_keeps_the_peace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "_FIRST_S", 30.0)
    fleet = fleet_with({}, strikes=1000.0)
    device = LoneDevice(fleet)

    def misbehave(number: int) -> None:
        if number == 4:  # another program with its certificate
            unknown = encode_draft(Draft(handle=999, round=0, epoch=0, base=0, digest=0))
            for _ in range(1500):
                device.link.publish(build(Topic.DRAFT, fleet=FLEET, device=DEVICE, edge=EDGE), unknown, qos=0)

    device.inbox.on_wait = misbehave
    with pytest.raises(SessionRefused, match="30 s") as refused:
        device.generate(most=40)
    assert (refused.value.code, refused.value.retry_s) == (RefusalCode.QUARANTINED, 30.0)
    device.inbox.on_wait = lambda _number: None
    for _ in range(3):
        with pytest.raises(SessionRefused) as refused:
            device.generate()
    assert refused.value.code is RefusalCode.QUARANTINED
    device.clock.seconds += 31.0
    assert device.generate(mode=Mode.COUPLED, most=8).tokens == expected(8)


# The promise.


@settings(max_examples=30, deadline=None)
@given(
    pacing=st.sampled_from(PACINGS),
    quotas=st.fixed_dictionaries(
        {},
        optional={
            "drafts_per_s": st.sampled_from((0.5, 2.0, 50.0)),
            "opens_per_min": st.sampled_from((1.0, 6.0, 60.0)),
            "new_tokens_per_min": st.sampled_from((6.0, 60.0, 1200.0)),
            "prompt_s_per_min": st.sampled_from((0.01, 1.0)),
            "uplink_bytes_per_s": st.sampled_from((20.0, 1000.0)),
        },
    ),
    texts=st.integers(1, 10),
)
def test_a_device_that_obeys_is_never_shut_out(pacing: FixedPacing, quotas: dict[str, object], texts: int) -> None:
    """However fast a device drafts, it is never quarantined; here everything but waiting takes no time.

    A sixth of the usual number of strikes would quarantine it.
    """
    fleet = fleet_with(quotas, strikes=50.0)
    device = LoneDevice(fleet, pacing=pacing)
    for number in range(texts):
        try:
            done = device.generate(mode=Mode.COUPLED, most=20, seed=number)
        except DeviceError:
            continue
        assert done.tokens == expected(20, number)
    assert not shut_out(fleet)
    fleet.edge.handlers.recorder.flush()
    assert not [event for event in fleet.sink.of("event") if event.kind == "quarantine"]

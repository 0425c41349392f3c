import logging
import random
from collections.abc import Sequence

import pytest

from fleet_edge.verifiers.contract import Item, Logits, VerifierError
from sampling.downlink import FormName
from schemas.messages import Fault, Verdict
from schemas.policy import Mode
from schemas.reasons import Action, FaultCode
from tests.support.memory_fleet import COUNTED_ALIKE, Device, MemoryFleet, lossless_text, run, terms


def opened(fleet: MemoryFleet, number: int, *, mode: Mode = Mode.COUPLED, length: int = 3) -> Device:
    device = Device(fleet, f"device-{number}", terms(number, mode=mode, max_new_tokens=20), length=length, ahead=False)
    device.act()
    fleet.settle()
    return device


def waiting(fleet: MemoryFleet, count: int) -> list[Device]:
    devices = [opened(fleet, number) for number in range(count)]
    for device in devices:
        device.act()
    fleet.broker.pump()
    return devices


def test_drafts_of_many_devices_are_verified_in_one_step() -> None:
    fleet = MemoryFleet()
    devices = waiting(fleet, 5)
    assert fleet.step()
    fleet.broker.pump()
    for device in devices:
        (verdict,) = device.messages
        assert isinstance(verdict, Verdict)
    assert [record.batch for record in fleet.sink.of("round")] == [5] * 5
    assert not fleet.step()


def test_the_log_agrees_with_what_the_device_counted() -> None:
    fleet = MemoryFleet()
    device = opened(fleet, 1, mode=Mode.RESIDUAL)
    run(fleet, [device], random.Random(0))
    counters = device.session.counters
    progress = fleet.sink.of("progress")[-1]
    rounds = fleet.sink.of("round")
    (closed,) = fleet.sink.of("closed")
    for name in COUNTED_ALIKE:
        assert getattr(progress, name) == getattr(counters, name), name
    assert (progress.rounds, progress.accepted, progress.uplink_bytes) == (
        len(rounds), sum(each.accepted for each in rounds), sum(each.uplink_bytes for each in rounds),
    )  # fmt: skip
    assert progress.tokens == closed.tokens == len(device.session.committed)
    assert {each.form for each in rounds} <= {"token", "sparse", "dense", None}


def test_a_session_whose_logits_are_no_numbers_is_given_up_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = MemoryFleet()
    devices = waiting(fleet, 3)
    score = fleet.verifier.score

    def spoilt(items: Sequence[Item]) -> Logits:
        logits = score(items)
        logits[: items[0].rows] = float("nan")
        return logits

    monkeypatch.setattr(fleet.verifier, "score", spoilt)
    fleet.step()
    monkeypatch.undo()
    fleet.broker.pump()
    (fault,) = devices[0].messages
    assert isinstance(fault, Fault)
    assert (fault.code, fault.action) == (FaultCode.INTERNAL, Action.GIVE_UP)
    assert "not numbers" in fault.sentence
    run(fleet, devices[1:], random.Random(0))
    assert all(device.session.committed == lossless_text(device.terms) for device in devices[1:])


@pytest.mark.parametrize(
    "error", [VerifierError("no room"), RuntimeError("CUDA"), MemoryError("none left"), ValueError("x")]
)
def test_a_step_that_fails_tells_those_who_wait_and_the_edge_goes_on(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = MemoryFleet()
    devices = waiting(fleet, 2)

    def broken(_items: Sequence[Item]) -> Logits:
        raise error

    monkeypatch.setattr(fleet.verifier, "score", broken)
    with caplog.at_level(logging.CRITICAL):
        assert fleet.step()
    monkeypatch.undo()
    fleet.broker.pump()
    faults = [event for device in devices for event in device.messages if isinstance(event, Fault)]
    assert [fault.action for fault in faults] == [Action.GIVE_UP] * 2
    assert all(str(error) in fault.sentence for fault in faults)
    # A repeated draft gets the fault again, in case it was lost.
    devices[0].messages.clear()
    devices[0].nudge()
    fleet.settle()
    (repeated,) = devices[0].messages
    assert isinstance(repeated, Fault)
    assert repeated.sentence == faults[0].sentence
    later = opened(fleet, 7)
    run(fleet, [later], random.Random(0))
    assert later.session.committed == lossless_text(later.terms)


def test_a_failed_step_computes_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fleet = MemoryFleet()
    waiting(fleet, 2)
    room = fleet.verifier.capacity()

    def broken(*_: object) -> None:
        raise ValueError("after the forward pass")

    monkeypatch.setattr("fleet_edge.orchestrator.judge_batch", broken)
    with caplog.at_level(logging.CRITICAL):
        fleet.step()
    assert fleet.verifier.capacity() >= room


def test_a_prompt_that_no_memory_holds_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    fleet = MemoryFleet(kv_tokens=20)
    asked = terms(1, mode=Mode.COUPLED, prompt=(1,) * 40)
    large = Device(fleet, "large", asked, length=3, ahead=False)
    with caplog.at_level(logging.CRITICAL):
        large.act()
        fleet.settle()
    assert [type(event).__name__ for event in large.messages] == ["Opened", "Fault"]
    small = Device(fleet, "small", terms(2, mode=Mode.COUPLED, max_new_tokens=8), length=3, ahead=False)
    run(fleet, [small], random.Random(0))
    assert small.session.committed == lossless_text(small.terms)


def test_a_verdict_that_cannot_be_given_stops_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    fleet = MemoryFleet()
    devices = waiting(fleet, 2)
    fleet.edge._receive(0.0)
    first = fleet.edge.sessions.by_name(devices[0].name, devices[0].terms.session)
    first.counters = None  # type: ignore[assignment] # any defect will do
    with caplog.at_level(logging.CRITICAL):
        fleet.step()
    fleet.broker.pump()
    assert [type(device.messages[0]) for device in devices] == [Fault, Verdict]


def test_a_message_that_cannot_be_handled_stops_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    fleet = MemoryFleet()
    handled: list[int] = []

    def broken() -> None:
        raise KeyError("defect")

    with caplog.at_level(logging.CRITICAL):
        fleet.edge.inbox.put(broken)
        fleet.edge.inbox.put(lambda: handled.append(1))
        fleet.step()
    assert handled == [1]


def test_a_draft_that_was_void_in_its_turn_is_answered_and_logged() -> None:
    fleet = MemoryFleet()
    (device,) = waiting(fleet, 1)
    session = fleet.edge.sessions.by_name(device.name, device.terms.session)
    fleet.edge._receive(0.0)
    session._digest ^= 1
    fleet.step()
    fleet.broker.pump()
    (fault,) = device.messages
    assert isinstance(fault, Fault)
    assert (fault.code, fault.action, fault.round) == (FaultCode.TOKENS_DIFFER, Action.RESUME, 0)


class SlowSteps:
    """Makes every step of the target take time; `prefills` counts the steps that verified nothing."""

    def __init__(self, fleet: MemoryFleet, monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> None:
        self.prefills = 0
        score = fleet.verifier.score

        def slowly(items: Sequence[Item]) -> Logits:
            fleet.clock.seconds += seconds
            self.prefills += not any(item.rows for item in items)
            return score(items)

        monkeypatch.setattr(fleet.verifier, "score", slowly)


def test_the_time_that_a_sessions_own_prompt_takes_is_no_queue_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One device on an idle edge never waits for another session."""
    fleet = MemoryFleet(settings={"step_tokens": 10})
    asked = terms(1, mode=Mode.COUPLED, prompt=(1,) * 60, max_new_tokens=4)
    device = Device(fleet, "device-1", asked, length=3, ahead=False)
    device.act()
    fleet.broker.pump()
    fleet.edge._receive(0.0)
    fleet.broker.pump()
    device.act()  # takes the grant and drafts at once: none of the prompt has been computed
    fleet.broker.pump()
    fleet.edge._receive(0.0)
    steps = SlowSteps(fleet, monkeypatch, seconds=0.5)
    run(fleet, [device], random.Random(0))
    assert steps.prefills >= 5
    assert device.closed.queue_ms == pytest.approx(0.0, abs=1e-6)
    progress = fleet.sink.of("progress")[-1]
    assert progress.prefill_ms == pytest.approx(500.0 * steps.prefills)
    assert progress.prefill_ms == sum(each.prefill_ms for each in fleet.sink.of("round"))


def test_rounds_in_which_nothing_was_verified_do_not_lower_the_mean_batch() -> None:
    asked_again = 0
    for number in range(20):
        # Room for a few samples, so that they sometimes fail.
        fleet = MemoryFleet(form=FormName.SAMPLES, max_packet_bytes=524)
        device = opened(fleet, number, mode=Mode.RESIDUAL)
        run(fleet, [device], random.Random(0))
        asked_again += sum(each.batch == 0 for each in fleet.sink.of("round"))
        assert device.closed.mean_batch == 1.0, number
    assert asked_again > 0

import math

import pytest

from fleet_edge.batching.scheduler import BatchingDelay, PrefillLog
from fleet_edge.batching.steps import StepTimes
from tests.support.drafts import arrived, draft, result

VERIFIED = StepTimes(10.0, 10.5, sessions=3)


def test_the_wait_for_a_step_is_queue_time() -> None:
    timed = PrefillLog().timed(result(arrived(draft(), at=9.0)), VERIFIED)
    assert (timed.batch, timed.queue_ms, timed.prefill_ms, timed.compute_ms) == (3, 1000.0, 0.0, 500.0)


def test_a_draft_that_arrives_during_the_step_before_has_not_waited_longer_than_that() -> None:
    assert PrefillLog().timed(result(arrived(draft(), at=10.25)), VERIFIED).queue_ms == 0.0


def test_the_part_of_the_wait_in_which_the_own_prompt_was_computed_is_apart() -> None:
    log = PrefillLog()
    log.add(7, StepTimes(4.0, 5.0, sessions=0))  # before the draft had come
    log.add(7, StepTimes(6.0, 7.0, sessions=2))  # it came in the middle
    log.add(7, StepTimes(8.0, 9.0, sessions=0))
    timing = log.timed(result(arrived(draft(), at=6.5)), VERIFIED)
    assert (timing.prefill_ms, timing.queue_ms) == (1500.0, 2000.0)


def test_another_sessions_prompt_is_queue_time() -> None:
    log = PrefillLog()
    log.add(8, StepTimes(8.0, 9.0, sessions=0))
    assert log.timed(result(arrived(draft(), at=8.0)), VERIFIED).queue_ms == 2000.0


def test_steps_that_no_later_draft_can_have_waited_for_are_forgotten() -> None:
    log = PrefillLog()
    log.add(7, StepTimes(4.0, 5.0, sessions=0))
    log.add(7, StepTimes(8.0, 9.0, sessions=0))
    log.drop(7, before=6.0)
    assert log.timed(result(arrived(draft(), at=6.0)), VERIFIED).prefill_ms == 1000.0
    log.drop(7, before=9.5)
    assert log._steps == {7: []}
    log.forget(7)
    assert log._steps == {}


STEP_S = 0.1


def learned(**turnarounds_s: float) -> BatchingDelay:
    """Return a delay that has seen sessions 1, 2, … return after these times."""
    delay = BatchingDelay()
    for handle, seconds in enumerate(turnarounds_s.values(), start=1):
        delay.expect_draft(handle, at=0.0)
        delay.on_draft(handle, at=seconds)
    return delay


def test_a_step_is_held_for_a_quick_device() -> None:
    delay = learned(quick=0.004)
    delay.expect_draft(1, at=10.0)
    assert 0.004 <= delay.hold_s(4, now=10.0, step_s=STEP_S) <= 0.006


def test_a_slow_device_is_not_waited_for() -> None:
    delay = learned(slow=0.08)
    delay.expect_draft(1, at=10.0)
    assert delay.hold_s(1, now=10.0, step_s=STEP_S) == 0.0


def test_a_step_with_many_ready_drafts_is_not_held_for_one_late_device() -> None:
    delay = learned(late=0.03)
    delay.expect_draft(1, at=10.0)
    assert delay.hold_s(2, now=10.0, step_s=STEP_S) > 0.0  # two lose 75 ms where one is spared 100
    assert delay.hold_s(3, now=10.0, step_s=STEP_S) == 0.0


def test_a_step_is_held_for_several_late_devices() -> None:
    delay = learned(a=0.03, b=0.03, c=0.03)
    for handle in (1, 2, 3):
        delay.expect_draft(handle, at=10.0)
    assert delay.hold_s(5, now=10.0, step_s=STEP_S) > 0.03


def test_a_device_that_is_overdue_or_gone_is_not_waited_for() -> None:
    delay = learned(a=0.004, b=0.004)
    delay.expect_draft(1, at=10.0)
    delay.expect_draft(2, at=10.0)
    assert delay.hold_s(1, now=10.5, step_s=STEP_S) == 0.0
    delay.forget(1)
    delay.forget(2)
    assert delay.hold_s(1, now=10.0, step_s=STEP_S) == 0.0


def test_how_soon_a_device_comes_back_is_smoothed() -> None:
    delay = learned(a=0.004)
    delay.expect_draft(1, at=5.0)
    delay.on_draft(1, at=5.02)
    delay.expect_draft(1, at=10.0)
    assert delay.hold_s(1, now=10.0, step_s=STEP_S) == pytest.approx(1.25 * (0.004 + 0.3 * (0.02 - 0.004)))


def test_a_step_is_held_for_a_share_of_its_time_at_most() -> None:
    delay = learned(a=0.025)
    delay.expect_draft(1, at=10.0)
    assert delay.hold_s(1, now=10.0, step_s=0.1) > 0.0
    assert delay.hold_s(1, now=10.0, step_s=0.02) == 0.0


def test_nothing_is_known_of_a_new_session_under_the_handle_of_an_ended_one() -> None:
    delay = learned(a=0.004)
    delay.expect_draft(1, at=5.0)
    delay.forget(1)
    delay.expect_draft(1, at=10.0)
    assert delay.hold_s(1, now=10.0, step_s=STEP_S) == 0.0
    delay.forget(1)
    delay.on_draft(1, at=10.01)  # its first draft answers no verdict
    delay.expect_draft(1, at=20.0)
    assert delay.hold_s(1, now=20.0, step_s=STEP_S) == 0.0


def test_the_gap_before_the_next_draft_is_known_of_each_device_for_as_long_as_it_plausibly_comes_back() -> None:
    delay = learned(quick=0.1, slow=2.0)
    assert delay.gap_s(now=10.0) == math.inf, "nobody is expected"
    delay.expect_draft(2, at=10.0)
    assert delay.gap_s(now=10.5) == pytest.approx(1.5)
    assert delay.gap_s(now=13.0) == 0.0, "it is overdue"
    assert delay.gap_s(now=16.5) == math.inf, "it is gone"
    delay.expect_draft(1, at=20.0)
    assert delay.gap_s(now=20.0) == pytest.approx(0.1)
    assert delay.gap_s(now=20.45) == 0.0, "the quickest device gets half a second"
    delay.forget(1)
    delay.expect_draft(3, at=30.0)
    assert delay.gap_s(now=30.0) == 0.0, "what it needs is not known yet"

from fleet_edge.batching.timing import DraftTiming, PrefillLog, Step
from tests.support.drafts import arrived, draft

VERIFIED = Step(10.0, 10.5, sessions=3)


def test_the_wait_for_a_step_is_queue_time() -> None:
    timing = PrefillLog().timing(arrived(draft(), at=9.0), VERIFIED)
    assert timing == DraftTiming(batch=3, queue_ms=1000.0, prefill_ms=0.0, compute_ms=500.0)


def test_a_draft_that_arrives_during_the_step_before_has_not_waited_longer_than_that() -> None:
    assert PrefillLog().timing(arrived(draft(), at=10.25), VERIFIED).queue_ms == 0.0


def test_the_part_of_the_wait_in_which_the_own_prompt_was_computed_is_apart() -> None:
    log = PrefillLog()
    log.computed(7, Step(4.0, 5.0, sessions=0))  # before the draft had come
    log.computed(7, Step(6.0, 7.0, sessions=2))  # it came in the middle
    log.computed(7, Step(8.0, 9.0, sessions=0))
    timing = log.timing(arrived(draft(), at=6.5), VERIFIED)
    assert (timing.prefill_ms, timing.queue_ms) == (1500.0, 2000.0)


def test_another_sessions_prompt_is_queue_time() -> None:
    log = PrefillLog()
    log.computed(8, Step(8.0, 9.0, sessions=0))
    assert log.timing(arrived(draft(), at=8.0), VERIFIED).queue_ms == 2000.0


def test_steps_that_no_later_draft_can_have_waited_for_are_forgotten() -> None:
    log = PrefillLog()
    log.computed(7, Step(4.0, 5.0, sessions=0))
    log.computed(7, Step(8.0, 9.0, sessions=0))
    log.verified(7, oldest=6.0)
    # A draft that arrived with it, and was left for another step.
    assert log.timing(arrived(draft(), at=6.0), VERIFIED).prefill_ms == 1000.0
    log.verified(7, oldest=9.5)
    assert log._steps == {7: []}
    log.forget(7)
    assert log._steps == {}

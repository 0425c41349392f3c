from collections.abc import Callable

import pytest

from fleet_device.client.retry import RetryState, Timeouts
from fleet_device.errors import SessionFailed

PATIENCE = Timeouts(open_s=5.0, resume_s=30.0, verdict_s=3.0, retry_s=1.0)


def watch_at(times: list[float]) -> tuple[RetryState, Callable[[float], None]]:
    """Return a watch and what lets time pass."""
    return RetryState(PATIENCE, lambda: times[0]), lambda seconds: times.__setitem__(0, times[0] + seconds)


def test_the_first_open_is_waited_for_less_long_than_a_resumed_session() -> None:
    watch, pass_s = watch_at([100.0])
    pass_s(5.0)
    assert watch.exhausted_s(opened=False) is None
    pass_s(0.1)
    assert watch.exhausted_s(opened=False) == 5.0
    assert watch.exhausted_s(opened=True) is None
    watch.resumed("")
    pass_s(30.0)
    assert watch.exhausted_s(opened=False) is None
    pass_s(0.1)
    assert watch.exhausted_s(opened=False) == watch.exhausted_s(opened=True) == 30.0


def test_asking_again_does_not_shorten_the_wait_and_an_answer_restarts_it() -> None:
    watch, pass_s = watch_at([0.0])
    pass_s(29.0)
    watch.asked()
    pass_s(2.0)
    assert watch.exhausted_s(opened=True) == 30.0
    watch.answered(got_on=False)
    assert watch.exhausted_s(opened=True) is None


def test_a_draft_is_asked_for_again_later_than_an_open() -> None:
    watch, pass_s = watch_at([0.0])
    pass_s(1.0)
    assert watch.may_ask_again(opened=False)
    assert not watch.may_ask_again(opened=True)
    assert (watch.quiet_s(opened=False), watch.quiet_s(opened=True)) == (1.0, 2.0)
    pass_s(2.0)
    assert watch.may_ask_again(opened=True)
    watch.asked()
    assert not watch.may_ask_again(opened=False)


def test_a_late_answer_is_waited_for_at_least_a_moment() -> None:
    watch, pass_s = watch_at([0.0])
    pass_s(50.0)
    assert watch.quiet_s(opened=True) == 0.01


@pytest.mark.parametrize("got_on", [False, True])
def test_only_a_text_that_grows_may_be_resumed_without_end(got_on: bool) -> None:
    watch, _ = watch_at([0.0])
    for _ in range(20):
        watch.resumed("")
    watch.answered(got_on=got_on)
    if got_on:
        watch.resumed("")
    else:
        with pytest.raises(SessionFailed, match="20 times without getting on: the edge went away"):
            watch.resumed("the edge went away.")
    assert watch.resumes == 21

from collections.abc import Callable

import pytest

from fleet_device.client.retry import LEAST_WAIT_S, RetryState, Timeouts
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
    watch.answered(tokens=0)
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


def test_no_wait_is_longer_than_the_patience_that_is_left() -> None:
    watch, pass_s = watch_at([0.0])
    pass_s(4.5)
    assert watch.quiet_s(opened=False) == 0.5


@pytest.mark.parametrize("got_on", [False, True])
def test_only_a_text_that_grows_may_be_resumed_without_end(got_on: bool) -> None:
    watch, _ = watch_at([0.0])
    for _ in range(20):
        watch.resumed("")
    watch.answered(tokens=int(got_on))
    if got_on:
        watch.resumed("")
    with pytest.raises(SessionFailed, match="times and does not get on: the edge went away"):
        watch.resumed("the edge went away.")
    assert watch.resumes == 20 + got_on


def test_each_token_pays_for_one_new_beginning_and_none_is_saved_up() -> None:
    watch, _ = watch_at([0.0])
    watch.answered(tokens=1000)
    for _ in range(20):
        watch.resumed("")
    watch.answered(tokens=2)
    watch.resumed("")
    watch.resumed("")
    with pytest.raises(SessionFailed, match="resumed 22 times"):
        watch.resumed("no.")


def test_new_beginnings_in_vain_come_ever_later() -> None:
    watch, pass_s = watch_at([0.0])
    waits = []
    for _ in range(8):
        watch.resumed("")
        waits.append(watch.quiet_s(opened=False) if watch.holding else 0.0)
        pass_s(10.0)
    assert waits == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    watch.answered(tokens=1)
    watch.resumed("")
    assert not watch.holding


def test_what_an_edge_asks_to_wait_with_is_not_sent_before_its_time_and_then_at_once() -> None:
    watch, pass_s = watch_at([0.0])
    watch.asked()
    watch.hold(0.5)
    assert watch.holding
    assert not watch.may_ask_again(opened=True)
    assert not watch.may_ask_early()
    assert watch.quiet_s(opened=True) == 0.5
    pass_s(0.5)
    assert not watch.holding
    assert watch.may_ask_again(opened=True)  # long before `verdict_s`
    watch.asked()
    assert not watch.may_ask_again(opened=True)


def test_an_edge_that_names_no_time_is_left_alone_for_a_while_for_each_time_that_it_says_so() -> None:
    watch, _ = watch_at([0.0])
    for number in range(1, 9):
        watch.hold(0.0)
        assert watch.quiet_s(opened=True) == pytest.approx(number * LEAST_WAIT_S)


def test_a_time_to_wait_fits_as_long_as_the_patience_lasts() -> None:
    watch, pass_s = watch_at([0.0])
    assert watch.fits(5.0, opened=False)
    assert not watch.fits(5.1, opened=False)
    pass_s(3.0)
    assert not watch.fits(2.1, opened=False)
    assert watch.fits(27.0, opened=True)


def test_an_edge_that_comes_and_goes_is_not_asked_each_time() -> None:
    watch, _ = watch_at([0.0])
    assert [watch.may_ask_early() for _ in range(7)] == [True] * 5 + [False] * 2
    watch.answered(tokens=0)
    assert not watch.may_ask_early()
    watch.answered(tokens=1)
    assert watch.may_ask_early()


def test_an_edge_that_does_not_listen_finds_few_questions_when_it_does() -> None:
    watch, pass_s = watch_at([0.0])
    waits = []
    for _ in range(14):
        watch.asked()
        watch.answered(tokens=0) if not waits else None
        waits.append(watch._retry_s)
        pass_s(1.0)
    assert waits == [1.0] * 5 + [2.0] * 4 + [4.0] * 4 + [8.0]


def test_a_device_that_drafts_for_long_has_not_waited_meanwhile() -> None:
    watch, pass_s = watch_at([0.0])
    watch.answered(tokens=1)
    pass_s(1000.0)
    assert watch.exhausted_s(opened=True) is None
    watch.asked()
    assert watch.exhausted_s(opened=True) is None
    pass_s(30.1)
    assert watch.exhausted_s(opened=True) == 30.0

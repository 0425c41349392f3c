from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from fleet_device.client.messaging import EdgePresences
from fleet_device.client.retry import LEAST_WAIT_S, EdgeAvailability, RetryPolicy, RetryState
from fleet_device.errors import SessionFailed

PATIENCE = RetryPolicy(open_s=5.0, resume_s=30.0, verdict_s=3.0, retry_s=1.0)


def watch_at(times: list[float], **given: Any) -> tuple[RetryState, Callable[[float], None]]:
    session: Any = SimpleNamespace(opened=None)
    availability = EdgeAvailability(lambda: times[0], EdgePresences())
    state = RetryState(PATIENCE, session, SimpleNamespace(connected=True), availability, **given)  # type: ignore[arg-type]
    return state, lambda seconds: times.__setitem__(0, times[0] + seconds)


def seen(state: RetryState, *, opened: bool) -> RetryState:
    state.session.opened = SimpleNamespace() if opened else None  # type: ignore[assignment]
    return state


def test_a_draft_is_asked_for_again_later_than_an_open() -> None:
    watch, pass_s = watch_at([0.0])
    pass_s(1.0)
    assert seen(watch, opened=False).may_repeat()
    assert not seen(watch, opened=True).may_repeat()
    assert (seen(watch, opened=False).repeat_in_s(), seen(watch, opened=True).repeat_in_s()) == (1.0, 2.0)
    pass_s(2.0)
    assert seen(watch, opened=True).may_repeat()
    watch.note_sent()
    assert not seen(watch, opened=False).may_repeat()


def test_each_token_pays_for_one_new_beginning_and_none_is_saved_up() -> None:
    watch, _ = watch_at([0.0])
    watch.note_answer(tokens=1000)
    for _ in range(20):
        watch.note_resume("")
    watch.note_answer(tokens=2)
    watch.note_resume("")
    watch.note_resume("")
    with pytest.raises(SessionFailed, match="resumed 22 times"):
        watch.note_resume("no.")


def test_new_beginnings_in_vain_come_ever_later() -> None:
    watch, pass_s = watch_at([0.0])
    waits = []
    for _ in range(8):
        watch.note_resume("")
        waits.append(seen(watch, opened=False).repeat_in_s() if watch.holding else 0.0)
        pass_s(10.0)
    assert waits == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    watch.note_answer(tokens=1)
    watch.note_resume("")
    assert not watch.holding


def test_what_an_edge_asks_to_wait_with_is_not_sent_before_its_time_and_then_at_once() -> None:
    watch, pass_s = watch_at([0.0])
    watch.note_sent()
    watch.hold(0.5)
    assert watch.holding
    assert not seen(watch, opened=True).may_repeat()
    assert not watch.may_repeat_early()
    assert seen(watch, opened=True).repeat_in_s() == 0.5
    pass_s(0.5)
    assert not watch.holding
    assert seen(watch, opened=True).may_repeat()  # long before `verdict_s`
    watch.note_sent()
    assert not seen(watch, opened=True).may_repeat()


def test_an_edge_that_names_no_time_is_left_alone_for_a_while_for_each_time_that_it_says_so() -> None:
    watch, _ = watch_at([0.0])
    for number in range(1, 9):
        watch.hold(0.0)
        assert seen(watch, opened=True).repeat_in_s() == pytest.approx(number * LEAST_WAIT_S)


def test_an_edge_that_comes_and_goes_is_not_asked_each_time() -> None:
    watch, _ = watch_at([0.0])
    assert [watch.may_repeat_early() for _ in range(7)] == [True] * 5 + [False] * 2
    watch.note_answer(tokens=0)
    assert not watch.may_repeat_early()
    watch.note_answer(tokens=1)
    assert watch.may_repeat_early()


def test_an_edge_that_does_not_listen_finds_few_questions_when_it_does() -> None:
    watch, pass_s = watch_at([0.0])
    waits = []
    for _ in range(14):
        watch.note_sent()
        watch.note_answer(tokens=0) if not waits else None
        waits.append(watch._retry_s)
        pass_s(1.0)
    assert waits == [1.0] * 5 + [2.0] * 4 + [4.0] * 4 + [8.0]


def test_a_device_that_drafts_for_long_has_not_waited_meanwhile() -> None:
    watch, pass_s = watch_at([0.0])
    watch.note_answer(tokens=1)
    pass_s(1000.0)
    assert seen(watch, opened=True).exhausted_s() is None
    watch.note_sent()
    assert seen(watch, opened=True).exhausted_s() is None
    pass_s(30.1)
    assert seen(watch, opened=True).exhausted_s() == 30.0

import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from fleet_device.client.messaging import EdgePresences
from fleet_device.client.retry import (
    LEAST_WAIT_S,
    TRANSITIONS,
    EdgeAvailability,
    RetryEvent,
    RetryPhase,
    RetryPolicy,
    RetryState,
)
from fleet_device.errors import EdgeUnavailable, SessionFailed, SessionRefused
from fleet_device.session.machine import DeviceSession
from fleet_device.settings import OfflinePolicy, Outages
from schemas.messages import Fault, Refused
from schemas.reasons import Action, FaultCode, RefusalCode
from tests.support.memory_fleet import EDGE, edge_state, terms

PATIENCE = RetryPolicy(open_s=5.0, resume_s=30.0, verdict_s=3.0, retry_s=1.0)


def watch_at(times: list[float], *, granted: bool = False) -> tuple[RetryState, Callable[[float], None]]:
    outbound: Any = SimpleNamespace(connected=True, silence=lambda *_, **__: EdgeUnavailable("Nobody answers."))
    availability = EdgeAvailability(lambda: times[0], EdgePresences())
    state = RetryState(PATIENCE, DeviceSession(terms(1)), outbound, availability)
    if granted:
        state.note_granted()
    return state, lambda seconds: times.__setitem__(0, times[0] + seconds)


def waits(seconds: float) -> Fault:
    return Fault(handle=1, round=1, code=FaultCode.QUOTA, action=Action.WAIT, sentence="Over it.", retry_s=seconds)


def test_every_phase_is_reached_and_only_a_generation_without_an_edge_never_asks_again() -> None:
    reached = {RetryPhase.ASKING}
    while more := {after for (before, _), after in TRANSITIONS.items() if before in reached} - reached:
        reached |= more
    assert reached == set(RetryPhase)
    resumed = {before for before, event in TRANSITIONS if event is RetryEvent.RESUMED}
    assert resumed == set(RetryPhase) - {RetryPhase.LOCAL}


def test_what_is_not_in_the_table_is_refused() -> None:
    for phase, event in itertools.product(RetryPhase, RetryEvent):
        watch, _ = watch_at([0.0])
        watch.phase = phase
        if (phase, event) not in TRANSITIONS:
            with pytest.raises(ValueError, match=phase.name):
                watch._move(event)


def test_a_draft_is_asked_for_again_later_than_an_open() -> None:
    asking, pass_s = watch_at([0.0])
    asking.note_sent()
    assert asking.deadline() == PATIENCE.retry_s
    pass_s(PATIENCE.retry_s)
    assert asking.may_repeat()
    granted, pass_s = watch_at([0.0], granted=True)
    granted.note_sent()
    assert granted.deadline() == PATIENCE.verdict_s
    pass_s(PATIENCE.retry_s)
    assert not granted.may_repeat()
    pass_s(2.0)
    assert granted.may_repeat()
    granted.note_sent()
    assert not granted.may_repeat()


def test_each_token_pays_for_one_new_beginning_and_none_is_saved_up() -> None:
    watch, _ = watch_at([0.0], granted=True)
    watch.note_answer(tokens=1000)
    for _ in range(20):
        watch.note_resume("")
    watch.note_granted()
    watch.note_answer(tokens=2)
    watch.note_resume("")
    watch.note_resume("")
    with pytest.raises(SessionFailed, match="resumed 22 times"):
        watch.note_resume("no.")


def test_new_beginnings_in_vain_come_ever_later() -> None:
    times = [0.0]
    watch, pass_s = watch_at(times)
    delays = []
    for _ in range(8):
        watch.note_resume("")
        delays.append(watch._repeat_at - times[0] if watch.held else 0.0)
        pass_s(10.0)
    assert delays == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    watch.note_granted()
    watch.note_answer(tokens=1)
    watch.note_resume("")
    assert not watch.held


def test_what_an_edge_asks_to_wait_with_is_not_sent_before_its_time_and_then_at_once() -> None:
    watch, pass_s = watch_at([0.0], granted=True)
    watch.note_sent()
    watch.hold(0.5)
    assert watch.held
    assert not watch.may_repeat()
    assert not watch.may_repeat_early()
    assert watch.deadline() == 0.5
    pass_s(0.5)
    assert not watch.held
    assert watch.may_repeat()  # long before `verdict_s`
    watch.note_sent()
    assert not watch.may_repeat()


def test_an_edge_that_names_no_time_is_left_alone_for_a_while_for_each_time_that_it_says_so() -> None:
    watch, _ = watch_at([0.0], granted=True)
    for number in range(1, 9):
        watch.hold(0.0)
        assert watch.deadline() == pytest.approx(number * LEAST_WAIT_S)


def test_an_edge_that_comes_and_goes_is_not_asked_each_time() -> None:
    watch, _ = watch_at([0.0])
    assert [watch.may_repeat_early() for _ in range(7)] == [True] * 5 + [False] * 2
    watch.note_granted()
    watch.note_answer(tokens=0)
    assert not watch.may_repeat_early()
    watch.note_answer(tokens=1)
    assert watch.may_repeat_early()


def test_an_edge_that_does_not_listen_finds_few_questions_when_it_does() -> None:
    times = [0.0]
    watch, pass_s = watch_at(times)
    intervals = []
    for _ in range(13):
        watch.note_sent()
        intervals.append(watch._repeat_at - times[0])
        pass_s(1.0)
    assert intervals == [1.0] * 4 + [2.0] * 4 + [4.0] * 4 + [8.0]


def test_a_device_that_drafts_for_long_has_not_waited_meanwhile() -> None:
    watch, pass_s = watch_at([0.0], granted=True)
    watch.note_answer(tokens=1)
    pass_s(1000.0)
    watch.check_wait()
    assert watch.wait_out(waits(1.0)), "a short delay does not end it"
    pass_s(1.0)
    watch.note_sent()
    watch.check_wait()
    pass_s(30.1)
    with pytest.raises(SessionRefused, match=r"Over it\."):
        watch.check_wait()


def test_nothing_is_due_of_an_edge_that_owes_nothing_but_the_next_repeat() -> None:
    watch, _ = watch_at([0.0], granted=True)
    watch.note_sent()
    watch.note_answer(tokens=3)
    assert (watch._give_up_at, watch._outage_at()) == (math.inf, math.inf)


@pytest.mark.parametrize("retry_s", [PATIENCE.open_s, PATIENCE.open_s + 1.0])
def test_a_request_that_waits_for_an_edge_does_not_wait_longer_for_a_quota(retry_s: float) -> None:
    watch, pass_s = watch_at([0.0])
    watch.outages = Outages(policy=OfflinePolicy.WAIT)
    watch.session.open()
    watch.note_open()
    for code, code_s in ((RefusalCode.BUSY, None), (RefusalCode.QUOTA, retry_s)):
        pass_s(1000.0)
        assert watch.check() is None
        refused = Refused(session=watch.session.request.session, code=code, sentence="No.", retry_s=code_s)
        with pytest.raises(SessionRefused) if (code_s or 0.0) > PATIENCE.open_s else nullcontext():
            watch.postpone(refused)


def test_an_edge_that_is_online_and_does_not_listen_counts_as_absent() -> None:
    watch, pass_s = watch_at([0.0])
    watch.outages = Outages(policy=OfflinePolicy.FAIL, after_s=1.0)
    watch.availability.edges.note_state(EDGE, edge_state())
    watch.session.open()
    watch.note_open()
    pass_s(1.0)
    assert watch.check() is None
    watch.session.on_undelivered()
    with pytest.raises(EdgeUnavailable):
        watch.check()

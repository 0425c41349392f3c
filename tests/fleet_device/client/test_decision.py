import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Final

import pytest

from fleet_device.client.decision import (
    LEAST_WAIT_S,
    Decision,
    EdgeAvailability,
    Fail,
    Local,
    Repeat,
    Resume,
    RetryPolicy,
    RetryState,
    Send,
    Silence,
    Wait,
    decide,
    on_refused,
    on_wait,
)
from fleet_device.client.messaging import EdgePresences
from fleet_device.errors import SessionRefused
from fleet_device.session.machine import DeviceSession
from fleet_device.settings import OfflinePolicy, Outages
from schemas.control import Presence
from schemas.messages import Fault, Progress, Refused, Verdict
from schemas.policy import Mode
from schemas.reasons import Action, FaultCode, RefusalCode
from tests.support.device_scenarios import LOCAL, PATIENT, POLICY, SCENARIOS, WAIT, Scenario
from tests.support.memory_fleet import EDGE, TARGET_ID, Clock, edge_state, terms
from tests.support.scripted_edge import opened

OTHER: Final = "edge-2"


class PureScene:
    """The decision alone: a session, two edges as a device knows them, and a clock."""

    def __init__(self, scenario: Scenario | None = None, *, policy: RetryPolicy = POLICY) -> None:
        self.clock, self.connected = Clock(), True
        presences = EdgePresences()
        self.availability = EdgeAvailability(self.clock, presences, lambda: self.connected)
        self.availability.note_presence(absent=False)
        self.session = DeviceSession(terms(1, mode=Mode.COUPLED, max_new_tokens=4000))
        self.retry = RetryState(policy, PATIENT if scenario is None else scenario.outages, self.clock())
        self.target_ids = {EDGE: TARGET_ID, OTHER: b"otherone" if scenario and scenario.other_target else TARGET_ID}
        for edge in self.target_ids:
            self.say(edge, Presence.ONLINE)

    def say(self, edge: str, presence: Presence) -> None:
        state = edge_state(presence, edge=edge, target_id=self.target_ids[edge].hex())
        self.availability.edges.note_state(edge, state)

    def decide(self) -> Decision:
        self.retry.note_edges(self.session, self.availability, self.clock())
        return decide(self.session, self.retry, self.availability, self.clock())

    def ask(self) -> None:
        assert isinstance(self.decide(), Send)
        self.asked = self.session.open()
        self.retry.note_sent(self.session, self.clock())

    def grant(self) -> None:
        self.session.on_opened(opened(self.asked))
        self.retry.note_granted()

    def draft(self) -> None:
        self.session.finish_draft()
        self.retry.note_sent(self.session, self.clock())

    def verdict(self, tokens: int = 1) -> None:
        for _ in range(tokens):
            (draft,) = self.session.unanswered()
            self.session.on_verdict(Verdict(handle=draft.handle, round=draft.round, accepted=0, next=1))
            if _ < tokens - 1:
                self.session.finish_draft()
        self.retry.note_answer(self.clock(), tokens=tokens)

    def progress(self) -> None:
        assert self.retry.note_working(Progress(handle=1, computed=5, tokens=10, ahead=0), self.clock())

    def other_gone(self) -> None:
        self.say(OTHER, Presence.OFFLINE)
        self.decide()

    def edge_gone(self) -> None:
        self.say(EDGE, Presence.OFFLINE)
        self.resume()

    def edge_back(self) -> None:
        gone = next(state.edge for state in self.availability.edges.known() if state.presence is Presence.OFFLINE)
        self.say(gone, Presence.ONLINE)
        if self.session.opened is None and self.retry.note_return(self.clock()):
            self.session.suspend()
            self.ask()

    def broker_gone(self) -> None:
        self.connected = False
        self.decide()

    def broker_back(self) -> None:
        self.connected = True
        self.retry.note_repeat_due()

    def pass_time(self, seconds: float) -> None:
        self.clock.seconds += seconds

    def resume(self) -> None:
        self.retry.note_resume(self.clock())
        self.session.suspend()
        if isinstance(self.decide(), Send):
            self.ask()

    def until(self) -> float:
        decided = self.decide()
        assert isinstance(decided, Wait)
        return decided.until - self.clock()


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_a_request_does_next(name: str) -> None:
    SCENARIOS[name].check(SCENARIOS[name].play(PureScene(SCENARIOS[name])))


def drafting(policy: RetryPolicy = POLICY) -> PureScene:
    scene = PureScene(policy=policy)
    for step in (scene.ask, scene.grant, scene.draft):
        step()
    return scene


def fault(seconds: float) -> Fault:
    return Fault(handle=1, round=1, code=FaultCode.QUOTA, action=Action.WAIT, sentence="Over it.", retry_s=seconds)


def test_each_token_pays_for_one_attempt_and_none_is_saved_up() -> None:
    scene = drafting()
    scene.verdict(1000)
    for _ in range(19):
        scene.retry.note_resume(scene.clock())
    assert scene.retry.budget.left == 1
    scene.retry.note_answer(scene.clock(), tokens=0)
    assert scene.retry.budget.left == 1
    scene.retry.note_answer(scene.clock(), tokens=2)
    assert scene.retry.budget.left == 3


def test_resumes_without_a_token_come_ever_later() -> None:
    scene = drafting(replace(POLICY, retry_s=1.0))
    scene.retry.report_at = math.inf
    delays = []
    for _ in range(8):
        scene.retry.note_resume(scene.clock())
        scene.session.suspend()
        decided = scene.decide()
        delays.append(decided.until - scene.clock() if isinstance(decided, Wait) else 0.0)
        scene.pass_time(10.0)
    assert delays == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    scene.retry.note_answer(scene.clock(), tokens=1)
    scene.retry.note_resume(scene.clock())
    assert isinstance(scene.decide(), Send)


def test_each_silent_edge_gets_twice_the_time_of_the_last() -> None:
    scene = drafting(replace(POLICY, resume_s=1000.0))
    for expected in (6.0, 12.0, 24.0):
        scene.pass_time(expected - 0.1)
        assert not isinstance(scene.decide(), Resume)
        scene.pass_time(0.1)
        assert isinstance(scene.decide(), Resume)
        scene.retry.note_resume(scene.clock())
        scene.session.suspend()
        scene.retry.not_before = -math.inf
        for step in (scene.ask, scene.grant, scene.draft):
            step()


def test_a_refusal_is_not_reported_once_the_edge_has_answered() -> None:
    scene = drafting()
    scene.other_gone()
    scene.retry.refusal = SessionRefused(RefusalCode.QUOTA, "Over it.")
    scene.verdict()
    scene.draft()
    scene.pass_time(10.0)
    decided = scene.decide()
    assert isinstance(decided, Wait)
    assert isinstance(decided.reason, Silence)


def test_what_an_edge_delays_is_not_sent_before_its_time_and_then_at_once() -> None:
    scene = drafting()
    scene.other_gone()
    scene.retry.hold(0.5, scene.clock())
    assert scene.until() == pytest.approx(0.5)
    scene.retry.note_repeat_due()
    assert scene.until() == pytest.approx(0.5)
    scene.pass_time(0.5)
    assert isinstance(scene.decide(), Repeat)


def test_an_edge_that_names_no_time_is_left_alone_for_a_while_each_time() -> None:
    scene = drafting()
    for number in range(1, 9):
        scene.retry.hold(0.0, scene.clock())
        assert scene.until() == pytest.approx(min(number * LEAST_WAIT_S, 6.0))


def test_an_edge_that_comes_and_goes_restarts_the_wait_a_few_times() -> None:
    scene = PureScene()
    scene.ask()
    assert [scene.retry.note_return(scene.clock()) for _ in range(7)] == [True] * 5 + [False] * 2
    scene.grant()
    scene.retry.note_answer(scene.clock(), tokens=0)
    assert not scene.retry.note_return(scene.clock())
    scene.retry.note_answer(scene.clock(), tokens=1)
    assert scene.retry.note_return(scene.clock())


def test_opens_without_an_answer_become_rarer() -> None:
    scene = PureScene(policy=replace(POLICY, open_s=1000.0))
    scene.ask()
    intervals = []
    for _ in range(13):
        scene.retry.report_at = math.inf
        intervals.append(scene.until())
        scene.pass_time(intervals[-1])
        assert isinstance(scene.decide(), Repeat)
        scene.session.open_again()
        scene.retry.note_sent(scene.session, scene.clock())
    assert intervals == [1.0] * 4 + [2.0] * 4 + [4.0] * 4 + [8.0]


def test_a_long_prompt_is_given_more_time() -> None:
    scene = PureScene()
    scene.session = DeviceSession(terms(1, mode=Mode.COUPLED, prompt=(1,) * 4096))
    for step in (scene.ask, scene.grant, scene.draft):
        step()
    scene.pass_time(23.9)
    assert not isinstance(scene.decide(), Resume)
    scene.pass_time(0.1)
    assert isinstance(scene.decide(), Resume)


def test_a_device_that_drafts_for_long_has_not_waited_meanwhile() -> None:
    scene = drafting()
    scene.verdict()
    scene.pass_time(1000.0)
    assert isinstance(scene.decide(), Send)
    assert on_wait(scene.session, scene.retry, scene.availability, scene.clock(), fault(1.0)), "a short delay"
    scene.pass_time(1.0)
    scene.draft()
    assert isinstance(scene.decide(), Wait)
    scene.other_gone()
    scene.pass_time(POLICY.resume_s + 0.1)
    decided = scene.decide()
    assert isinstance(decided, Fail)
    assert isinstance(decided.reason, SessionRefused)


@pytest.mark.parametrize("retry_s", [POLICY.open_s, POLICY.open_s + 1.0])
def test_a_request_that_waits_for_an_edge_does_not_wait_longer_for_a_quota(retry_s: float) -> None:
    scene = PureScene()
    scene.retry.outages = WAIT
    scene.other_gone()
    scene.ask()
    for code, code_s in ((RefusalCode.BUSY, None), (RefusalCode.QUOTA, retry_s)):
        scene.pass_time(1000.0)
        assert not isinstance(scene.decide(), Fail)
        refused = Refused(session=scene.session.request.session, code=code, sentence="No.", retry_s=code_s)
        with pytest.raises(SessionRefused) if (code_s or 0.0) > POLICY.open_s else nullcontext():
            on_refused(scene.session, scene.retry, scene.availability, scene.clock(), refused)


def test_an_edge_that_refuses_is_no_outage_and_one_that_then_hangs_is() -> None:
    scene = PureScene()
    scene.retry.outages = LOCAL
    scene.other_gone()
    scene.ask()
    for _ in range(4):
        scene.retry.refusal = SessionRefused(RefusalCode.BUSY, "Full.")
        scene.retry.hold(10.0, scene.clock())
        scene.pass_time(10.0)
    assert scene.decide() == Fail(scene.retry.refusal)
    scene.pass_time(30.0)
    assert isinstance(scene.decide(), Local)


def test_an_edge_that_is_online_and_does_not_listen_counts_as_absent() -> None:
    scene = PureScene()
    scene.retry.outages = Outages(policy=OfflinePolicy.FAIL, after_s=1.0)
    scene.ask()
    scene.pass_time(1.0)
    assert isinstance(scene.decide(), Repeat)
    scene.session.on_undelivered()
    scene.decide()
    scene.pass_time(1.0)
    assert scene.decide() == Fail(Silence(1.0))


def test_the_time_without_an_edge_is_measured_until_one_is_back() -> None:
    scene = PureScene()
    for absent, expected_s in ((False, 0.0), (True, 0.0), (True, 3.0), (True, 6.0), (False, 0.0), (True, 0.0)):
        scene.pass_time(3.0)
        scene.availability.note_presence(absent=absent)
        assert scene.availability.absent_s == expected_s


def test_no_open_is_sent_while_no_edge_has_the_target() -> None:
    scene = PureScene(SCENARIOS["an edge with another target is not asked"])
    for step in (scene.ask, scene.grant, scene.draft, scene.verdict, scene.edge_gone):
        step()
    assert scene.asked.attempt == 0
    assert isinstance(scene.decide(), Wait)
    scene.edge_back()
    assert scene.asked.attempt == 1

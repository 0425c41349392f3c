import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from fleet_common.grammar.compiler import GrammarCompiler
from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_device.client.drafting import DraftConstraint, Drafting, DraftSequence, SessionPacing
from fleet_device.drafters.contract import Prospect, restrict
from fleet_device.drafters.suffix import SuffixDrafter
from fleet_device.drafters.suffix_index import History
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.pacing.contract import Choice, DraftOutcome, Plan
from fleet_device.session.machine import DeviceSession
from sampling.distribution import Dist, Ids
from schemas import fields
from schemas.messages import Draft, Verdict
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import EndReason, Finish
from tests.support.memory_fleet import DRAFT, terms
from tests.support.scripted_edge import opened
from tests.support.toy_grammar import GRAMMAR
from tests.support.toy_pair import ToyPair, policy

PROMPT = (1, 2)
HANDLE = 7


@dataclass
class Scene:
    context: int = 4096
    silent: bool = False
    times: list[float] = field(default_factory=lambda: [0.0])

    def __post_init__(self) -> None:
        scene = self

        class Model(ScriptedDrafter):
            def next(self, policy: SamplingPolicy) -> Dist | None:  # type: ignore[override]
                scene.times[0] += 0.25
                return None if scene.silent else super().next(policy)

            def next_allowed(self, policy: SamplingPolicy, allowed: Ids) -> Dist | None:  # type: ignore[override]
                scene.times[0] += 0.25
                return super().next_allowed(policy, allowed)

        asked = terms(6, mode=Mode.COUPLED, prompt=PROMPT)
        self.model = Model(DRAFT, DRAFT.words, context=self.context)
        self.session = DeviceSession(asked)
        self.session.on_opened(opened(self.session.open(), handle=HANDLE, max_draft=4, window=1, end_tokens=()))
        self.drafting = DraftSequence(self.session, self.model, lambda: self.times[0])
        self.drafting.rewind()

    def draft(self, limit: int = 4) -> tuple[int, ...]:
        while self.drafting.draft(limit):
            pass
        return self.session.finish_draft().tokens

    def judge(self, accepted: int, token: int, finish: Finish = Finish.NO, *, number: int = 0) -> None:
        for effect in self.session.on_verdict(
            Verdict(handle=HANDLE, round=number, accepted=accepted, next=token, finish=finish)
        ):
            self.drafting.follow(effect)

    @property
    def sequence(self) -> tuple[int, ...]:
        return tuple(self.model._tokens)


@pytest.mark.parametrize(("accepted", "token"), [(3, 5), (1, 5), (0, 4)])
def test_it_follows_the_text(accepted: int, token: int) -> None:
    scene = Scene()
    drafted = scene.draft(3)
    scene.judge(accepted, token)
    assert scene.sequence == (*PROMPT, *drafted[:accepted], token) == (*PROMPT, *scene.session.committed)


def test_a_drafter_that_reads_earlier_text_learns_whether_it_repeats() -> None:
    scene = Scene()
    source = SuffixDrafter.before(scene.model, None)
    scene.drafting = DraftSequence(scene.session, source, scene.drafting.clock)
    scene.drafting.rewind()
    for number in range(8):
        scene.draft(1)
        scene.judge(0, 5, number=number)
    other = SuffixDrafter.before(Scene().model, None)
    other.reset(scene.sequence)
    asked = scene.session.request.policy
    learned, first = source.prospect(asked), other.prospect(asked)
    assert learned is not None
    assert first is not None
    assert learned.chances[0] > first.chances[0]


def test_it_follows_no_text_that_has_ended() -> None:
    scene = Scene()
    drafted = scene.draft(3)
    scene.judge(1, 5, Finish.STOP)
    assert scene.session.ended is EndReason.STOP
    assert scene.sequence == (*PROMPT, *drafted)


def test_it_goes_back_to_the_committed_text() -> None:
    scene = Scene()
    scene.draft(3)
    scene.judge(1, 5)
    scene.drafting.draft(4)
    scene.session.open()
    scene.drafting.rewind()
    assert scene.sequence == (*PROMPT, *scene.session.committed)


def test_nothing_is_drafted_without_an_idea_or_behind_the_context() -> None:
    assert Scene(silent=True).draft() == ()
    assert len(Scene(context=4).draft()) == 2


WORDS = GrammarTokenizer.of_words([f"t{token} " for token in range(6)], end_tokens=[0])
COMPILER = GrammarCompiler(lambda: WORDS)
PAIR = ToyPair.standard()
POLICY = policy(Mode.RESIDUAL, 1)


class Whole:
    def __init__(self, dist: Dist | None) -> None:
        self.dist = dist

    def next(self, _policy: Any) -> Dist | None:
        return self.dist


def constraint() -> DraftConstraint:
    return DraftConstraint(COMPILER.matcher(GRAMMAR))


def test_what_a_drafter_says_is_cut_to_what_is_allowed() -> None:
    dist = Dist(np.array([3, 1, 2, 4]), np.array([0.4, 0.3, 0.2, 0.1]))
    found = restrict(dist, np.array([1, 4, 5]))
    assert found.ids.tolist() == [1, 4]
    assert found.probs.tolist() == pytest.approx([0.75, 0.25])
    assert restrict(dist, np.array([0, 5])) is None
    drafter: Any = Whole(dist)
    cut = constraint().next(drafter, POLICY, text=(1,))  # behind which 2, 3 or 5 may stand
    assert cut.ids.tolist() == [3, 2]
    nothing: Any = Whole(None)
    assert constraint().next(nothing, POLICY, text=(1,)) is None


def test_a_drafter_that_can_shapes_only_what_is_allowed() -> None:
    drafter = ScriptedDrafter(PAIR.draft, PAIR.draft_words, end_tokens=(0,))
    drafter.reset((1, 1))
    found = constraint().next(drafter, POLICY, text=(1,))
    assert set(found.ids.tolist()) <= {2, 3, 5}
    assert found.probs.sum() == pytest.approx(1.0)


def test_a_text_that_the_grammar_rules_out_is_drafted_on_as_without_one() -> None:
    """The edge enforces the grammar; only speed is lost."""
    dist = Dist(np.array([3]), np.ones(1))
    drafter: Any = Whole(dist)
    assert constraint().forced((1, 1)) is None
    assert constraint().next(drafter, POLICY, text=(1, 1)) is dist


def test_what_the_grammar_forces_needs_no_model_and_no_room_in_the_limit() -> None:
    scene = Scene()
    for number, token in enumerate((4, 5)):  # behind which only 1, 1 may stand
        scene.draft(1)
        scene.judge(0, token, number=number)
    scene.drafting = DraftSequence(scene.session, scene.model, scene.drafting.clock, constraint())
    began = scene.times[0]
    assert scene.draft(0)[:2] == (1, 1)
    scene.session.go_local(())
    scene.drafting.rewind()
    assert [scene.drafting.generate_alone() for _ in range(2)] == [1, 1]
    assert scene.times[0] == began


@dataclass
class Pupil:
    asked: list[tuple[int, int]] = field(default_factory=list)
    outcomes: list[DraftOutcome] = field(default_factory=list)
    pieces: list[tuple[int, float]] = field(default_factory=list)
    prospects: list[Prospect] = field(default_factory=list)
    loads: list[fields.EdgeLoad] = field(default_factory=list)

    def plan(self, *, longest: int, window: int) -> Plan:
        self.asked.append((longest, window))
        return Plan(2, ahead=True)

    def weigh(self, plan: Plan, prospect: Prospect, *, longest: int, window: int) -> Plan:
        del longest, window
        self.prospects.append(prospect)
        return replace(plan, repeats=True, tokens=len(prospect.chances))

    def goes_on(self, chances: Sequence[float]) -> bool:
        return sum(chances) < 1.0

    def choice(self) -> Choice:
        return Choice("ahead", "It is a test.")

    def learn(self, outcome: DraftOutcome) -> None:
        self.outcomes.append(outcome)

    def note_load(self, load: fields.EdgeLoad) -> None:
        self.loads.append(load)

    def learn_edge_only(self, tokens: int, seconds: float, *, step_s: float = 0.0) -> None:  # noqa: ARG002
        self.pieces.append((tokens, seconds))


class PacingScene:
    def __init__(self) -> None:
        self.now = 5.0
        asked = terms(6, mode=Mode.COUPLED, max_new_tokens=40)
        self.drafter = ScriptedDrafter(DRAFT, DRAFT.words)
        self.session = DeviceSession(asked)
        self.pupil = Pupil()
        self.pacing = SessionPacing(self.session, self.pupil, lambda: self.now)
        self.open()

    def open(self, **told: float) -> None:
        self.session.on_opened(opened(self.session.open(), handle=HANDLE, max_draft=9, end_tokens=(), **told))
        self.drafter.reset((*self.session.request.prompt, *self.session.committed))
        self.pacing.begin()

    def draw(self, tokens: int) -> None:
        for _ in range(tokens):
            q = self.drafter.next(self.session.request.policy)
            assert q is not None
            self.drafter.extend((self.session.propose(q),))
            self.session.counters.draft_ms += 10.0

    def draft(self, tokens: int = 2) -> Draft:
        plan = self.pacing.plan()
        self.draw(tokens)
        return self.send(more=plan.ahead)

    def send(self, *, more: bool = True) -> Draft:
        return self.pacing.finish_draft(ahead=more)

    def judge(self, draft: Draft, accepted: int, *, handle: int = HANDLE) -> None:
        token = None if accepted == len(draft.tokens) and draft.more else 1
        verdict = Verdict(handle=handle, round=draft.round, accepted=accepted, next=token, compute_ms=40.0)
        self.pacing.learn(self.session.on_verdict(verdict))


def test_what_became_of_a_draft_is_told() -> None:
    scene = PacingScene()
    first = scene.draft()
    second = scene.draft(3)
    scene.now += 0.2
    scene.judge(first, 2)
    scene.now += 0.1
    scene.judge(second, 1)
    assert scene.pupil.asked == [(9, 4), (9, 4)]
    usual = {"ahead": True, "token_s": 0.01, "compute_s": 0.04, "opening": True}
    one, two = scene.pupil.outcomes
    assert one == DraftOutcome(tokens=2, accepted=2, answer_s=one.answer_s, chances=one.chances, **usual)
    assert two == DraftOutcome(tokens=3, accepted=1, answer_s=two.answer_s, chances=two.chances, **usual)
    assert (len(one.chances), len(two.chances)) == (2, 3)
    assert all(0.0 < chance <= 1.0 for chance in (*one.chances, *two.chances))
    assert (round(one.answer_s, 9), round(two.answer_s, 9)) == (0.2, 0.3)
    assert (one.tested, two.tested) == (2, 2)
    assert scene.pacing.drafts == 2


def test_the_round_trip_is_from_a_draft_to_its_verdict_however_long_the_device_waits() -> None:
    scene = PacingScene()
    assert scene.pacing.round_trips.mean_ms is None
    first, second = scene.draft(), scene.draft()
    scene.now += 0.2
    scene.judge(first, 2)
    third = scene.draft()
    scene.now += 0.1
    scene.judge(second, 2)
    scene.now += 0.2
    scene.judge(third, 0)
    assert scene.pacing.round_trips.count == 3
    assert round(scene.pacing.round_trips.total_ms, 6) == 800.0


def test_a_verdict_teaches_once_and_only_the_session_that_it_is_for() -> None:
    scene = PacingScene()
    draft = scene.draft()
    scene.judge(draft, 2, handle=HANDLE + 1)
    assert not scene.pupil.outcomes
    scene.judge(draft, 2)
    scene.judge(draft, 2)
    assert len(scene.pupil.outcomes) == 1


def test_nothing_is_learnt_of_a_draft_that_a_rejection_made_void() -> None:
    scene = PacingScene()
    first, second = scene.draft(), scene.draft()
    scene.judge(first, 0)
    scene.pacing.learn(scene.session.on_verdict(Verdict(handle=HANDLE, round=second.round, accepted=2)))
    assert [outcome.accepted for outcome in scene.pupil.outcomes] == [0]


def test_time_spent_on_void_tokens_is_not_counted_into_the_cost_of_a_token() -> None:
    scene = PacingScene()
    first = scene.draft()
    scene.pacing.plan()
    scene.draw(5)
    scene.judge(first, 0)
    scene.draw(1)
    scene.judge(scene.send(), 1)
    assert scene.pupil.outcomes[-1].token_s == 0.01


def test_after_a_resume_the_times_hold_the_text_once_more() -> None:
    scene = PacingScene()
    lost = scene.draft()
    scene.open()
    scene.pacing.learn(scene.session.on_verdict(Verdict(handle=HANDLE, round=lost.round, accepted=2)))
    scene.judge(scene.draft(), 2)
    scene.judge(scene.draft(), 2)
    assert [outcome.opening for outcome in scene.pupil.outcomes] == [True, False]


def test_drafts_that_were_sent_before_the_first_verdict_may_have_waited_for_the_prompt() -> None:
    scene = PacingScene()
    first, second = scene.draft(), scene.draft()
    scene.now += 0.2
    scene.judge(first, 2)
    third = scene.draft()
    scene.judge(second, 2)
    scene.judge(third, 2)
    assert [outcome.opening for outcome in scene.pupil.outcomes] == [True, True, False]


def test_what_the_edge_says_of_itself_is_told_once_a_session() -> None:
    scene = PacingScene()
    scene.draft()
    scene.draft()
    assert scene.pupil.loads == []
    scene.open(load=fields.EdgeLoad(requests=3, request_ms=4.0, token_ms=2.5, acceptance=0.75))
    scene.draft()
    scene.draft()
    assert scene.pupil.loads == [fields.EdgeLoad(requests=3, request_ms=4.0, token_ms=2.5, acceptance=0.75)]


def test_the_pacing_is_told_of_the_edges_load_whatever_message_says_it() -> None:
    scene = PacingScene()
    sent = scene.draft()
    scene.pacing.learn(
        scene.session.on_verdict(Verdict(handle=HANDLE, round=sent.round, accepted=2, load=fields.EdgeLoad(requests=2)))
    )
    request = scene.pacing.request_edge_only(8)
    base, load = scene.session.position, fields.EdgeLoad(requests=3, writing_ms=20.0)
    # The first piece does not show the edge's speed.
    piece = Verdict(handle=HANDLE, round=request.round, accepted=0, base=base, written=(4,), load=load)
    scene.pacing.learn(scene.session.on_verdict(piece))
    assert scene.pupil.loads == [fields.EdgeLoad(requests=2), fields.EdgeLoad(requests=3, writing_ms=20.0)]
    assert scene.pupil.pieces == []


def test_the_pacing_is_told_of_other_drafts_that_the_step_has_verified() -> None:
    scene = PacingScene()
    sent = scene.draft()
    verdict = Verdict(handle=HANDLE, round=sent.round, accepted=2, chained=3)
    scene.pacing.learn(scene.session.on_verdict(verdict))
    assert [outcome.chained for outcome in scene.pupil.outcomes] == [3]


def test_pieces_are_timed_but_for_the_first_that_has_come_all_the_way() -> None:
    scene = PacingScene()
    request = scene.pacing.request_edge_only(5)

    def come(base: int, *written: int, after_s: float) -> None:
        scene.now += after_s
        verdict = Verdict(handle=HANDLE, round=request.round, accepted=0, base=base, written=written)
        scene.pacing.learn(scene.session.on_verdict(verdict))

    come(0, 1, after_s=0.5)
    come(1, 2, after_s=0.25)
    come(2, 3, 4, after_s=0.5)
    assert scene.pupil.pieces == [(1, 0.25), (2, 0.5)]
    come(4, 5, after_s=0.25)  # the last: the edge waits now
    request = scene.pacing.request_edge_only(3)
    come(5, 1, after_s=9.0)
    assert scene.pupil.pieces == [(1, 0.25), (2, 0.5), (1, 0.25)]
    assert scene.pupil.outcomes == []


def test_a_draft_ends_where_the_pacing_says_so_and_only_if_its_plan_allows() -> None:
    scene = PacingScene()
    scene.pacing.plan()
    assert scene.pacing.goes_on(Plan(2, may_stop=True))  # no token yet
    scene.draw(4)
    assert sum(scene.session.chances) >= 1.0
    assert scene.pacing.goes_on(Plan(8))
    assert not scene.pacing.goes_on(Plan(8, may_stop=True))


def test_where_earlier_text_promises_something_it_is_weighed_and_counted_apart() -> None:
    scene = PacingScene()
    history = History(memory_bytes=100_000)
    prompt = scene.session.request.prompt
    model = scene.drafter
    source = SuffixDrafter.before(model, history)
    source.reset(prompt)
    scene.pacing.source = source
    assert not scene.pacing.plan().repeats
    assert not scene.pupil.prospects
    history.remember(prompt, [2, 3, 4, 2, 3, 4])
    source.reset([*prompt, 2, 3])
    plan = scene.pacing.plan()
    assert plan.repeats
    assert source.repeats
    assert plan.tokens == len(scene.pupil.prospects[0].chances)
    scene.drafter = source  # type: ignore[assignment]
    scene.draw(1)
    first = scene.send(more=False)
    scene.judge(first, 1)
    counters = scene.session.counters
    assert (counters.suffix_drafted, counters.suffix_tested, counters.suffix_accepted) == (1, 1, 1)
    source.begin_draft(repeats=False)
    scene.draw(2)
    scene.judge(scene.send(more=False), 1)
    assert (counters.suffix_drafted, counters.drafted, counters.tested) == (1, 3, 3)
    assert [outcome.repeats for outcome in scene.pupil.outcomes] == [True, False]


@pytest.mark.parametrize("tokens", [1, 3])
def test_reading_what_the_edge_has_decoded_is_not_counted_as_slow_drafting(tokens: int) -> None:
    scene = PacingScene()
    fleet, drafts = scene.session, DraftSequence(scene.session, scene.drafter, lambda: scene.now)
    drafting = Drafting(fleet, drafts, scene.pacing, _plan=Plan(tokens), _behind=True)
    sent = None
    for number in range(tokens + 1):
        # The first token waits for the draft model, which reads all that the edge has decoded.
        fleet.counters.draft_ms += 0.0 if number == tokens else 500.0 if number == 0 else 10.0
        sent = drafting.step()
    assert sent is not None
    scene.judge(sent, 0)
    (outcome,) = scene.pupil.outcomes
    assert math.isnan(outcome.token_s) if tokens == 1 else outcome.token_s == pytest.approx(0.01)

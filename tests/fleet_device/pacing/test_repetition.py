"""Drafting from earlier text: chosen where it promises more, and no longer than pays."""

from dataclasses import replace

from fleet_device.drafters.contract import Prospect
from fleet_device.pacing.adaptive import AdaptivePacing, best_repetition
from fleet_device.pacing.contract import DraftOutcome, FixedPacing, Plan, SharedSteps
from fleet_device.pacing.estimates import Conditions

NEAR = Conditions(acceptance=0.9, token_s=0.010, beside_s=0.002, compute_s=0.020, compute_token_s=0.003)
SURE = Prospect(tuple(0.97**n for n in range(1, 17)), token_s=0.0001, catch_up_s=0.005)
UNSURE = Prospect(tuple(0.4**n for n in range(1, 5)), token_s=0.0001, catch_up_s=0.005)


def choose(prospect: Prospect, conditions: Conditions = NEAR, *, rate: float) -> Plan | None:
    return best_repetition(prospect, waiting=conditions, drafting_ahead=None, longest=16, rate=rate)


def test_what_is_sure_is_drafted_from_earlier_text_and_at_length() -> None:
    plan = choose(SURE, rate=NEAR.rate(Plan(4)))
    assert plan is not None
    assert plan.repeats
    assert plan.tokens >= 8
    assert 0.0 < plan.least <= SURE.chances[plan.tokens - 1]


def test_what_is_unsure_is_left_to_the_model() -> None:
    assert choose(UNSURE, rate=NEAR.rate(Plan(4))) is None


def test_an_edge_that_writes_as_fast_by_itself_is_let() -> None:
    rate = NEAR.rate(Plan(4))
    assert choose(SURE, rate=10 * rate) is None


def test_the_time_to_catch_up_is_counted() -> None:
    slow = replace(SURE, catch_up_s=0.2)
    assert choose(slow, rate=NEAR.rate(Plan(4))) is None


def test_where_texts_share_steps_it_is_shorter() -> None:
    """A further token makes the steps of all sixteen longer."""
    shared = SharedSteps(texts=16, writing_s=0.1, step_s=0.03, text_s=0.005, token_s=0.006)
    rate = NEAR.rate(Plan(4))
    free, dear = choose(SURE, rate=rate / 8), choose(SURE, replace(NEAR, shared=shared), rate=rate / 8)
    assert free is not None
    assert dear is not None
    assert dear.tokens < free.tokens


def outcome(**more: object) -> DraftOutcome:
    names: dict[str, object] = {
        "tokens": 4, "ahead": False, "accepted": 4, "token_s": 0.01, "answer_s": 0.05, "compute_s": 0.02,
    }  # fmt: skip
    return DraftOutcome(**{**names, **more})  # type: ignore[arg-type]


def test_a_device_that_chooses_takes_it_once_it_has_measured() -> None:
    pacing = AdaptivePacing(ahead=False)
    plan = pacing.plan(longest=16, window=1)
    assert pacing.weigh(plan, SURE, longest=16, window=1) == plan
    for _ in range(5):
        pacing.learn(outcome())
    plan = pacing.plan(longest=16, window=1)
    assert pacing.weigh(plan, SURE, longest=16, window=1).repeats
    assert not pacing.weigh(plan, UNSURE, longest=16, window=1).repeats


def test_without_a_model_what_is_unsure_is_not_drafted_at_all() -> None:
    pacing = AdaptivePacing(ahead=False)
    for _ in range(5):
        pacing.learn(outcome())
    plan = pacing.plan(longest=16, window=1)
    hardly = Prospect((0.02,), token_s=0.0001, catch_up_s=0.0, alone=True)
    assert pacing.weigh(plan, hardly, longest=16, window=1) == Plan(0)
    assert pacing.weigh(plan, replace(SURE, alone=True), longest=16, window=1).tokens > 4


def test_what_becomes_of_it_says_nothing_of_the_model() -> None:
    pacing = AdaptivePacing(ahead=False)
    for _ in range(5):
        pacing.learn(outcome())
    before = pacing.conditions(1)
    for _ in range(20):
        pacing.learn(outcome(accepted=0, token_s=0.0001, repeats=True))
    after = pacing.conditions(1)
    assert (after.acceptance, after.token_s) == (before.acceptance, before.token_s)


def test_where_drafts_have_a_fixed_length_it_is_taken_where_it_is_sure() -> None:
    fixed = FixedPacing(4)
    assert fixed.weigh(Plan(4), SURE, longest=16, window=1) == Plan(4, repeats=True)
    assert fixed.weigh(Plan(4), UNSURE, longest=16, window=1) == Plan(4)
    assert fixed.weigh(Plan(8, stream=True), SURE, longest=16, window=1) == Plan(8, stream=True)

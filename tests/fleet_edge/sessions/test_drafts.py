import numpy as np
import pytest

from fleet_edge.sessions.drafts import DraftResult, Rounds, WaitingDrafts, split_judgement
from sampling.distribution import Dist
from sampling.verification import Judgement
from schemas.messages import Draft
from schemas.reasons import Finish
from schemas.vocabulary import EMPTY_DIGEST
from tests.support.drafts import LIMITS, arrived, draft


def waiting(*messages: Draft) -> WaitingDrafts:
    drafts = WaitingDrafts()
    for message in messages:
        drafts.add(arrived(message))
    return drafts


def rounds(drafts: WaitingDrafts, most: int = 100) -> list[int]:
    return [each.draft.round for each in drafts.chain(base=0, digest=EMPTY_DIGEST, most=most)]


FIRST, SECOND = draft((4, 5), more=True), draft((6,), text=(4, 5), round_=1)


@pytest.mark.parametrize(("most", "taken"), [(3, [0, 1]), (2, [0]), (0, [0])])
def test_a_chain_takes_its_first_draft_whole_and_stops_at_the_allowance(most: int, taken: list[int]) -> None:
    assert rounds(waiting(FIRST, SECOND), most) == taken


def test_a_chain_goes_on_only_where_it_was_promised() -> None:
    assert rounds(waiting(draft((4, 5)), SECOND)) == [0]


def test_the_first_draft_at_a_position_is_kept() -> None:
    drafts = waiting(draft((4,)), draft((5,), round_=1))
    assert rounds(drafts) == [0]
    assert 0 in drafts
    assert 1 not in drafts


def test_verdicts_are_remembered_for_twice_the_window() -> None:
    rounds = Rounds(window=2)
    for round_ in range(5):
        rounds.remember(round_, b"%d" % round_)
    assert [rounds.verdict(round_) for round_ in range(6)] == [None, b"1", b"2", b"3", b"4", None]


def test_a_round_has_passed_once_it_or_a_later_one_is_answered() -> None:
    rounds = Rounds(window=2)
    assert not rounds.passed(0)
    rounds.remember(3, b"")
    rounds.remember(2, b"")
    assert [rounds.passed(round_) for round_ in range(5)] == [True, True, True, True, False]


P = Dist(np.array([6, 4]), np.array([0.75, 0.25]))
CHAIN = (arrived(draft((4, 5), more=True)), arrived(draft((6,), text=(4, 5), round_=1)))


def settled(judgement: Judgement, *, committed: int = 0) -> list[DraftResult]:
    return split_judgement(CHAIN, judgement, limits=LIMITS, committed=committed)


@pytest.mark.parametrize(("accepted", "tested", "place"), [(0, 1, 0), (1, 2, 0), (2, 1, 1)])
def test_a_rejection_belongs_to_its_draft_and_voids_the_rest(accepted: int, tested: int, place: int) -> None:
    parts = settled(Judgement(accepted, rejected=True, p=P))
    assert len(parts) == place + 1
    assert (parts[-1].tested, parts[-1].p, parts[-1].token, parts[-1].rejected) == (tested, P, None, True)
    assert sum(part.accepted for part in parts) == accepted


def test_in_coupled_mode_the_correction_is_the_edges() -> None:
    (part,) = settled(Judgement(1, rejected=True, token=8))
    assert (part.tokens, part.p, part.rejected) == ((4, 8), None, True)


def test_nothing_follows_an_end_token() -> None:
    chain = (arrived(draft((4, 0), more=True)), *CHAIN[1:])
    (part,) = split_judgement(chain, Judgement(3, rejected=False, token=7), limits=LIMITS, committed=0)
    assert (part.tokens, part.finish) == ((4, 0), Finish.STOP)
    (part,) = split_judgement(chain[:1], Judgement(2, rejected=False, token=7), limits=LIMITS, committed=0)
    assert (part.token, part.finish) == (None, Finish.STOP)


@pytest.mark.parametrize(
    ("committed", "finishes"), [(17, [Finish.NO, Finish.LENGTH]), (16, [Finish.NO, Finish.NO]), (18, [Finish.LENGTH])]
)
def test_the_text_ends_with_the_draft_that_reaches_its_length(committed: int, finishes: list[Finish]) -> None:
    assert [part.finish for part in settled(Judgement(3, rejected=False), committed=committed)] == finishes

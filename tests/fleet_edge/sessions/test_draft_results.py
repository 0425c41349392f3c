import numpy as np
import pytest

from dssd.distribution import Dist
from dssd.verification import Judgement
from fleet_edge.sessions.draft_results import DraftResult, split_judgement
from schemas.reasons import Finish
from tests.support.drafts import LIMITS, arrived, draft

P = Dist(np.array([6, 4]), np.array([0.75, 0.25]))
CHAIN = (arrived(draft((4, 5), more=True)), arrived(draft((6,), text=(4, 5), round_=1)))


def settled(judgement: Judgement, *, committed: int = 0) -> list[DraftResult]:
    return split_judgement(CHAIN, judgement, limits=LIMITS, committed=committed)


def test_a_token_drawn_behind_the_chain_belongs_to_its_last_draft() -> None:
    first, second = settled(Judgement(3, rejected=False, token=7))
    assert (first.accepted, first.tested, first.token, first.tokens) == (2, 2, None, (4, 5))
    assert (second.accepted, second.tested, second.token, second.tokens) == (1, 1, 7, (6, 7))
    assert not first.rejected
    assert not second.rejected


@pytest.mark.parametrize(("accepted", "tested", "place"), [(0, 1, 0), (1, 2, 0), (2, 1, 1)])
def test_a_rejection_belongs_to_the_draft_that_it_fell_in_and_those_behind_are_void(
    accepted: int, tested: int, place: int
) -> None:
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

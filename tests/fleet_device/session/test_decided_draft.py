from typing import Any

import pytest

from dssd.sampling import Proposal
from fleet_device.errors import ProtocolViolation
from fleet_device.session.sequence import DecidedDraft, SentDraft
from schemas.downlink import Sparse
from schemas.messages import Draft, Verdict
from schemas.reasons import Finish

P = Sparse(ids=(6,), probs=(1.0,))
PROPOSALS = (Proposal(4), Proposal(5))


def answer(accepted: int, following: Any = None, *, more: bool = False, finish: Finish = Finish.NO) -> DecidedDraft:
    """Return an answer to the draft 4, 5."""
    draft = Draft(handle=7, round=0, epoch=0, base=0, tokens=(4, 5), more=more, digest=0)
    verdict = Verdict(handle=7, round=0, accepted=accepted, next=following, finish=finish)
    return DecidedDraft(verdict, SentDraft(draft, PROPOSALS))


@pytest.mark.parametrize(("accepted", "head"), [(0, ()), (1, (4,)), (2, (4, 5))])
def test_the_accepted_head_ends_where_the_verdict_says(accepted: int, head: tuple[int, ...]) -> None:
    assert answer(accepted).head() == head


def test_no_more_can_be_accepted_than_was_drafted() -> None:
    with pytest.raises(ProtocolViolation, match="accepted 3 of 2"):
        answer(3).head()


def test_the_rejected_token_follows_the_accepted_head() -> None:
    assert [answer(accepted).rejected() for accepted in range(3)] == [*PROPOSALS, None]


def test_an_accepted_draft_is_followed_by_one_token_unless_more_were_promised() -> None:
    assert answer(2, 6).bonus() == (6,)
    assert answer(2, more=True).bonus() == ()
    assert answer(2, finish=Finish.STOP).bonus() == ()


@pytest.mark.parametrize(
    "wrong",
    [answer(2), answer(2, P), answer(2, P, finish=Finish.LENGTH), answer(2, 6, more=True)],
    ids=["nothing", "p", "p at the end", "a token where the next draft stands"],
)
def test_nothing_else_may_follow_it(wrong: DecidedDraft) -> None:
    with pytest.raises(ProtocolViolation):
        wrong.bonus()

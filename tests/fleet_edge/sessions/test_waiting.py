import pytest

from fleet_edge.errors import DraftFault
from fleet_edge.sessions.waiting import WaitingDrafts
from schemas.messages import Draft
from schemas.reasons import FaultCode
from schemas.vocabulary import EMPTY_DIGEST, extend_digest
from tests.support.drafts import arrived, draft


def waiting(*messages: Draft) -> WaitingDrafts:
    drafts = WaitingDrafts()
    for message in messages:
        drafts.add(arrived(message))
    return drafts


def rounds(drafts: WaitingDrafts, most: int = 100) -> list[int]:
    """Return the rounds of the chain that stands on the empty text."""
    return [each.draft.round for each in drafts.chain(base=0, digest=EMPTY_DIGEST, most=most)]


FIRST, SECOND = draft((4, 5), more=True), draft((6,), text=(4, 5), round_=1)


@pytest.mark.parametrize("messages", [(FIRST, SECOND), (SECOND, FIRST)], ids=["in order", "overtaken"])
def test_consecutive_drafts_form_a_chain(messages: tuple[Draft, Draft]) -> None:
    assert rounds(waiting(*messages)) == [0, 1]


@pytest.mark.parametrize(("most", "taken"), [(3, [0, 1]), (2, [0]), (0, [0])])
def test_a_chain_takes_its_first_draft_whole_and_stops_at_the_allowance(most: int, taken: list[int]) -> None:
    assert rounds(waiting(FIRST, SECOND), most) == taken


def test_a_chain_goes_on_only_where_it_was_promised() -> None:
    assert rounds(waiting(draft((4, 5)), SECOND)) == [0]


def test_a_chain_ends_before_a_draft_on_another_text() -> None:
    drafts = waiting(FIRST, draft((6,), text=(4, 9), round_=1))
    assert rounds(drafts) == [0]
    assert len(drafts) == 2


def test_a_first_draft_on_another_text_is_dropped() -> None:
    drafts = waiting(draft((6,), text=(4, 9), round_=1))
    with pytest.raises(DraftFault) as caught:
        drafts.chain(base=2, digest=extend_digest(EMPTY_DIGEST, (4, 5)), most=100)
    assert caught.value.code is FaultCode.DESYNC
    assert len(drafts) == 0


def test_the_first_draft_at_a_position_is_kept() -> None:
    drafts = waiting(draft((4,)), draft((5,), round_=1))
    assert rounds(drafts) == [0]
    assert 0 in drafts
    assert 1 not in drafts

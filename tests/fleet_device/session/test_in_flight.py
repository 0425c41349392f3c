from dssd.sampling import Proposal
from fleet_device.session.sequence import DraftsInFlight
from schemas.messages import Draft, Verdict


def put(window: DraftsInFlight, round_: int, *tokens: int, more: bool = False) -> Draft:
    """Build a draft and put it under way."""
    window.building.extend(Proposal(token) for token in tokens)
    draft = Draft(handle=7, round=round_, epoch=0, base=0, tokens=tokens, more=more, digest=0)
    window.sent(draft)
    return draft


def heard(window: DraftsInFlight, *rounds: int) -> None:
    for round_ in rounds:
        window.heard(Verdict(handle=7, round=round_, accepted=0))


def rounds(window: DraftsInFlight) -> list[int]:
    """Take all answers that are there."""
    return [answer.draft.round for answer in iter(window.next_decided, None)]


def test_behind_the_text_come_drafts_under_way_and_then_the_one_being_built() -> None:
    window = DraftsInFlight()
    assert (window.length, window.last_token, window.tokens, window.drafts) == (0, None, (), ())
    drafts = (put(window, 0, 4, 5, more=True), put(window, 1, more=True))
    assert (window.length, window.last_token, window.tokens, window.drafts) == (2, 5, (4, 5), drafts)
    window.building.append(Proposal(6))
    assert (window.length, window.last_token, window.tokens) == (3, 6, (4, 5))


def test_an_answer_has_the_proposals_that_the_draft_was_made_of() -> None:
    window = DraftsInFlight()
    put(window, 0, 4, 5)
    heard(window, 0)
    answer = window.next_decided()
    assert answer is not None
    assert [proposal.token for proposal in answer.sent.proposals] == [4, 5]
    assert window.length == 0


def test_verdicts_that_overtook_each_other_are_taken_in_the_order_of_the_drafts() -> None:
    window = DraftsInFlight()
    for round_ in range(3):
        put(window, round_, 4, more=True)
    heard(window, 1)
    assert rounds(window) == []
    heard(window, 0)
    assert rounds(window) == [0, 1]
    heard(window, 2)
    assert rounds(window) == [2]


def test_a_verdict_on_no_draft_under_way_is_not_kept() -> None:
    window = DraftsInFlight()
    heard(window, 0, 1)
    put(window, 0, 4)
    assert rounds(window) == []


def test_a_window_that_was_voided_is_empty() -> None:
    window = DraftsInFlight()
    put(window, 0, 4, more=True)
    put(window, 1, 5, more=True)
    heard(window, 1)
    window.building.append(Proposal(6))
    window.void()
    assert (window.length, window.drafts) == (0, ())
    put(window, 1, 7)
    assert rounds(window) == []

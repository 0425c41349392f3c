from typing import Any

import pytest

from fleet_device.errors import ProtocolViolation, SessionRefused
from fleet_device.session.machine import DeviceSession
from fleet_device.session.sequence import (
    CommittedTokens,
    DraftsInFlight,
    Rejection,
    SentDraft,
    TokenOrigin,
    session_request,
)
from sampling.distribution import point_mass
from sampling.drawing import Proposal, propose
from schemas.downlink import Samples, Sparse
from schemas.fields import MAX_TOKENS
from schemas.messages import Draft, Open, Verdict
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import Finish, RefusalCode
from tests.fleet_device.session.test_machine import HANDLE, VOCABULARY, P, session_of

PROPOSALS = (Proposal(4), Proposal(5))


def answer(accepted: int, following: Any = None, *, more: bool = False, finish: Finish = Finish.NO) -> SentDraft:
    draft = Draft(handle=7, round=0, epoch=0, base=0, tokens=(4, 5), more=more, digest=0)
    verdict = Verdict(handle=7, round=0, accepted=accepted, next=following, finish=finish)
    return SentDraft(draft, PROPOSALS, answer=verdict)


@pytest.mark.parametrize(
    "wrong",
    [answer(2), answer(2, P), answer(2, P, finish=Finish.LENGTH), answer(2, 6, more=True)],
    ids=["nothing", "p", "p at the end", "a token where the next draft stands"],
)
def test_nothing_else_may_follow_it(wrong: SentDraft) -> None:
    with pytest.raises(ProtocolViolation):
        wrong.bonus()


def put(window: DraftsInFlight, round_: int, *tokens: int, more: bool = False) -> Draft:
    window.building.extend(Proposal(token) for token in tokens)
    draft = Draft(handle=7, round=round_, epoch=0, base=0, tokens=tokens, more=more, digest=0)
    window.add(draft)
    return draft


def test_behind_the_text_come_drafts_under_way_and_then_the_one_being_built() -> None:
    window = DraftsInFlight()
    assert (window.length, window.last_token, window.tokens, window.drafts) == (0, None, (), ())
    drafts = (put(window, 0, 4, 5, more=True), put(window, 1, more=True))
    assert (window.length, window.last_token, window.tokens, window.drafts) == (2, 5, (4, 5), drafts)
    window.building.append(Proposal(6))
    assert (window.length, window.last_token, window.tokens) == (3, 6, (4, 5))


DRAFTED, CORRECTED, BONUS = TokenOrigin.DRAFTED, TokenOrigin.CORRECTED, TokenOrigin.BONUS


def decided(session: DeviceSession, tokens: tuple[int, ...], accepted: int, following: Any) -> CommittedTokens:
    for token in tokens:
        session.propose(point_mass(token))
    verdict = Verdict(handle=HANDLE, round=session.finish_draft().round, accepted=accepted, next=following)
    (effect,) = session.on_verdict(verdict)
    assert effect.committed.ids == effect.tokens
    return effect.committed


@pytest.mark.parametrize(
    ("mode", "accepted", "following", "origins"),
    [
        (Mode.RESIDUAL, 2, 6, (DRAFTED, DRAFTED, BONUS)),
        (Mode.RESIDUAL, 1, Sparse(ids=(6,), probs=(1.0,)), (DRAFTED, CORRECTED)),
        (Mode.RESIDUAL, 0, Sparse(ids=(6,), probs=(1.0,)), (CORRECTED,)),
        (Mode.COUPLED, 1, 6, (DRAFTED, CORRECTED)),
    ],
)
def test_accepted_tokens_were_drafted_and_what_follows_them_is_a_bonus_or_a_correction(
    mode: Mode, accepted: int, following: Any, origins: tuple[TokenOrigin, ...]
) -> None:
    assert decided(session_of(mode=mode), (4, 5), accepted, following).origins == origins


def test_a_correction_that_took_more_samples_is_one_all_the_same() -> None:
    session = session_of()
    assert decided(session, (4,), 0, Samples(start=0, ids=(4,) * 16, probs=(0.5,) * 16)) == CommittedTokens((), ())
    (asked,) = session.unanswered()
    (effect,) = session.on_verdict(
        Verdict(handle=HANDLE, round=asked.round, accepted=0, next=Samples(start=16, ids=(6,), probs=(1.0,)))
    )
    assert effect.committed == CommittedTokens((6,), (CORRECTED,))


def test_what_the_edge_writes_by_itself_says_so() -> None:
    session = session_of()
    request = session.request_edge_only(8)
    (effect,) = session.on_verdict(Verdict(handle=HANDLE, round=request.round, accepted=0, base=0, written=(3, 4)))
    assert effect.committed == CommittedTokens((3, 4), (TokenOrigin.EDGE_ONLY,) * 2)


def test_committed_tokens_are_a_sequence_of_ids() -> None:
    tokens = CommittedTokens((3, 4), (DRAFTED, BONUS))
    assert (list(tokens), tokens[0], tokens[1:], len(tokens)) == ([3, 4], 3, (4,), 2)
    with pytest.raises(ValueError, match="2 tokens have 1 origins"):
        CommittedTokens((3, 4), (DRAFTED,))


def policy(mode: Mode = Mode.RESIDUAL) -> SamplingPolicy:
    return SamplingPolicy(mode=mode, seed=1)


def rejection(mode: Mode = Mode.RESIDUAL) -> Rejection:
    return Rejection(propose(point_mass(4), policy=policy(mode), position=3), position=3)


def samples(start: int, *ids: int) -> Samples:
    """A sample of 4 never passes where the draft was certain of it; any other always passes."""
    return Samples(start=start, ids=ids, probs=(0.5,) * len(ids))


@pytest.mark.parametrize("start", [0, 2, 4])
def test_samples_that_do_not_begin_where_the_last_ended_are_refused(start: int) -> None:
    rejected = rejection()
    rejected.correction(samples(0, 4, 4, 4), policy=policy())
    with pytest.raises(ProtocolViolation):
        rejected.correction(samples(start, 4), policy=policy())
    assert rejected.tried == 3


@pytest.mark.parametrize(
    ("mode", "following"), [(Mode.RESIDUAL, None), (Mode.COUPLED, None), (Mode.RESIDUAL, 6), (Mode.COUPLED, P)]
)
def test_nothing_is_drawn_from_what_belongs_to_no_rejection(mode: Mode, following: Any) -> None:
    with pytest.raises(ProtocolViolation):
        rejection(mode).correction(following, policy=policy(mode))


def terms(**fields: Any) -> Open:
    whole = {
        "session": b"session1", "prompt": (1, 2), "policy": SamplingPolicy(), "max_new_tokens": 20,
        "vocabulary": VOCABULARY, "draft_model": "toy", "quantization": "none",
    }  # fmt: skip
    return session_request(**(whole | fields))


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": (1,) * (MAX_TOKENS + 1)}, RefusalCode.PROMPT_TOO_LONG),
        ({"max_new_tokens": MAX_TOKENS + 1}, RefusalCode.MAX_NEW_TOKENS),
        ({"max_new_tokens": -1}, RefusalCode.MAX_NEW_TOKENS),
    ],
    ids=["prompt", "text", "negative"],
)
def test_what_no_open_can_carry_is_refused_at_once(fields: dict[str, Any], code: RefusalCode) -> None:
    with pytest.raises(SessionRefused) as caught:
        terms(**fields)
    assert caught.value.code is code


def test_long_names_of_models_are_cut() -> None:
    asked = DeviceSession(terms(draft_model="m" * 5000, quantization="q" * 5000)).open()
    assert (len(asked.draft_model), len(asked.quantization)) == (200, 200)

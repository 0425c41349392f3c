import numpy as np
import pytest

from fleet_edge.errors import DraftFault
from fleet_edge.sessions.admission import SessionLimits
from fleet_edge.sessions.drafts import DraftResult, ReceivedDraft
from fleet_edge.sessions.machine import DraftReceipt, EdgeSession
from fleet_edge.sessions.states import EdgeSessionState
from sampling.distribution import Dist
from sampling.verification import Judgement
from schemas.messages import Draft
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import Action, FaultCode, Finish
from schemas.vocabulary import EMPTY_DIGEST, extend_digest
from tests.support.drafts import arrived, close, draft, edge_session

P = Dist(np.array([6, 4]), np.array([0.75, 0.25]))
REJECTED = Judgement(1, rejected=True, p=P)
ACCEPTED = Judgement(2, rejected=False, token=6)


def judged(session: EdgeSession, judgement: Judgement) -> list[DraftResult]:
    return session.settle(session.chain(100), judgement)


def admitted(session: EdgeSession, *messages: Draft) -> list[DraftReceipt]:
    return [session.admit(arrived(message)) for message in messages]


def after(judgement: Judgement, *tokens: int) -> EdgeSession:
    """Return a session in which a draft of these tokens was judged."""
    session = edge_session()
    admitted(session, draft(tokens))
    judged(session, judgement)
    return session


def after_rejection() -> EdgeSession:
    """Return a session after a rejection: of the drafted tokens 4 and 5, 5 was rejected and a correction is due."""
    return after(REJECTED, 4, 5)


def fault_of(session: EdgeSession, message: Draft) -> DraftFault:
    before = (list(session.tokens), session.ready, session.rejection)
    with pytest.raises(DraftFault) as caught:
        session.admit(arrived(message))
    assert (session.tokens, session.ready, session.rejection) == before
    return caught.value


def test_an_accepted_draft_is_committed_with_its_bonus_token() -> None:
    session = edge_session()
    assert admitted(session, draft((4, 5))) == [DraftReceipt()]
    assert session.ready is not None
    (settled,) = judged(session, ACCEPTED)
    assert (settled.accepted, settled.tested, settled.token, settled.finish) == (2, 2, 6, Finish.NO)
    assert session.tokens == [1, 2, 3, 4, 5, 6]
    assert session.committed == 3
    assert session.ready is None


def test_a_rejection_waits_for_its_correction() -> None:
    session = after_rejection()
    assert session.tokens == [1, 2, 3, 4]
    assert session.rejection is not None
    assert session.rejection.p is P
    admitted(session, draft((7,), text=(4, 6), fix=6, round_=1, epoch=1))
    assert session.tokens == [1, 2, 3, 4, 6]
    assert session.ready is not None
    assert session.rejection is None


def test_a_draft_that_overtakes_the_correction_waits_for_it() -> None:
    session = after_rejection()
    admitted(session, draft((8,), text=(4, 6, 7), round_=2, epoch=1))
    assert (session.state, session.ready) == (EdgeSessionState.CORRECTING, None)
    admitted(session, draft((7,), text=(4, 6), fix=6, round_=1, epoch=1, more=True))
    assert session.state is EdgeSessionState.DRAFTING
    assert [each.draft.round for each in session.chain(100)] == [1, 2]


def test_a_repeat_is_answered_with_the_same_bytes() -> None:
    session = after(ACCEPTED, 4, 5)
    session.remember(0, b"verdict")
    assert admitted(session, draft((4, 5))) == [DraftReceipt(repeat=b"verdict")]
    assert session.counters.drafted == 2


def test_a_draft_delivered_twice_waits_once() -> None:
    session = edge_session()
    assert admitted(session, draft(), draft()) == [DraftReceipt(), DraftReceipt()]
    assert len(session.chain(100)) == 1
    assert session.counters.drafted == 2


def test_drafts_ahead_are_verified_together() -> None:
    session = edge_session()
    admitted(session, draft((4, 5), more=True), draft((6,), text=(4, 5), round_=1))
    assert [each.draft.round for each in session.chain(100)] == [0, 1]
    assert session.wants_token_after(session.chain(100))
    assert not session.wants_token_after(session.chain(100)[:1])
    first, second = judged(session, Judgement(3, rejected=False, token=7))
    assert (first.accepted, first.token, second.accepted, second.token) == (2, None, 1, 7)
    assert session.tokens[3:] == [4, 5, 6, 7]


def test_a_rejection_voids_the_drafts_behind_it() -> None:
    session = edge_session()
    admitted(session, draft((4, 5), more=True), draft((6,), text=(4, 5), round_=1))
    (settled,) = judged(session, REJECTED)
    assert (settled.arrived.draft.round, settled.accepted, settled.tested) == (0, 1, 2)
    assert admitted(session, draft((6,), text=(4, 5), round_=1)) == [DraftReceipt()]
    counters = session.counters
    assert (counters.drafted, counters.tested, counters.accepted, counters.tokens) == (3, 2, 1, len(session.tokens) - 3)


def test_a_draft_that_overtook_its_predecessor_waits_for_it() -> None:
    session = edge_session()
    ahead, behind = draft((6,), text=(4, 5), round_=1), draft((4, 5), more=True)
    admitted(session, ahead)
    assert session.ready is None
    admitted(session, behind)
    assert len(session.chain(100)) == 2
    assert session.counters.drafted == 3


def test_an_early_draft_on_another_text_is_void_in_its_turn() -> None:
    session = edge_session()
    wrong = draft((6,), text=(4, 9), round_=1)
    admitted(session, wrong, draft((4, 5), more=True))
    assert len(session.chain(100)) == 1
    judged(session, Judgement(2, rejected=False))
    with pytest.raises(DraftFault) as caught:
        session.chain(100)
    assert (caught.value.code, caught.value.action) == (FaultCode.TOKENS_DIFFER, Action.RESUME)
    assert session.ready is None


def test_an_end_token_ends_the_text_without_a_bonus_token() -> None:
    session = edge_session()
    admitted(session, draft((4, 0)))
    (settled,) = judged(session, ACCEPTED)
    assert (settled.finish, settled.token) == (Finish.STOP, None)
    assert session.finished
    assert session.tokens[3:] == [4, 0]


def test_the_last_token_ends_the_text() -> None:
    session = edge_session(resume=(4,) * 18)
    admitted(session, draft((5, 6), text=(4,) * 18))
    assert not session.wants_token_after(session.chain(100))
    (settled,) = judged(session, Judgement(2, rejected=False))
    assert settled.finish is Finish.LENGTH
    assert session.finished


def test_a_resumed_session_goes_on_from_the_whole_text() -> None:
    session = edge_session(attempt=3, resume=(4, 5))
    assert (session.attempt, session.committed, session.tokens) == (3, 2, [1, 2, 3, 4, 5])
    admitted(session, draft((6,), text=(4, 5)))
    assert session.ready is not None


def test_a_draft_on_less_text_than_the_edge_has_is_out_of_step() -> None:
    session = edge_session(resume=(4, 5))
    assert fault_of(session, draft((6,), text=(4,))).code is FaultCode.TOKENS_DIFFER


@pytest.mark.parametrize(
    "message",
    [
        draft((7,), text=(4,), round_=1, epoch=1),  # no correction
        draft((7,), text=(4, 9), fix=9, round_=1, epoch=1),  # the target rules it out
        draft((7,), text=(4, 6), fix=4, round_=1, epoch=1),  # not the one that the digest is over
        draft((7,), text=(4, 6, 7), fix=7, round_=1, epoch=1),  # at another place
        draft((), text=(), counted=False, round_=1, epoch=1, tried=16),  # samples of another place
    ],
)
def test_a_wrong_correction_is_out_of_step(message: Draft) -> None:
    assert fault_of(after_rejection(), message).code is FaultCode.TOKENS_DIFFER


def test_more_drafts_than_the_window_are_refused() -> None:
    session = edge_session()
    admitted(session, draft((5,), text=(4,), round_=1), draft((5,), text=(4, 5), round_=2))
    assert fault_of(session, draft((5,), text=(4, 5, 5), round_=3)).code is FaultCode.TOO_LONG


def test_samples_may_be_asked_for_until_the_correction() -> None:
    session = after_rejection()
    request = draft((), text=(4,), counted=False, round_=1, epoch=1, tried=16)
    assert admitted(session, request) == [DraftReceipt(request=True)]
    session.remember(1, b"more")
    assert admitted(session, request) == [DraftReceipt(repeat=b"more")]
    admitted(session, draft((7,), text=(4, 6), fix=6, round_=2, epoch=1))
    assert fault_of(session, request.model_copy(update={"round": 3})).code is FaultCode.TOKENS_DIFFER


def test_a_close_may_bring_the_last_correction() -> None:
    session = after_rejection()
    session.close(close(fix=6, tokens=2))
    assert session.tokens[3:] == [4, 6]
    assert session.finished


@pytest.mark.parametrize("fields", [{"fix": 9}, {"fix": 2_000_000}, {"fix": 6, "tokens": 3}, {}])
def test_a_close_brings_no_token_that_the_target_rules_out(fields: dict[str, int]) -> None:
    session = after_rejection()
    session.close(close(**{"tokens": 2, **fields}))
    assert session.tokens[3:] == [4]


def test_a_close_brings_nothing_where_nothing_was_rejected() -> None:
    session = edge_session()
    session.close(close(fix=6, tokens=1))
    assert session.tokens == [1, 2, 3]


def test_a_failed_session_answers_every_draft_with_its_fault() -> None:
    session = edge_session()
    admitted(session, draft())
    session.fail(DraftFault(FaultCode.INTERNAL, Action.GIVE_UP, "The target failed."))
    assert session.ready is None
    for round_ in (0, 1):
        assert fault_of(session, draft(round_=round_)).code is FaultCode.INTERNAL


def test_void_drafts_are_counted_once_in_whatever_order_they_arrive() -> None:
    session = edge_session()
    ahead = [draft((6,), text=(4, 5), round_=1, more=True), draft((7,), text=(4, 5, 6), round_=2)]
    admitted(session, ahead[1], draft((4, 5), more=True))
    judged(session, REJECTED)
    admitted(session, ahead[0], ahead[0], ahead[1])
    assert session.counters.drafted == 4


def test_a_draft_of_an_earlier_epoch_that_arrives_late_takes_nobodys_place() -> None:
    session = after_rejection()
    assert admitted(session, draft((6,), text=(4, 5), round_=1)) == [DraftReceipt()]
    admitted(session, draft((7,), text=(4, 6), fix=6, round_=2, epoch=1))
    assert [each.draft.round for each in session.chain(100)] == [2]


def test_a_draft_whose_verdict_is_no_longer_remembered_is_passed_over() -> None:
    session = edge_session()
    text: list[int] = []
    for round_ in range(6):
        admitted(session, draft((4,), text=text, round_=round_))
        judged(session, Judgement(1, rejected=False, token=5))
        session.remember(round_, b"verdict")
        text += [4, 5]
    assert admitted(session, draft((4,), round_=0)) == [DraftReceipt()]


def test_a_draft_that_arrives_after_the_end_is_passed_over() -> None:
    session = after(ACCEPTED, 4, 0)
    assert session.finished
    assert admitted(session, draft((9,), round_=1)) == [DraftReceipt()]


def test_nothing_is_verified_once_a_session_is_closed() -> None:
    session = edge_session()
    admitted(session, draft())
    session.close(close(tokens=2))
    assert session.ready is None
    assert session.chain(100) == ()


END = 0
PROMPT = [1, 2]


def session_of(mode: Mode = Mode.COUPLED, *, most: int = 20) -> EdgeSession:
    return EdgeSession(
        handle=3,
        session=bytes(8),
        attempt=0,
        device="device-1",
        policy=SamplingPolicy(mode=mode, temperature=1.0, top_k=0, top_p=1.0, seed=1),
        limits=SessionLimits(most, max_draft=8, window=4, vocabulary=50, end_tokens=frozenset({END})),
        tokens=list(PROMPT),
        prompt_length=len(PROMPT),
    )


def text_of(session: EdgeSession) -> list[int]:
    return session.tokens[len(PROMPT) :]


def ask(session: EdgeSession, round_: int, *, base: int, write: int, epoch: int = 0) -> DraftReceipt:
    digest = extend_digest(EMPTY_DIGEST, text_of(session)[:base])
    counts = () if session.policy.mode is Mode.RESIDUAL else None
    draft = Draft(handle=3, round=round_, epoch=epoch, base=base, digest=digest, counts=counts, write=write)
    return session.admit(ReceivedDraft(draft, at=0.0))


def write(session: EdgeSession, token: int) -> Finish:
    (result,) = session.settle(session.chain(16), Judgement(0, rejected=False, token=token))
    return result.finish


def taken(session: EdgeSession) -> tuple[int, tuple[int, ...]]:
    decode = session.decode
    return decode.sent, session.take_unsent(decode, at=0.0)


@pytest.mark.parametrize("mode", Mode)
def test_it_writes_as_many_tokens_as_asked_and_waits(mode: Mode) -> None:
    session = session_of(mode)
    assert not ask(session, 0, base=0, write=2).written
    (ready,) = session.chain(16)
    assert (ready.draft.tokens, ready.draft.base, session.wants_token_after((ready,))) == ((), 0, True)
    write(session, 4)
    assert taken(session) == (0, (4,))
    write(session, 5)
    assert taken(session) == (1, (5,))
    assert session.ready is None
    assert session.chain(16) == ()


def test_a_request_from_behind_is_sent_what_it_lacks() -> None:
    session = session_of()
    ask(session, 0, base=0, write=10)
    for token in (4, 5, 6):
        write(session, token)
        taken(session)
    assert not ask(session, 1, base=1, write=10).written
    write(session, 7)
    assert taken(session) == (1, (5, 6, 7))
    assert ask(session, 2, base=2, write=0).written
    assert taken(session) == (2, (6, 7))
    assert session.ready is None
    assert ask(session, 2, base=2, write=0).written
    assert taken(session) == (2, (6, 7))


def test_the_latest_tokens_wait_for_others_but_for_half_of_the_request_and_its_end() -> None:
    session = session_of()
    ask(session, 0, base=0, write=10)
    waits = []
    for _ in range(10):
        write(session, 4)
        assert session.decode is not None
        waits.append(session.decode.may_wait(session.committed))
        if not waits[-1]:
            taken(session)
    assert waits == [*[True] * 4, False, *[True] * 4, False]


def test_a_request_that_comes_late_means_nothing() -> None:
    session = session_of()
    ask(session, 5, base=0, write=3)
    write(session, 4)
    taken(session)
    assert ask(session, 4, base=0, write=20) == DraftReceipt()
    assert session.decode.until == 3


def test_a_draft_ends_the_writing() -> None:
    session = session_of()
    ask(session, 0, base=0, write=10)
    write(session, 4)
    taken(session)
    digest = extend_digest(EMPTY_DIGEST, [4])
    session.admit(ReceivedDraft(Draft(handle=3, round=1, epoch=0, base=1, tokens=(5,), digest=digest), at=0.0))
    assert session.decode is None
    (arrived,) = session.chain(16)
    assert arrived.draft.tokens == (5,)
    assert ask(session, 0, base=0, write=10) == DraftReceipt()  # a repetition of the request, delivered late
    session.settle((arrived,), Judgement(1, rejected=False, token=6))
    session.remember(1, b"verdict")
    assert ask(session, 0, base=0, write=10) == DraftReceipt()
    assert session.decode is None


def test_a_request_voids_the_drafts_that_wait() -> None:
    session = session_of()
    session.admit(ReceivedDraft(Draft(handle=3, round=0, epoch=0, base=1, tokens=(5,), digest=1), at=0.0))
    ask(session, 1, base=0, write=1)
    write(session, 4)
    digest = extend_digest(EMPTY_DIGEST, [4])
    session.admit(ReceivedDraft(Draft(handle=3, round=2, epoch=0, base=1, tokens=(6,), digest=digest), at=0.0))
    (arrived,) = session.chain(16)
    assert arrived.draft.tokens == (6,)


def test_a_request_that_a_draft_has_overtaken_does_not_void_it() -> None:
    session = session_of()
    session.admit(ReceivedDraft(Draft(handle=3, round=1, epoch=0, base=0, tokens=(5,), digest=EMPTY_DIGEST), at=0.0))
    assert ask(session, 0, base=0, write=10) == DraftReceipt()
    (arrived,) = session.chain(16)
    assert arrived.draft.tokens == (5,)


def test_the_end_of_the_text_is_told_again() -> None:
    session = session_of()
    ask(session, 0, base=0, write=10)
    assert write(session, END) is Finish.STOP
    assert taken(session) == (0, (END,))
    assert ask(session, 0, base=0, write=10).written
    assert (taken(session), session.finish) == ((0, (END,)), Finish.STOP)
    session = session_of(most=1)
    ask(session, 0, base=0, write=10)
    assert write(session, 4) is Finish.LENGTH
    assert session.finish is Finish.LENGTH


@pytest.mark.parametrize(("base", "epoch"), [(1, 0), (0, 1)])
def test_a_request_for_another_text_is_refused(base: int, epoch: int) -> None:
    session = session_of()
    with pytest.raises(DraftFault) as caught:
        ask(session, 0, base=base, write=3, epoch=epoch)
    assert caught.value.code is FaultCode.TOKENS_DIFFER
    ask(session, 1, base=0, write=3)
    write(session, 4)
    taken(session)
    wrong = Draft(handle=3, round=2, epoch=0, base=1, digest=1, write=3)
    with pytest.raises(DraftFault) as caught:
        session.admit(ReceivedDraft(wrong, at=0.0))
    assert caught.value.code is FaultCode.TOKENS_DIFFER

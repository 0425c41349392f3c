"""The edge writes by itself: what it makes of requests that come twice, late, or from a place behind its own."""

import pytest

from dssd.verification import Judgement
from fleet_edge.errors import DraftFault
from fleet_edge.sessions.limits import SessionLimits
from fleet_edge.sessions.machine import DraftReceipt, EdgeSession
from fleet_edge.sessions.waiting import ReceivedDraft
from schemas.messages import Draft
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import FaultCode, Finish
from schemas.vocabulary import EMPTY_DIGEST, extend_digest

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
    """Let the next token of the stream be this one."""
    (result,) = session.settle(session.chain(16), Judgement(0, rejected=False, token=token))
    return result.finish


def taken(session: EdgeSession) -> tuple[int, tuple[int, ...]]:
    stream = session.stream
    assert stream is not None
    return stream.sent, session.take_written(stream, at=0.0)


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
    # More is to come, and brings the rest with it.
    assert not ask(session, 1, base=1, write=10).written
    write(session, 7)
    assert taken(session) == (1, (5, 6, 7))
    # No more is to come.
    assert ask(session, 2, base=2, write=0).written
    assert taken(session) == (2, (6, 7))
    assert session.ready is None
    # The same again, as often as it comes.
    assert ask(session, 2, base=2, write=0).written
    assert taken(session) == (2, (6, 7))


def test_a_request_that_comes_late_means_nothing() -> None:
    session = session_of()
    ask(session, 5, base=0, write=3)
    write(session, 4)
    taken(session)
    assert ask(session, 4, base=0, write=20) == DraftReceipt()
    assert session.stream is not None
    assert session.stream.until == 3


def test_a_draft_ends_the_writing() -> None:
    session = session_of()
    ask(session, 0, base=0, write=10)
    write(session, 4)
    taken(session)
    digest = extend_digest(EMPTY_DIGEST, [4])
    session.admit(ReceivedDraft(Draft(handle=3, round=1, epoch=0, base=1, tokens=(5,), digest=digest), at=0.0))
    assert session.stream is None
    (arrived,) = session.chain(16)
    assert arrived.draft.tokens == (5,)
    assert ask(session, 0, base=0, write=10) == DraftReceipt()  # a repetition of the request, delivered late


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
    assert caught.value.code is FaultCode.DESYNC
    ask(session, 1, base=0, write=3)
    write(session, 4)
    taken(session)
    wrong = Draft(handle=3, round=2, epoch=0, base=1, digest=1, write=3)
    with pytest.raises(DraftFault, match="another text"):
        session.admit(ReceivedDraft(wrong, at=0.0))

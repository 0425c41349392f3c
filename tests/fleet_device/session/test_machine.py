from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from fleet_device.errors import ProtocolViolation
from fleet_device.session.machine import DeviceSession
from fleet_device.session.sequence import CommittedTokens, TokenOrigin, VerdictEffect, session_request
from sampling.distribution import point_mass
from schemas.downlink import Dense, Samples, Sparse
from schemas.messages import Closed, Open, Opened, Verdict
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import EndReason, Finish
from schemas.vocabulary import EMPTY_DIGEST, Vocabulary, extend_digest

VOCABULARY = Vocabulary.of([f"t{token}" for token in range(10)])
NAME = b"session1"
HANDLE = 7


def terms(*, mode: Mode = Mode.RESIDUAL) -> Open:
    return session_request(NAME, (1, 2), SamplingPolicy(mode=mode, seed=1), 20, VOCABULARY, "toy", "none")


def opened(**fields: Any) -> Opened:
    whole = {
        "session": NAME, "attempt": 0, "handle": HANDLE, "edge": "edge-1", "target": "toy", "target_id": bytes(8),
        "position": 0, "max_new_tokens": 20, "max_draft": 4, "window": 2, "lease_s": 60.0, "end_tokens": (0,),
    }  # fmt: skip
    return Opened.model_validate(whole | fields)


def session_of(*, mode: Mode = Mode.RESIDUAL, **fields: Any) -> DeviceSession:
    session = DeviceSession(terms(mode=mode))
    session.open()
    assert session.on_opened(opened(**fields))
    return session


def drafted(session: DeviceSession, *tokens: int, more: bool = False) -> int:
    for token in tokens:
        assert session.propose(point_mass(token)) == token
    return session.finish_draft(more=more).round


def verdict(round_: int, accepted: int, following: Any = None, **fields: Any) -> Verdict:
    return Verdict(handle=HANDLE, round=round_, accepted=accepted, next=following, **fields)


P = Sparse(ids=(6,), probs=(1.0,))


# Opening


def test_another_process_opens_behind_what_the_first_has_committed_at_the_same_target() -> None:
    session = DeviceSession(terms())
    origins = (TokenOrigin.BONUS, TokenOrigin.OTHER_TARGET)
    begun = [CommittedTokens((3, 4), (origin,) * 2, target_id=b"8 bytes!") for origin in origins]
    session.continue_from(begun[:1], attempt=65_536)
    message = session.open()
    assert (message.attempt, message.resume, message.target_id) == (65_536, (3, 4), b"8 bytes!")
    assert (session.sequence.digest, session.sequence.unverified) == (extend_digest(EMPTY_DIGEST, (3, 4)), 0)
    session = DeviceSession(terms())
    session.continue_from(begun, attempt=65_536)
    assert session.sequence.unverified == 2


def test_a_correction_that_a_resume_has_told_is_not_told_again() -> None:
    session = session_of()
    session.on_verdict(verdict(drafted(session, 4), 0, P))
    assert session.open().resume == (6,)
    assert session.on_opened(opened(attempt=1, position=1))
    draft = session.finish_draft()
    assert (draft.fix, draft.base, draft.epoch) == (None, 1, 0)


def test_an_open_that_is_late_to_be_answered_is_repeated_as_it_was() -> None:
    session = DeviceSession(terms())
    first = session.open()
    assert session.open_again() == first
    session.on_undelivered()
    assert session.open_again() == first
    assert session.on_opened(opened())
    assert not session.on_opened(opened(handle=9))  # the answer to a repetition, maybe of another edge
    assert session.opened == opened()


def test_an_open_for_a_text_that_has_grown_is_another() -> None:
    session = session_of()
    session.on_verdict(verdict(drafted(session, 4, 5), 2, 6))
    session.suspend()
    again = session.open_again()
    assert (again.attempt, again.resume) == (1, (4, 5, 6))


def test_an_answer_to_an_open_of_before_means_nothing_while_the_next_one_waits() -> None:
    session = session_of()
    session.on_verdict(verdict(drafted(session, 4, 5), 2, 6))
    session.suspend()
    assert not session.on_opened(opened())  # the answer to a repetition, after more tokens were committed
    assert session.opened is None


def test_an_edge_that_resumes_elsewhere_is_refused() -> None:
    session = DeviceSession(terms())
    session.open()
    with pytest.raises(ProtocolViolation):
        session.on_opened(opened(position=3))


# Drafting


def test_a_draft_has_room_for_what_was_agreed_and_for_what_the_text_still_takes() -> None:
    session = session_of()
    assert (session.room(9), session.room(3), session.room(0)) == (4, 3, 0)
    session = session_of(max_new_tokens=3)
    assert session.room(9) == 3
    session.propose(point_mass(4))
    assert session.room(9) == 2


def test_drafts_go_ahead_within_the_window_and_only_where_promised() -> None:
    session = session_of()
    assert not session.may_draft_ahead  # nothing is drafted yet
    session.propose(point_mass(4))
    assert session.may_draft_ahead
    session.finish_draft(more=True)
    assert session.may_send
    assert session.room(9) == 4
    session.propose(point_mass(5))
    assert not session.may_draft_ahead  # the window of 2 is full
    second = session.finish_draft()
    assert (second.base, second.digest) == (1, extend_digest(EMPTY_DIGEST, [4]))
    assert not session.may_send
    assert session.room(9) == 0
    assert [draft.round for draft in session.unanswered()] == [0, 1]


def test_no_draft_is_promised_behind_the_end_of_the_text() -> None:
    session = session_of(max_new_tokens=1)
    session.propose(point_mass(4))
    assert not session.may_draft_ahead


# Verdicts


def test_a_rejection_is_corrected_by_the_device_and_told_with_the_next_draft() -> None:
    session = session_of()
    (step,) = session.on_verdict(verdict(drafted(session, 4, 5), 1, P))
    assert step == VerdictEffect((4, 6), valid=1, correction=6)
    draft = session.finish_draft()
    assert (draft.fix, draft.base, draft.epoch, draft.digest) == (6, 2, 1, extend_digest(EMPTY_DIGEST, [4, 6]))
    assert session.on_verdict(verdict(draft.round, 0, 7))
    assert session.finish_draft().fix is None


def test_a_rejection_voids_all_that_was_drafted_ahead() -> None:
    session = session_of()
    first = drafted(session, 4, 5, more=True)
    second = drafted(session, 7)
    session.on_verdict(verdict(first, 0, P))
    assert session.unanswered() == ()
    assert session.on_verdict(verdict(second, 1, 8)) == []
    assert session.committed == [6]
    assert session.position == 1


@pytest.mark.parametrize("stray", [verdict(0, 2, 6), verdict(9, 2, 6), Verdict(handle=8, round=1, accepted=0, next=6)])
def test_stray_verdicts_change_nothing(stray: Verdict) -> None:
    session = session_of()
    session.on_verdict(verdict(drafted(session, 4, 5), 2, 6))
    drafted(session, 7)
    assert session.on_verdict(stray) == []
    assert session.committed == [4, 5, 6]
    assert session._drafts._early == {}


def test_counters_of_a_session_add_up() -> None:
    session = session_of()
    first = drafted(session, 4, 5, 7, more=True)
    drafted(session, 8)
    session.on_verdict(verdict(first, 1, P))
    counters = session.counters
    assert (counters.drafted, counters.tested, counters.accepted, counters.rounds) == (4, 2, 1, 1)
    assert counters.acceptance == 0.5
    assert DeviceSession(terms()).counters.acceptance is None


def failing(start: int, number: int = 16) -> Samples:
    return Samples(start=start, ids=(4,) * number, probs=(0.5,) * number)


def test_the_state_is_named_at_every_turn() -> None:
    session = DeviceSession(terms())
    states = [session.state]

    def after(_done: object) -> None:
        states.append(session.state)

    after(session.open())
    after(session.on_undelivered())
    after(session.open())
    after(session.on_postponed())
    after(session.on_opened(opened(attempt=1)))
    first, second = drafted(session, 5, more=True), drafted(session, 4)
    after(None)
    after(session.on_verdict(verdict(first, 1)))
    after(session.on_verdict(verdict(second, 0, failing(0))))
    after(session.on_verdict(verdict(second + 1, 0, P)))
    after(session.cancel(EndReason.STOP))
    assert [state.name for state in states] == [
        "NEW", "OPENING", "UNDELIVERED", "OPENING", "POSTPONED", "DRAFTING", "AWAITING_VERDICT", "AWAITING_VERDICT",
        "CORRECTING", "DRAFTING", "ENDED",
    ]  # fmt: skip


# The end


@pytest.mark.parametrize("tokens", [(4, 0), (4,)])
def test_an_end_token_ends_the_text(tokens: tuple[int, ...]) -> None:
    session = session_of()
    following = None if tokens[-1] == 0 else 0
    session.on_verdict(verdict(drafted(session, *tokens), len(tokens), following, finish=Finish.STOP))
    assert session.ended is EndReason.STOP
    assert session.committed == [4, 0]
    assert not session.may_send
    assert session.on_verdict(verdict(0, 1)) == []


def test_the_devices_own_correction_may_end_the_text_and_goes_with_the_close() -> None:
    session = session_of()
    session.on_verdict(verdict(drafted(session, 4), 0, Sparse(ids=(0,), probs=(1.0,))))
    assert session.ended is EndReason.STOP
    close = session.close(wall_ms=5.0)
    assert (close.fix, close.tokens, close.digest, close.handle, close.edge) == (
        0, 1, extend_digest(EMPTY_DIGEST, [0]), HANDLE, "edge-1",
    )  # fmt: skip


def test_the_devices_own_correction_may_be_the_last_token() -> None:
    session = session_of(max_new_tokens=1)
    session.on_verdict(verdict(drafted(session, 4), 0, P))
    assert (session.ended, session.committed, session.close(wall_ms=0.0).fix) == (EndReason.LENGTH, [6], 6)


def test_the_first_reason_to_end_stands() -> None:
    session = session_of()
    session.cancel(EndReason.CANCELLED)
    session.cancel(EndReason.FAILED)
    assert session.close(wall_ms=0.0).reason is EndReason.CANCELLED


def test_a_session_that_goes_on_cannot_be_closed() -> None:
    with pytest.raises(ValueError, match="not ended"):
        session_of().close(wall_ms=0.0)


def test_an_edge_that_judged_nothing_cannot_end_what_another_judges() -> None:
    """A repeated Open may reach a second edge, which drops the session unused."""
    session = session_of()
    zeros = {"tokens": 0, "mean_batch": 0.0, "queue_ms": 0.0, "compute_ms": 0.0}
    idle = Closed(session=NAME, attempt=0, reason=EndReason.LOST, rounds=0, **zeros)
    assert session.concerns(idle)  # cannot be distinguished from the other
    session.on_verdict(verdict(drafted(session, 4, 5), 2, 6))
    assert not session.concerns(idle)
    assert session.concerns(idle.model_copy(update={"rounds": 1}))
    session.open()
    session.on_opened(opened(attempt=1, position=3))
    assert session.concerns(idle.model_copy(update={"attempt": 1}))


# What no correct edge answers


WRONG_RESIDUAL = {
    "more accepted than drafted": verdict(0, 3, 6),
    "a token for a rejection": verdict(0, 1, 6),
    "nothing for a rejection": verdict(0, 1),
    "p for an acceptance": verdict(0, 2, P),
    "p for an acceptance that ends the text": verdict(0, 2, P, finish=Finish.LENGTH),
    "nothing for an acceptance": verdict(0, 2),
    "a bonus token outside the vocabulary": verdict(0, 2, 10),
    "a correction outside the vocabulary": verdict(0, 0, Sparse(ids=(10,), probs=(1.0,))),
    "a dense p of a larger vocabulary": verdict(0, 0, Dense(probs=b"\x00" * 4 * 10 + b"\x00\x00\x80\x3f")),
}


@pytest.mark.parametrize("wrong", WRONG_RESIDUAL.values(), ids=WRONG_RESIDUAL.keys())
def test_a_verdict_that_answers_nothing_is_a_violation(wrong: Verdict) -> None:
    session = session_of()
    drafted(session, 4, 5)
    with pytest.raises(ProtocolViolation):
        session.on_verdict(wrong)


FOLLOWING = st.none() | st.integers(0, 12) | st.just(P) | st.builds(failing, st.sampled_from((0, 16)))
ANSWERS = st.tuples(st.integers(0, 3), st.integers(0, 5), FOLLOWING, st.sampled_from(Finish))


@given(st.sampled_from(Mode), st.lists(ANSWERS, max_size=8))
@settings(max_examples=300, deadline=None)
def test_whatever_an_edge_answers_nothing_but_a_violation_is_raised(mode: Mode, answers: list[Any]) -> None:
    session = session_of(mode=mode)
    try:
        for back, accepted, following, finish in answers:
            while session.room(2):
                session.propose(point_mass(4))
            if session.may_send:
                session.finish_draft(more=session.may_draft_ahead)
            last = session._round - 1
            session.on_verdict(verdict(max(0, last - back), accepted, following, finish=finish))
    except ProtocolViolation:
        return
    assert all(token < 10 for token in session.committed)
    assert session.sequence.digest == extend_digest(EMPTY_DIGEST, session.committed)

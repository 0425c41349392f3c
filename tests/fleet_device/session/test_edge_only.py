from collections.abc import Sequence

import pytest
from hypothesis import given, strategies as st

from fleet_device.errors import ProtocolViolation
from fleet_device.session.machine import DeviceSession
from fleet_device.session.sequence import session_request
from fleet_device.session.states import SessionState
from schemas.messages import Draft, Opened, Verdict
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import EndReason, Finish
from schemas.vocabulary import EMPTY_DIGEST, Vocabulary, extend_digest

END = 0
MOST = 40


def opened_session(mode: Mode = Mode.COUPLED, *, most: int = MOST) -> DeviceSession:
    session = DeviceSession(
        session_request(
            session=bytes(8),
            prompt=(1,),
            policy=SamplingPolicy(mode=mode, temperature=1.0, top_k=0, top_p=1.0, seed=1),
            max_new_tokens=most,
            vocabulary=Vocabulary.of([str(number) for number in range(50)]),
            draft_model="",
            quantization="",
        )
    )
    asked = session.open()
    session.on_opened(
        Opened(
            session=asked.session,
            attempt=asked.attempt,
            handle=3,
            edge="edge-1",
            target="",
            target_id=bytes(8),
            position=0,
            max_new_tokens=most,
            max_draft=8,
            window=4,
            lease_s=60.0,
            end_tokens=(END,),
        )
    )
    return session


def piece(request: Draft, base: int, written: Sequence[int], finish: Finish = Finish.NO) -> Verdict:
    return Verdict(handle=3, round=request.round, accepted=0, base=base, written=tuple(written), finish=finish)


@given(
    text=st.lists(st.integers(1, 49), min_size=1, max_size=MOST),
    places=st.lists(st.tuples(st.integers(0, MOST), st.integers(0, MOST)), max_size=12),
)
def test_pieces_that_overlap_repeat_or_come_late_make_the_text(text: list[int], places: list[tuple[int, int]]) -> None:
    session = opened_session()
    request = session.request_edge_only(MOST)
    news: list[int] = []
    kept: list[tuple[int, int]] = []
    for begin, end in [*places, (0, len(text))]:
        known = len(session.committed)
        if begin >= end or begin > len(text) or session.ended is not None:
            continue
        for effect in session.on_verdict(piece(request, begin, text[begin:end])):
            news.extend(effect.tokens)
            if effect.request is not None:  # what is missing is asked for, by its place
                request = effect.request
                assert (request.base, request.digest) == (known, extend_digest(EMPTY_DIGEST, text[:known]))
        kept.append((begin, min(end, len(text))))
        reached = 0
        while further := max((end for begin, end in kept if begin <= reached < end), default=0):
            reached = further
        assert session.committed == text[:reached] == news
    assert session.committed == text


@pytest.mark.parametrize("mode", Mode)
def test_what_was_asked_for_having_come_the_device_may_draft(mode: Mode) -> None:
    session = opened_session(mode)
    request = session.request_edge_only(3)
    assert (request.write, request.counts) == (3, () if mode is Mode.RESIDUAL else None)
    assert session.state is SessionState.EDGE_ONLY
    session.on_verdict(piece(request, 0, (4, 5)))
    assert (session.state, session.edge_only_left) == (SessionState.EDGE_ONLY, 1)
    session.on_verdict(piece(request, 2, (6,)))
    assert (session.state, session.unanswered()) == (SessionState.DRAFTING, ())
    assert session.committed == [4, 5, 6]


def test_a_request_to_stop_is_over_only_with_its_own_answer() -> None:
    session = opened_session()
    request = session.request_edge_only(10)
    session.on_verdict(piece(request, 0, (4,)))
    stop = session.request_edge_only(0)
    assert (stop.base, stop.write) == (1, 0)
    session.on_verdict(piece(request, 1, (5,)))  # was on its way
    assert session.state is SessionState.EDGE_ONLY
    assert not session.may_renew_edge_only
    session.on_verdict(piece(stop, 1, (5, 6)))
    assert (session.state, session.committed) == (SessionState.DRAFTING, [4, 5, 6])


def test_the_text_ends_as_the_edge_says() -> None:
    session = opened_session()
    session.on_verdict(piece(session.request_edge_only(10), 0, (4, END), Finish.STOP))
    assert (session.ended, session.committed) == (EndReason.STOP, [4, END])
    session = opened_session(most=2)
    request = session.request_edge_only(10)
    assert request.write == 2
    session.on_verdict(piece(request, 0, (4, 5), Finish.LENGTH))
    assert session.ended is EndReason.LENGTH


@pytest.mark.parametrize(
    "written",
    [(9, 5), (4, END, 5), (4, *range(1, MOST + 1)), (4, 50)],
    ids=["other tokens", "after the end", "too many", "outside the vocabulary"],
)
def test_what_no_correct_edge_writes_ends_the_session(written: Sequence[int]) -> None:
    session = opened_session()
    request = session.request_edge_only(10)
    session.on_verdict(piece(request, 0, (4,)))
    with pytest.raises(ProtocolViolation):
        session.on_verdict(piece(request, 0, written))


def test_a_verdict_on_a_draft_answers_no_request_for_tokens() -> None:
    session = opened_session()
    request = session.request_edge_only(10)
    with pytest.raises(ProtocolViolation):
        session.on_verdict(Verdict(handle=3, round=request.round, accepted=0, next=7))


def test_nothing_is_asked_while_drafts_are_under_way() -> None:
    session = opened_session()
    session.finish_draft()
    with pytest.raises(ValueError, match="drafts in flight"):
        session.request_edge_only(5)

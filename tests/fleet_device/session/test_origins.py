"""Where each token of a text comes from, as a verdict has it."""

from typing import Any

import pytest

from dssd.distribution import point_mass
from fleet_device.session.machine import DeviceSession
from fleet_device.session.sequence import CommittedTokens, SessionRequest, TokenOrigin
from schemas.downlink import Samples, Sparse
from schemas.messages import Opened, Verdict
from schemas.policy import Mode, SamplingPolicy
from schemas.vocabulary import Vocabulary

DRAFTED, CORRECTED, BONUS = TokenOrigin.DRAFTED, TokenOrigin.CORRECTED, TokenOrigin.BONUS
HANDLE = 7


def session_of(mode: Mode = Mode.RESIDUAL) -> DeviceSession:
    vocabulary = Vocabulary.of([f"t{token}" for token in range(10)])
    session = DeviceSession(
        SessionRequest(b"session1", (1, 2), SamplingPolicy(mode=mode, seed=1), 20, vocabulary, "toy", "none")
    )
    session.open()
    session.on_opened(
        Opened(
            session=b"session1",
            attempt=0,
            handle=HANDLE,
            edge="edge-1",
            target="toy",
            position=0,
            max_new_tokens=20,
            max_draft=4,
            window=2,
            lease_s=60.0,
            end_tokens=(0,),
        )
    )
    return session


def decided(session: DeviceSession, tokens: tuple[int, ...], accepted: int, following: Any) -> CommittedTokens:
    """Draft the tokens for certain, and return what a verdict on them commits."""
    for token in tokens:
        session.propose(point_mass(token))
    verdict = Verdict(handle=HANDLE, round=session.send().round, accepted=accepted, next=following)
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
    assert decided(session_of(mode), (4, 5), accepted, following).origins == origins


def test_behind_an_empty_draft_stands_what_the_edge_draws() -> None:
    assert decided(session_of(), (), 0, 6).origins == (BONUS,)


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
    request = session.stream(8)
    (effect,) = session.on_verdict(Verdict(handle=HANDLE, round=request.round, accepted=0, base=0, written=(3, 4)))
    assert effect.committed == CommittedTokens((3, 4), (TokenOrigin.STREAMED,) * 2)


def test_committed_tokens_are_a_sequence_of_ids() -> None:
    tokens = CommittedTokens((3, 4), (DRAFTED, BONUS))
    assert (list(tokens), tokens[0], tokens[1:], len(tokens)) == ([3, 4], 3, (4,), 2)
    with pytest.raises(ValueError, match="2 tokens have 1 origins"):
        CommittedTokens((3, 4), (DRAFTED,))

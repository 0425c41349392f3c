"""Verification of one draft, one row at a time: the reference that the edge's batched version is held to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dssd.counter_rng import Purpose, random_uniform
from dssd.coupling import coupled_token
from dssd.distribution import Dist
from dssd.residual import accepts, draw
from schemas.policy import Mode, SamplingPolicy

__all__ = ["Judgement", "judge"]


@dataclass(frozen=True, slots=True, eq=False)
class Judgement:
    """What becomes of a draft.

    Attributes:
        accepted: Length of the accepted head.
        rejected: Whether the token after the head was rejected, so that all behind it is void.
        token: The token that the edge itself drew after the head: the bonus token, or in coupled mode the correction.
        p: The target's distribution at a rejection in residual mode, from which the device draws.
    """

    accepted: int
    rejected: bool
    token: int | None = None
    p: Dist | None = None

    @property
    def tested(self) -> int:
        """Draft tokens that were decided on, rather than void behind a rejection."""
        return self.accepted + self.rejected


def judge(
    row: Callable[[int], Dist],
    tokens: Sequence[int],
    counts: Sequence[int] | None,
    *,
    policy: SamplingPolicy,
    base: int,
    bonus: bool,
) -> Judgement:
    """Decide on a draft.

    Args:
        row: Returns the target's shaped distribution at `base + i`, for i up to `len(tokens)`; asked for no more rows
            than the decision needs.
        tokens: The draft.
        counts: For each token, 65,536 times the probability with which it was drawn; None in coupled mode.
        policy: The session's.
        base: Position of the first draft token.
        bonus: Whether a token is due after an accepted draft: not if another draft follows unasked.
    """
    for offset, token in enumerate(tokens):
        p, position = row(offset), base + offset
        if policy.mode is Mode.COUPLED:
            own = coupled_token(p, policy.seed, position)
            if own != token:
                return Judgement(offset, rejected=True, token=own)
        elif counts is None or not accepts(
            p.probability(token), counts[offset], random_uniform(policy.seed, position, Purpose.ACCEPT)
        ):
            return Judgement(offset, rejected=True, p=p)
    if not bonus:
        return Judgement(len(tokens), rejected=False)
    position = base + len(tokens)
    p = row(len(tokens))
    if policy.mode is Mode.COUPLED:
        return Judgement(len(tokens), rejected=False, token=coupled_token(p, policy.seed, position))
    return Judgement(len(tokens), rejected=False, token=draw(p, random_uniform(policy.seed, position, Purpose.BONUS)))

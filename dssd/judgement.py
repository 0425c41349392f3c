"""Verification of one draft, one row at a time: the reference that the edge's batched version is held to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dssd.counter_rng import Purpose, random_uniform
from dssd.coupling import coupled_token
from dssd.distribution import Dist
from dssd.residual import accepts, draw
from schemas.logprobs import TokenLogprobs
from schemas.policy import Mode, SamplingPolicy

__all__ = ["Judgement", "judge", "write"]


@dataclass(frozen=True, slots=True, eq=False)
class Judgement:
    """What becomes of a draft.

    Attributes:
        accepted: Length of the accepted head.
        rejected: Whether the token after the head was rejected, so that all behind it is void.
        token: The token that the edge itself drew after the head: the bonus token, or in coupled mode the correction.
        p: The target's distribution at a rejection in residual mode, from which the device draws.
        logprobs: Of the head, the token and the rejection, if they are asked for.
        forced: Of the head and the token, the places of those that a grammar left no choice about.
    """

    accepted: int
    rejected: bool
    token: int | None = None
    p: Dist | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    forced: tuple[int, ...] = ()

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
    return Judgement(len(tokens), rejected=False, token=_own(row(len(tokens)), policy, base + len(tokens)))


def write(row: Callable[[int], Dist], guesses: Sequence[int], *, policy: SamplingPolicy, base: int) -> Judgement:
    """Draw the next tokens of a text that the edge writes by itself: as many as guesses of them were right, and one.

    Each is the bonus token behind an empty draft at its position, whatever was guessed. A guess that is right is that
    token; then the row behind it is one of the text's own, and the next token is drawn from it.

    Args:
        row: Returns the target's shaped distribution at `base + i`, the first i guesses standing before it.
        guesses: Of the tokens from `base` on.
        policy: The session's.
        base: Position of the first token.

    Returns:
        How many guesses were right, as accepted, and the token behind them.
    """
    for offset, guess in enumerate(guesses):
        if (own := _own(row(offset), policy, base + offset)) != guess:
            return Judgement(offset, rejected=False, token=own)
    return Judgement(len(guesses), rejected=False, token=_own(row(len(guesses)), policy, base + len(guesses)))


def _own(p: Dist, policy: SamplingPolicy, position: int) -> int:
    """Draw the edge's own token at a position."""
    if policy.mode is Mode.COUPLED:
        return coupled_token(p, policy.seed, position)
    return draw(p, random_uniform(policy.seed, position, Purpose.BONUS))

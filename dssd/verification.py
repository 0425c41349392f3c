"""Verification of one draft, row by row: the reference for the edge's batched version."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dssd.counter_rng import Purpose, random_uniform
from dssd.distribution import Dist
from dssd.sampling import accepts, coupled_token, draw
from schemas.logprobs import TokenLogprobs
from schemas.policy import Mode, SamplingPolicy


@dataclass(frozen=True, slots=True, eq=False)
class Judgement:
    """Result of verifying a draft.

    Attributes:
        accepted: Number of accepted tokens.
        rejected: Whether the next token was rejected, which discards the rest of the draft.
        token: Token that the edge drew after the accepted ones: the bonus token, or in coupled mode the correction.
        p: The target's distribution at a rejection in residual mode, from which the device draws.
        logprobs: Log-probabilities of the accepted tokens, `token` and the rejection, if requested.
        forced: Indices, among the accepted tokens and `token`, of those that a grammar forced.
    """

    accepted: int
    rejected: bool
    token: int | None = None
    p: Dist | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    forced: tuple[int, ...] = ()

    @property
    def tested(self) -> int:
        """Number of draft tokens that were accepted or rejected, not discarded."""
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
    """Verify a draft.

    Args:
        row: Returns the target's shaped distribution at `base + i`, for i up to `len(tokens)`; called only for the
            rows that the decision needs.
        tokens: Draft tokens.
        counts: For each token, 65,536 times the probability with which it was drawn; None in coupled mode.
        policy: Sampling policy of the session.
        base: Position of the first draft token.
        bonus: Draw a token after a draft that is accepted whole; not if the device has already sent the next draft.
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


def decode(row: Callable[[int], Dist], speculated: Sequence[int], *, policy: SamplingPolicy, base: int) -> Judgement:
    """Draw the next tokens in edge-only decoding, with n-gram speculation.

    Each token is the bonus token after an empty draft at its position, independent of the speculated tokens. As long as
    the speculated token equals it, the next row belongs to the sequence, and the next token is drawn from that row.

    Args:
        row: Returns the target's shaped distribution at `base + i`, given the first i speculated tokens.
        speculated: Speculated tokens from `base` on.
        policy: Sampling policy of the session.
        base: Position of the first token.

    Returns:
        The number of correct speculated tokens, as `accepted`, and the token after them.
    """
    for offset, guess in enumerate(speculated):
        if (own := _own(row(offset), policy, base + offset)) != guess:
            return Judgement(offset, rejected=False, token=own)
    return Judgement(len(speculated), rejected=False, token=_own(row(len(speculated)), policy, base + len(speculated)))


def _own(p: Dist, policy: SamplingPolicy, position: int) -> int:
    """Draw a token from p."""
    if policy.mode is Mode.COUPLED:
        return coupled_token(p, policy.seed, position)
    return draw(p, random_uniform(policy.seed, position, Purpose.BONUS))

"""Verification of one draft, row by row (the reference for the edge's batched version), and log-probabilities."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sampling.distribution import Dist, largest
from sampling.drawing import Purpose, accepts, coupled_token, draw, random_uniform
from schemas.fields import MIN_LOGPROB, TokenLogprobs
from schemas.policy import Mode, SamplingPolicy

_COUPLED_SUPPORT: Final = 1024
"""Largest support of which every token gets a random number in residual mode."""


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


def judge(
    row: Callable[[int], Dist],
    tokens: Sequence[int],
    counts: Sequence[int] | None,
    *,
    policy: SamplingPolicy,
    base: int,
    bonus: bool,
) -> Judgement:
    """Verify a draft of tokens drawn with counts / 65,536 (None in coupled mode); `base` is its first position.

    `row(i)` returns the target's shaped distribution at `base + i`, for i up to `len(tokens)`; it is called only for
    the rows that the decision needs. `bonus` asks for a token after a draft that is accepted whole; it is False if the
    device has already sent the next draft.
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
    `row(i)` returns the target's shaped distribution at `base + i`, given the first i speculated tokens. `accepted`
    counts the correct ones, and `token` follows them.
    """
    for offset, token in enumerate(speculated):
        if (own := _own(row(offset), policy, base + offset)) != token:
            return Judgement(offset, rejected=False, token=own)
    return Judgement(len(speculated), rejected=False, token=_own(row(len(speculated)), policy, base + len(speculated)))


def _own(p: Dist, policy: SamplingPolicy, position: int) -> int:
    # A draft model at the edge draws in the same way, and coupled draws agree most often. They need a number for each
    # token, so a large support is drawn from with one.
    if policy.mode is Mode.COUPLED or len(p) <= _COUPLED_SUPPORT:
        return coupled_token(p, policy.seed, position)
    return draw(p, random_uniform(policy.seed, position, Purpose.BONUS))


def logprobs_of_token(logits: NDArray[Any], token: int, *, most: int) -> TokenLogprobs:
    """Return the log-probabilities of a token and of the `most` likely ones, from unshaped logits `[vocabulary]`.

    Raises ValueError if they are not numbers.
    """
    ids, values, shift = _likeliest(logits, most)
    return TokenLogprobs(_bounded(float(logits[token]) - shift), ids, values)


def logprobs_of_rejection(logits: NDArray[Any], p: Dist, *, policy: SamplingPolicy, most: int) -> TokenLogprobs:
    """Return the offset from which a device computes the log-probability of its correction."""
    ids, values, shift = _likeliest(logits, most)
    place = int(np.argmax(p.probs))  # float32 is most accurate where p is largest
    own = float(logits[p.ids[place]]) - shift
    offset = own - policy.temperature * math.log(float(np.float32(p.probs[place])))
    return TokenLogprobs(offset, ids, values)


def logprobs_of_correction(rejection: TokenLogprobs, probability: float, *, policy: SamplingPolicy) -> TokenLogprobs:
    """Return the log-probabilities of a correction with this probability in p, given those of the rejection."""
    own = rejection.logprob + policy.temperature * math.log(probability)
    return replace(rejection, logprob=min(0.0, max(MIN_LOGPROB, own)))


def _likeliest(logits: NDArray[Any], most: int) -> tuple[tuple[int, ...], tuple[float, ...], float]:
    """Return the likeliest tokens, their log-probabilities, and what to subtract from a logit for that of its token."""
    best = float(logits.max())
    shift = best + math.log(float(np.exp(logits - logits.dtype.type(best)).sum()))
    if not math.isfinite(shift):
        raise ValueError("The model's logits are not numbers.")
    if not most:
        return (), (), shift
    ids = largest(logits, min(most, len(logits)))
    return tuple(ids.tolist()), tuple(_bounded(float(value) - shift) for value in logits[ids]), shift


def _bounded(value: float) -> float:
    return min(0.0, max(MIN_LOGPROB, value))

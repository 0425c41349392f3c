"""Shaping and quantization in plain Python, written from docs/formulas.md: what the proofs of exactness expect.

None of the product's mathematics is imported, so that a mistake at both ends does not change the expectation.
"""

import math
import struct
from collections.abc import Collection, Sequence
from fractions import Fraction
from typing import Any

from numpy.typing import NDArray

from schemas.policy import SamplingPolicy

TOTAL = 65_536


def shaped(
    logits: Sequence[float] | NDArray[Any], policy: SamplingPolicy, *, allowed: Collection[int] | None = None
) -> dict[int, float]:
    """Return the probabilities that a policy samples from, by token, in the order that is drawn from.

    `allowed` are the tokens that a grammar allows; None allows all.
    """
    candidates = range(len(logits)) if allowed is None else allowed
    scores = adjusted({token: float(logits[token]) for token in candidates if logits[token] > -math.inf}, policy)
    falling = sorted(scores, key=lambda token: (-scores[token], token))
    if policy.temperature == 0.0:
        return {falling[0]: 1.0}
    largest = scores[falling[0]]
    cut = 0 < policy.top_k < len(candidates) or policy.top_p < 1.0
    kept = falling[: policy.top_k or None] if cut else sorted(scores)
    kept = [token for token in kept if math.exp((scores[token] - largest) / policy.temperature) >= policy.min_p]
    probs = _divided({token: math.exp((scores[token] - largest) / policy.temperature) for token in kept})
    if policy.top_p < 1.0:
        head, mass = dict[int, float](), 0.0
        for token, prob in probs.items():
            head[token] = prob
            mass += prob
            if mass >= policy.top_p:
                break
        probs = _divided(head)
    rounded = {token: _float32(prob) for token, prob in probs.items()}
    return {token: prob for token, prob in rounded.items() if prob > 0.0}


def adjusted(scores: dict[int, float], policy: SamplingPolicy) -> dict[int, float]:
    """Return logits by token with the policy's least length, biases and penalties."""
    history, biases = policy.history, dict(policy.logit_bias)
    found = {}
    for token, logit in scores.items():
        score = logit + biases.get(token, 0.0)
        if history is not None:
            times = list(history.generated).count(token)
            if times or token in history.prompt:
                score = score / policy.repetition_penalty if score > 0 else score * policy.repetition_penalty
            score -= policy.frequency_penalty * times + policy.presence_penalty * (times > 0)
        found[token] = score
    if history is not None and len(history.generated) < policy.min_tokens:
        begun = {token: score for token, score in found.items() if token not in history.end_tokens}
        return begun or found
    return found


def quantized(probs: dict[int, float]) -> dict[int, int]:
    """Return counts out of 65,536 by largest remainder, in the same order; those of 0 are left out."""
    total = sum(map(Fraction, probs.values()))
    exact = {token: Fraction(prob) * TOTAL / total for token, prob in probs.items()}
    counts = {token: math.floor(share) for token, share in exact.items()}
    short = TOTAL - sum(counts.values())
    # `sorted` keeps the order of equal remainders.
    for token in sorted(exact, key=lambda token: counts[token] - exact[token])[:short]:
        counts[token] += 1
    return {token: count for token, count in counts.items() if count > 0}


def _divided(weights: dict[int, float]) -> dict[int, float]:
    total = math.fsum(weights.values())
    return {token: weight / total for token, weight in weights.items()}


def _float32(value: float) -> float:
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    return float(rounded)

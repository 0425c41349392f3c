"""Shaping of logits, and the 16-bit quantized draft distribution.

Draft and target are shaped with the same policy. Verifying with another shaping than the draft's is the most common way
in which speculative sampling silently stops being exact.

Speculative sampling allows any draft distribution q, but the reported q must be the q that was drawn from. The device
rounds the shaped distribution to counts out of 65,536 *before* drawing, so the two bytes on the wire are exact.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from schemas.policy import SamplingPolicy

Ids = NDArray[np.int64]
Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Dist:
    """Distribution over token ids.

    Attributes:
        ids: int64 `[support]`, distinct, by descending probability, ties by ascending id.
        probs: float64 `[support]`, positive. Values are representable in float32, so that the edge accepts with
            exactly the numbers that it can send; they sum to 1 up to float32 rounding.
    """

    ids: Ids
    probs: Float

    def __len__(self) -> int:
        return len(self.ids)

    def probability(self, token: int) -> float:
        where = np.flatnonzero(self.ids == token)
        return float(self.probs[where[0]]) if len(where) else 0.0


def point_mass(token: int) -> Dist:
    return Dist(np.array([token], dtype=np.int64), np.ones(1))


def shape(logits: NDArray[Any], policy: SamplingPolicy, *, allowed: Ids | None = None) -> Dist:
    """Turn logits into the distribution that the policy samples from.

    Args:
        logits: `[vocabulary]`, any float type. Minus infinity is allowed and means impossible.
        policy: Sampling policy of the session.
        allowed: int64 ids that a grammar allows, ascending; all others have probability 0. None allows all.

    Raises:
        ValueError: The logits hold NaN or plus infinity, or are all minus infinity.
    """
    if allowed is not None:
        dist = shape(np.asarray(logits)[allowed], policy)
        return Dist(allowed[dist.ids], dist.probs)
    scores = np.asarray(logits, dtype=np.float64)
    best = int(np.argmax(scores))  # the first of equals; NaN wins, so it is detected here
    if not np.isfinite(scores[best]):
        raise ValueError("The model's logits are not numbers.")
    if policy.greedy:
        return point_mass(best)
    ids = _largest(scores, policy.top_k)
    with np.errstate(over="ignore"):  # at a temperature of nearly 0 the quotient may be minus infinity: weight 0
        weights = np.exp((scores[ids] - scores[best]) / policy.temperature)
    weights /= weights.sum()
    if policy.top_p < 1.0:
        keep = int(np.searchsorted(np.cumsum(weights), policy.top_p)) + 1
        ids, weights = ids[:keep], weights[:keep]
        weights = weights / weights.sum()
    rounded = weights.astype(np.float32).astype(np.float64)
    positive = rounded > 0.0
    return Dist(ids[positive], rounded[positive])


def _largest(scores: Float, top_k: int) -> Ids:
    if 0 < top_k < len(scores):
        # Partition finds the k-th largest value; ties with it are resolved by the stable sort below.
        threshold = np.partition(scores, -top_k)[-top_k]
        candidates = np.flatnonzero(scores >= threshold)
        order = np.argsort(-scores[candidates], kind="stable")[:top_k]
        return candidates[order]
    return np.argsort(-scores, kind="stable")


TOTAL: Final = 1 << 16
"""Sum of the counts."""


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedDist:
    """Draft distribution in units of 1/65,536.

    Attributes:
        ids: int64 `[support]`, distinct.
        counts: int64 `[support]`, each at least 1; they sum to `TOTAL`.
    """

    ids: Ids
    counts: Ids

    def count(self, token: int) -> int:
        where = np.flatnonzero(self.ids == token)
        return int(self.counts[where[0]]) if len(where) else 0

    def probabilities(self, tokens: Ids) -> Float:
        """Return q of each token, float64 `[n]`, 0 outside the support."""
        order = np.argsort(self.ids)
        where = np.searchsorted(self.ids, tokens, sorter=order)
        found = order[np.minimum(where, len(order) - 1)]
        return np.where(self.ids[found] == tokens, self.counts[found], 0) / TOTAL


def quantize(dist: Dist) -> QuantizedDist:
    """Round a distribution to counts by largest remainder; tokens that round to 0 leave the support."""
    exact = dist.probs * (TOTAL / dist.probs.sum())
    counts = np.floor(exact).astype(np.int64)
    short = TOTAL - int(counts.sum())
    if short > 0:
        # The largest remainders get one more each; ties go to the more probable token, which comes first.
        counts[np.argsort(counts - exact, kind="stable")[:short]] += 1
    elif short < 0:
        # Only float rounding of an exact integer gets here; take it from the most probable token.
        counts[0] += short
    kept = counts > 0
    return QuantizedDist(dist.ids[kept], counts[kept])


def draw_draft(quantized: QuantizedDist, uniform: float) -> tuple[int, int]:
    """Draw a token with one uniform number; return it and its count, its probability times 65,536."""
    where = int(np.searchsorted(np.cumsum(quantized.counts), int(uniform * TOTAL), side="right"))
    return int(quantized.ids[where]), int(quantized.counts[where])

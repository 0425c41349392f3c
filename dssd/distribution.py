"""Shaping: from logits to the distribution that is really sampled from.

Draft and target are shaped with the same policy, so that p and q are comparable. Verifying with another shaping
than the one drafted with is the commonest way in which speculative sampling silently stops being exact.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.policy import SamplingPolicy

__all__ = ["Dist", "Float", "Ids", "point_mass", "shape"]

Ids = NDArray[np.int64]
Float = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Dist:
    """A distribution over token ids.

    Attributes:
        ids: int64 `[support]`, distinct, by falling probability, ties by rising id.
        probs: float64 `[support]`, positive. Values are float32-representable, so that the edge accepts with
            exactly the numbers that it can send down; their sum is 1 up to float32 rounding.
    """

    ids: Ids
    probs: Float

    def __len__(self) -> int:
        return len(self.ids)

    def probability(self, token: int) -> float:
        """Return p(token), 0 outside the support."""
        where = np.flatnonzero(self.ids == token)
        return float(self.probs[where[0]]) if len(where) else 0.0


def point_mass(token: int) -> Dist:
    """Return the distribution of a certain token."""
    return Dist(np.array([token], dtype=np.int64), np.ones(1))


def shape(logits: NDArray[Any], policy: SamplingPolicy, *, allowed: Ids | None = None) -> Dist:
    """Turn logits into the distribution that the policy samples from.

    In this order: take out what is not allowed, divide by the temperature, keep the `top_k` largest, softmax, keep the
    smallest head whose mass reaches `top_p`, renormalise. Temperature 0 keeps the largest alone, ties by lower id.

    Args:
        logits: `[vocabulary]`, any float type. Minus infinity is allowed and means impossible.
        policy: What to do.
        allowed: int64 ids that a grammar allows, rising; all others are impossible. None allows all.

    Raises:
        ValueError: The logits hold NaN or plus infinity, or are all minus infinity.
    """
    if allowed is not None:
        dist = shape(np.asarray(logits)[allowed], policy)
        return Dist(allowed[dist.ids], dist.probs)
    scores = np.asarray(logits, dtype=np.float64)
    best = int(np.argmax(scores))  # the first of equals; NaN wins, so it is caught here
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
    """Return the ids of the `top_k` largest scores, falling, ties by lower id; all of them for 0."""
    if 0 < top_k < len(scores):
        # Partition finds the k-th largest value; ties with it are resolved by the stable sort below.
        threshold = np.partition(scores, -top_k)[-top_k]
        candidates = np.flatnonzero(scores >= threshold)
        order = np.argsort(-scores[candidates], kind="stable")[:top_k]
        return candidates[order]
    return np.argsort(-scores, kind="stable")

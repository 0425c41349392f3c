"""Shaping of many rows at once, for policies of a bounded support (greedy, or top_k), where the logits are an array.

It repeats `dssd.distribution.shape`, which shapes one row; a property test holds the two together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dssd.distribution import Dist
from fleet_edge.batching.topk import top_k
from schemas.policy import SamplingPolicy


@dataclass(frozen=True, slots=True)
class ShapedRows:
    """Shaped rows.

    Attributes:
        ids: int64 `[rows, support]`, by falling probability, ties by rising id.
        probs: float64 `[rows, support]`, float32-representable; 0 where cut, and where the logits are no numbers
            either 0 or not a number.
    """

    ids: NDArray[np.int64]
    probs: NDArray[np.float64]

    def row(self, number: int) -> Dist:
        """Return the distribution of a row.

        Raises:
            ValueError: Its logits are not numbers.
        """
        probs = self.probs[number]
        kept = int(np.count_nonzero(probs > 0.0))  # falling, so the positive ones come first; NaN counts as none
        if kept == 0:
            raise ValueError("The model's logits are not numbers.")
        return Dist(self.ids[number, :kept], probs[:kept])


def shape_rows(logits: NDArray[np.float32], policies: Sequence[SamplingPolicy], support: int) -> ShapedRows:
    """Shape rows.

    Args:
        logits: float32 `[rows, vocabulary]`.
        policies: One for each row.
        support: Their `top_k`, less than the vocabulary; 1 where they are greedy.
    """
    values, ids = top_k(logits, support)
    if support == 1:
        # Greedy, or top_k 1: a point mass, unless the best logit is no number.
        return ShapedRows(ids, np.isfinite(values).astype(np.float64))
    temperature = np.array([[policy.temperature] for policy in policies])
    top_p = np.array([[policy.top_p] for policy in policies])
    scores = values.astype(np.float64)
    # At a temperature of nearly 0 a quotient may be minus infinity: weight 0. What is no number stays none.
    with np.errstate(over="ignore", invalid="ignore"):
        weights = np.exp((scores - scores[:, :1]) / temperature)
        weights /= weights.sum(axis=1, keepdims=True)
        mass = np.cumsum(weights, axis=1)
        weights[:, 1:][(mass[:, :-1] >= top_p) & (top_p < 1.0)] = 0.0
        weights /= weights.sum(axis=1, keepdims=True)
    return ShapedRows(ids, weights.astype(np.float32).astype(np.float64))

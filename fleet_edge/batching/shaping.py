"""Batched shaping in numpy, for policies with a bounded support (greedy, or top_k), and exact top-k selection.

Repeats `sampling.distribution.shape`, which shapes one row; a property test compares the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sampling.distribution import Dist, largest
from schemas.policy import SamplingPolicy


def top_k(
    logits: NDArray[np.float32], k: int, rows: Sequence[int] | NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the k largest elements of each row, or of some rows: the head of a stable descending sort.

    Takes float32 `[rows, size]`; minus infinity is allowed, NaN sorts first. Returns values `[rows, min(k, size)]`,
    descending, and int64 ids; ties by rising id. Raises ValueError for other types and for `k` below 1.
    """
    if k < 1 or logits.ndim != 2 or logits.dtype != np.float32:  # noqa: PLR2004 - rows and columns
        raise ValueError("top_k wants float32 logits [rows, size] and a k of at least 1.")
    chosen = range(len(logits)) if rows is None else rows
    values = np.empty((len(chosen), min(k, logits.shape[1])), dtype=np.float32)
    ids = np.empty(values.shape, dtype=np.int64)
    for place, number in enumerate(chosen):
        ids[place] = largest(logits[number], k)  # a row is not copied
        values[place] = logits[number, ids[place]]
    return values, ids


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Cases with the same bounded support: its size, their indices, int64 row numbers, and a policy for each row."""

    support: int
    places: list[int]
    rows: NDArray[np.int64]
    policies: list[SamplingPolicy]


@dataclass(frozen=True, slots=True)
class ShapedRows:
    """Shaped rows: int64 ids by falling probability, ties by rising id, and float64 probabilities.

    Both are `[rows, support]`; probabilities are float32-representable, 0 where cut, 0 or NaN for invalid logits.
    """

    ids: NDArray[np.int64]
    probs: NDArray[np.float64]

    def row(self, number: int) -> Dist:
        """Return the distribution of a row; raises ValueError if its logits are not numbers."""
        probs = self.probs[number]
        kept = int(np.count_nonzero(probs > 0.0))  # descending, so the positive ones come first; NaN counts as none
        if kept == 0:
            raise ValueError("The model's logits are not numbers.")
        return Dist(self.ids[number, :kept], probs[:kept])


def shape_rows(
    logits: NDArray[np.float32],
    policies: Sequence[SamplingPolicy],
    support: int,
    rows: NDArray[np.int64] | None = None,
) -> ShapedRows:
    """Shape float32 rows, or some of them; `support` is the `top_k` of the policies, 1 where they are greedy."""
    values, ids = top_k(logits, support, rows)
    if support == 1:
        # Greedy, or top_k 1: a point mass, unless the best logit is no number.
        return ShapedRows(ids, np.isfinite(values).astype(np.float64))
    temperature = np.array([[policy.temperature] for policy in policies])
    min_p = np.array([[policy.min_p] for policy in policies])
    top_p = np.array([[policy.top_p] for policy in policies])
    scores = values.astype(np.float64)
    # At a temperature near 0 a quotient may be minus infinity: weight 0. NaN stays NaN.
    with np.errstate(over="ignore", invalid="ignore"):
        weights = np.exp((scores - scores[:, :1]) / temperature)
        weights[weights < min_p] = 0.0
        weights /= weights.sum(axis=1, keepdims=True)
        mass = np.cumsum(weights, axis=1)
        weights[:, 1:][(mass[:, :-1] >= top_p) & (top_p < 1.0)] = 0.0
        weights /= weights.sum(axis=1, keepdims=True)
    return ShapedRows(ids, weights.astype(np.float32).astype(np.float64))

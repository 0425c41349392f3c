"""Batched shaping in numpy, for policies with a bounded support (greedy, or top_k), and exact top-k selection.

Repeats `dssd.distribution.shape`, which shapes one row; a property test compares the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dssd.distribution import Dist
from schemas.policy import SamplingPolicy

DEPTH: Final = 64
"""Most elements of a column in `top_k`: fewer make the bound tighter, more make it cheaper to find."""

COLUMNS: Final = 4
"""Columns for each element that is looked for, at least, where the row is long enough. About a seventh more elements
than `k` then reach the bound."""


def top_k(logits: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the k largest elements of every row: the head of a stable descending sort.

    Elements are dealt into columns, and one pass finds the largest of each. The k-th largest of those is a lower bound
    of the row's k-th largest element, so only the few elements that reach it are sorted. Rows with very many equal
    elements cost as much as a full sort.

    Takes float32 `[rows, size]`; minus infinity is allowed, NaN sorts first. Returns values `[rows, min(k, size)]`,
    descending, and int64 ids; ties by rising id. Raises ValueError for other types and for `k` below 1.
    """
    if k < 1 or logits.ndim != 2 or logits.dtype != np.float32:  # noqa: PLR2004 - rows and columns
        raise ValueError("top_k wants float32 logits [rows, size] and a k of at least 1.")
    if k == 1 and logits.size:
        best = logits.argmax(axis=1)[:, np.newaxis]  # the first of equals; NaN wins
        return np.take_along_axis(logits, best, axis=1), best
    ids = np.empty((len(logits), min(k, logits.shape[1])), dtype=np.int64)
    for place, (row, bound) in enumerate(zip(logits, _bounds(logits, k), strict=True)):
        # "Not less" instead of "greater or equal": NaN becomes a candidate, and a NaN bound admits all.
        candidates = np.flatnonzero(~(row < bound)) if bound != -np.inf else _possible(row, k)
        # Sorted ascending and reversed, so that NaN comes first, as in a descending sort.
        order = row[candidates[::-1]].argsort(kind="stable")
        ids[place] = candidates[::-1][order[::-1][:k]]
    return np.take_along_axis(logits, ids, axis=1), ids


def _possible(row: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the ids that are not minus infinity, padded with others to at least k."""
    ids = np.flatnonzero(row != -np.inf)
    if len(ids) >= k:
        return ids
    rest = np.flatnonzero(row == -np.inf)[: k - len(ids)]
    return np.sort(np.concatenate([ids, rest]))


def _bounds(logits: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    rows, size = logits.shape
    depth = min(DEPTH, size // (COLUMNS * k))
    if depth < 2:  # noqa: PLR2004 - a column of one is the row itself
        return np.full(rows, -np.inf, dtype=np.float32)
    columns = size // depth
    # A column's elements are a line apart, so that the pass runs along the memory.
    largest = logits[:, : columns * depth].reshape(rows, depth, columns).max(axis=1)
    bounds: NDArray[np.float32] = np.partition(largest, columns - k, axis=1)[:, columns - k]
    return bounds


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


def shape_rows(logits: NDArray[np.float32], policies: Sequence[SamplingPolicy], support: int) -> ShapedRows:
    """Shape float32 rows; `support` is the `top_k` of the policies, 1 where they are greedy."""
    values, ids = top_k(logits, support)
    if support == 1:
        # Greedy, or top_k 1: a point mass, unless the best logit is no number.
        return ShapedRows(ids, np.isfinite(values).astype(np.float64))
    temperature = np.array([[policy.temperature] for policy in policies])
    top_p = np.array([[policy.top_p] for policy in policies])
    scores = values.astype(np.float64)
    # At a temperature near 0 a quotient may be minus infinity: weight 0. NaN stays NaN.
    with np.errstate(over="ignore", invalid="ignore"):
        weights = np.exp((scores - scores[:, :1]) / temperature)
        weights /= weights.sum(axis=1, keepdims=True)
        mass = np.cumsum(weights, axis=1)
        weights[:, 1:][(mass[:, :-1] >= top_p) & (top_p < 1.0)] = 0.0
        weights /= weights.sum(axis=1, keepdims=True)
    return ShapedRows(ids, weights.astype(np.float32).astype(np.float64))

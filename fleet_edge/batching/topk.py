"""Top-k logits of every row of an array, exactly and in order, for less than a general selection costs.

The ids of a row are dealt out to columns, and one pass finds the largest element of each. The k-th largest of those is
a lower bound of the row's k-th largest element, and a second pass finds the few elements that reach it: only they are
sorted.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

DEPTH: Final = 64
"""Elements of a column, at most: fewer make the bound tighter, more make it cheaper to find."""

COLUMNS: Final = 4
"""Columns for each element that is looked for, at least, where the row is long enough: about a seventh more than these
elements then reach the bound."""


def top_k(logits: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the k largest elements of every row: the head of a stable descending sort.

    Rows in which very many elements are equal cost as much as that sort.

    Args:
        logits: float32 `[rows, size]`. Minus infinity is allowed; what is not a number comes first.
        k: How many; a row has no more than `size`.

    Returns:
        Values, float32 `[rows, min(k, size)]`, falling, and their ids, int64; of equals the lower id comes first.

    Raises:
        ValueError: `k` is less than 1, or the logits are not float32 rows.
    """
    if k < 1 or logits.ndim != 2 or logits.dtype != np.float32:  # noqa: PLR2004 - rows and columns
        raise ValueError("top_k wants float32 logits [rows, size] and a k of at least 1.")
    if k == 1 and logits.size:
        best = logits.argmax(axis=1)[:, np.newaxis]  # the first of equals; what is not a number wins
        return np.take_along_axis(logits, best, axis=1), best
    ids = np.empty((len(logits), min(k, logits.shape[1])), dtype=np.int64)
    for place, (row, bound) in enumerate(zip(logits, _bounds(logits, k), strict=True)):
        # "Not less" rather than "greater or equal": what is not a number is a candidate, and as a bound admits all.
        candidates = np.flatnonzero(~(row < bound)) if bound != -np.inf else _possible(row, k)
        # Sorted the wrong way round and reversed: what is not a number is then first, as in a descending sort.
        order = row[candidates[::-1]].argsort(kind="stable")
        ids[place] = candidates[::-1][order[::-1][:k]]
    return np.take_along_axis(logits, ids, axis=1), ids


def _possible(row: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the ids of a row that are not impossible, and as many of the others as are needed to make up k."""
    ids = np.flatnonzero(row != -np.inf)
    if len(ids) >= k:
        return ids
    rest = np.flatnonzero(row == -np.inf)[: k - len(ids)]
    return np.sort(np.concatenate([ids, rest]))


def _bounds(logits: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """Return a lower bound of every row's k-th largest element, `[rows]`."""
    rows, size = logits.shape
    depth = min(DEPTH, size // (COLUMNS * k))
    if depth < 2:  # noqa: PLR2004 - a column of one is the row itself
        return np.full(rows, -np.inf, dtype=np.float32)
    columns = size // depth
    # A column's elements lie a line apart, so the pass runs along the memory; what is left over would add little.
    largest = logits[:, : columns * depth].reshape(rows, depth, columns).max(axis=1)
    bounds: NDArray[np.float32] = np.partition(largest, columns - k, axis=1)[:, columns - k]
    return bounds

"""Shaping of logits, and the 16-bit quantized draft distribution.

Draft and target are shaped with the same policy. Verifying with another shaping than the draft's is the most common way
in which speculative sampling silently stops being exact.

Speculative sampling allows any draft distribution q, but the reported q must be the q that was drawn from. The device
rounds the shaped distribution to counts out of 65,536 *before* drawing, so the two bytes on the wire are exact.
"""

from dataclasses import dataclass
from functools import lru_cache
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
        ids: int64 `[support]`, distinct. From `shape` they are in descending order of probability, ties by ascending
            id, or all in ascending order if neither top_k nor top_p bounds the support.
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
    scores = adjust(np.asarray(logits), policy)
    if allowed is not None:
        masked = scores[allowed]
        if policy.min_tokens and not np.isfinite(masked).any():
            masked = np.asarray(logits)[allowed]  # the grammar allows nothing but the end
        dist = _shape(masked, policy)
        return Dist(allowed[dist.ids], dist.probs)
    return _shape(scores, policy)


def adjust(logits: NDArray[Any], policy: SamplingPolicy) -> NDArray[Any]:
    """Return logits with the least length, biases and penalties of the policy, in this order.

    The order is that of vLLM. Penalties and the least length need the policy's `history`; the logits are not changed in
    place.
    """
    if not policy.adjusts:
        return logits
    scores = logits.astype(np.float32)
    history = policy.history
    if history is not None and len(history.generated) < policy.min_tokens:
        scores[list(history.end_tokens)] = -np.inf
    if policy.logit_bias:
        biased, biases = _biases(policy.logit_bias)
        scores[biased] += biases
    if history is None:
        return scores
    generated, times = np.unique(np.array(history.generated, dtype=np.int64), return_counts=True)
    if policy.repetition_penalty != 1.0:
        seen = np.union1d(_distinct(tuple(history.prompt)), generated)
        own = scores[seen]
        scores[seen] = np.where(own > 0, own / policy.repetition_penalty, own * policy.repetition_penalty)
    if policy.frequency_penalty or policy.presence_penalty:
        scores[generated] -= (policy.frequency_penalty * times + policy.presence_penalty).astype(np.float32)
    return scores


@lru_cache(maxsize=64)
def _distinct(prompt: tuple[int, ...]) -> Ids:
    """Return the tokens of a prompt, once for all of its positions."""
    return np.unique(np.array(prompt, dtype=np.int64))


@lru_cache(maxsize=64)
def _biases(biases: tuple[tuple[int, float], ...]) -> tuple[Ids, NDArray[np.float32]]:
    ids, values = zip(*biases, strict=True)
    return np.array(ids), np.array(values, dtype=np.float32)


def _shape(scores: NDArray[Any], policy: SamplingPolicy) -> Dist:
    if scores.dtype not in (np.float32, np.float64):
        scores = scores.astype(np.float32)
    best = int(np.argmax(scores))  # the first of equals; NaN wins, so it is detected here
    if not np.isfinite(scores[best]):
        raise ValueError("The model's logits are not numbers.")
    if policy.greedy:
        return point_mass(best)
    if 0 < policy.top_k < len(scores):
        ids = largest(scores, policy.top_k)
        weights = _weights(scores[ids].astype(np.float64), policy)
        kept = int(np.count_nonzero(weights >= policy.min_p))  # they fall
        ids, weights = ids[:kept], weights[:kept]
        total = weights.sum()
    else:
        # The whole vocabulary in the precision of the logits, as engines compute a softmax: at 150,000 tokens a third
        # of the time of float64.
        small = _weights(scores, policy)
        if policy.min_p:
            small[small < policy.min_p] = 0.0
        if policy.top_p == 1.0:
            small /= small.sum()
            return _rounded(_all_ids(len(scores)), small)
        total = small.sum(dtype=np.float64)
        ids = _head(small, policy.top_p, total)
        ids = ids[_descending(scores[ids])]
        weights = _weights(scores[ids].astype(np.float64), policy)
        total += weights.sum() - small[ids].sum(dtype=np.float64)
    weights /= total
    if policy.top_p < 1.0:
        keep = int(np.searchsorted(np.cumsum(weights), policy.top_p)) + 1
        ids, weights = ids[:keep], weights[:keep]
        weights = weights / weights.sum()
    return _rounded(ids, weights)


MANY: Final = 1 << 12
"""Tokens from which a selection takes less time than work on all."""


@lru_cache(maxsize=4)
def _all_ids(size: int) -> Ids:
    ids = np.arange(size)
    ids.flags.writeable = False
    return ids


def _head(weights: NDArray[Any], top_p: float, total: float) -> Ids:
    """Return tokens that contain the smallest head whose share of the total reaches `top_p`."""
    # All others together have less than half of the mass that may be cut off, since these weights are rounded.
    spare = (1.0 - top_p) / 2
    ids = np.flatnonzero(weights >= spare * total / len(weights))
    if len(ids) > MANY:
        falling = np.sort(weights[ids])[::-1]
        mass = np.cumsum(falling.astype(np.float64))
        place = min(int(np.searchsorted(mass, (1.0 - spare) * total)), len(ids) - 1)
        ids = ids[weights[ids] >= falling[place]]
    return ids


_COLDEST: Final = 1e-30
"""A lower temperature is 0 in float32, and changes nothing."""


def _weights(scores: NDArray[Any], policy: SamplingPolicy) -> NDArray[Any]:
    """Return exp((score - largest) / temperature) in the type of the scores."""
    weights: NDArray[Any] = scores - scores.max()
    with np.errstate(over="ignore"):  # at a temperature of nearly 0 the quotient may be minus infinity: weight 0
        weights /= max(policy.temperature, _COLDEST)
    np.exp(weights, out=weights)
    return weights


def _rounded(ids: Ids, weights: NDArray[Any]) -> Dist:
    small = weights.astype(np.float32, copy=False)
    rounded = small.astype(np.float64)
    if small.min() > 0.0:
        return Dist(ids, rounded)
    positive = np.flatnonzero(rounded)
    return Dist(ids[positive], rounded[positive])


DEPTH: Final = 64
"""Most elements of a column in `largest`: fewer make the bound tighter, more make it cheaper to find."""

COLUMNS: Final = 4
"""Columns for each element that is looked for, at least, where the row is long enough. About a seventh more elements
than `k` then reach the bound."""


def largest(row: NDArray[Any], k: int) -> Ids:
    """Return the ids of the k largest elements: the head of a stable descending sort, in which NaN comes first.

    Elements are dealt into columns, and one pass finds the largest of each. The k-th largest of those is a lower bound
    of the row's k-th largest element, so only the few elements that reach it are sorted. Rows with very many equal
    elements cost as much as a full sort.
    """
    if k == 1:
        return np.array([row.argmax()])  # the first of equals; NaN wins
    bound = _bound(row, k)
    # "Not less" instead of "greater or equal": NaN becomes a candidate, and a NaN bound admits all.
    candidates = np.flatnonzero(~(row < bound)) if bound != -np.inf else _possible(row, k)
    return candidates[_descending(row[candidates])[:k]]


def _possible(row: NDArray[Any], k: int) -> Ids:
    """Return the ids that are not minus infinity, padded with others to at least k."""
    ids = np.flatnonzero(row != -np.inf)
    if len(ids) >= k:
        return ids
    rest = np.flatnonzero(row == -np.inf)[: k - len(ids)]
    return np.sort(np.concatenate([ids, rest]))


def _bound(row: NDArray[Any], k: int) -> float:
    depth = min(DEPTH, len(row) // (COLUMNS * k))
    if depth < 2:  # noqa: PLR2004 - a column of one is the row itself
        return -np.inf
    columns = len(row) // depth
    # A column's elements are a line apart, so that the pass runs along the memory.
    best = row[: columns * depth].reshape(depth, columns).max(axis=0)
    return float(np.partition(best, columns - k)[columns - k])


_SIGN: Final = np.uint32(1 << 31)
_LOW: Final = np.uint64((1 << 32) - 1)
_FEW: Final = 1 << 9
"""Values below which a stable sort takes less time than building the integers."""


def _descending(values: NDArray[Any]) -> Ids:
    """Return the order of a stable descending sort in which NaN comes first."""
    if len(values) < _FEW or values.dtype != np.float32 or np.isnan(values).any():
        # Sorted ascending and reversed.
        return len(values) - 1 - values[::-1].argsort(kind="stable")[::-1]
    # Of many values, one sort of integers that hold value and place takes a tenth of the time of a stable sort.
    bits = (values + np.float32(0.0)).view(np.uint32)  # zero has one sign
    rising = np.where(bits & _SIGN, ~bits, bits | _SIGN)
    keys = (~rising).astype(np.uint64) << np.uint64(32) | np.arange(len(values), dtype=np.uint64)
    keys.sort()
    return (keys & _LOW).view(np.int64)


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
    scale = TOTAL / dist.probs.sum()
    # Of a whole vocabulary only some tokens get a count: they are found without sorting the others.
    least = _LIKELY if len(dist) > MANY else 0.0
    while True:
        some = np.flatnonzero(dist.probs >= least / scale)
        exact = dist.probs[some] * scale
        counts = np.floor(exact).astype(np.int64)
        remainders = exact - counts
        short = TOTAL - int(counts.sum())
        if not least or np.count_nonzero(remainders > least) >= short:
            break
        least = least / 8 if least > _UNLIKELY else 0.0
    if short > 0:
        # The largest remainders get one more each; ties go to those that come first.
        bound = np.partition(remainders, len(some) - short)[len(some) - short]
        above = np.flatnonzero(remainders > bound)
        counts[above] += 1
        counts[np.flatnonzero(remainders == bound)[: short - len(above)]] += 1
    elif short < 0:
        # Only float rounding of an exact integer gets here; take it from the most probable token.
        counts[np.argmax(counts)] += short
    kept = counts > 0
    return QuantizedDist(dist.ids[some[kept]], counts[kept])


_LIKELY: Final = 0.5
_UNLIKELY: Final = 2.0**-12
"""Counts, before rounding, at which the selection begins, and below which all tokens are looked at."""


def draw_draft(quantized: QuantizedDist, uniform: float) -> tuple[int, int]:
    """Draw a token with one uniform number; return it and its count, its probability times 65,536."""
    where = int(np.searchsorted(np.cumsum(quantized.counts), int(uniform * TOTAL), side="right"))
    return int(quantized.ids[where]), int(quantized.counts[where])

"""16-bit quantized draft distribution, so that the reported q is the q drawn from.

Speculative sampling allows any draft distribution; what it does not allow is one that differs from what is reported.
Rounding the shaped distribution to counts out of 65,536 *before* drawing makes the two bytes on the wire exact.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from dssd.distribution import Dist, Float, Ids

__all__ = ["TOTAL", "QuantizedDist", "draw_draft", "quantize"]

TOTAL: Final = 1 << 16
"""Sum of the counts."""


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedDist:
    """A distribution in 65,536ths.

    Attributes:
        ids: int64 `[support]`, distinct.
        counts: int64 `[support]`, each at least 1; they sum to `TOTAL`.
    """

    ids: Ids
    counts: Ids

    def count(self, token: int) -> int:
        """Return the token's count, 0 outside the support."""
        where = np.flatnonzero(self.ids == token)
        return int(self.counts[where[0]]) if len(where) else 0

    def probabilities(self, tokens: Ids) -> Float:
        """Return q of each token, float64 `[n]`, 0 outside the support."""
        order = np.argsort(self.ids)
        where = np.searchsorted(self.ids, tokens, sorter=order)
        found = order[np.minimum(where, len(order) - 1)]
        return np.where(self.ids[found] == tokens, self.counts[found], 0) / TOTAL


def quantize(dist: Dist) -> QuantizedDist:
    """Round a distribution to counts by largest remainder; tokens that round to 0 drop out of the support."""
    exact = dist.probs * (TOTAL / dist.probs.sum())
    counts = np.floor(exact).astype(np.int64)
    short = TOTAL - int(counts.sum())
    if short > 0:
        # The largest remainders get one more each; ties go to the more probable token, which comes first.
        counts[np.argsort(counts - exact, kind="stable")[:short]] += 1
    elif short < 0:
        # Only float rounding of an exact integer can get here; the most probable token can spare it.
        counts[0] += short
    kept = counts > 0
    return QuantizedDist(dist.ids[kept], counts[kept])


def draw_draft(quantized: QuantizedDist, uniform: float) -> tuple[int, int]:
    """Draw a token with one random number in [0, 1).

    Returns:
        The token and its count, which is exactly 65,536 times the probability with which it was drawn.
    """
    where = int(np.searchsorted(np.cumsum(quantized.counts), int(uniform * TOTAL), side="right"))
    return int(quantized.ids[where]), int(quantized.counts[where])

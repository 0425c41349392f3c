"""Residual mode: accept by probability ratio, correct from what p has over q.

Leviathan, Kalman, Matias (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318); split between edge and device by
Ning, Zheng, Yang (arXiv 2507.12000). A draft token x drawn with q(x) is accepted with probability
min(1, p(x) / q(x)); after a rejection the token is drawn from max(0, p - q), normalised. Whatever q is, the token's
law is p.
"""

import numpy as np

from dssd.distribution import Dist
from dssd.quantized import TOTAL, QuantizedDist

__all__ = ["accepts", "draw", "residual"]


def accepts(p: float, count: int, uniform: float) -> bool:
    """Return whether a draft token stands.

    Args:
        p: The target's probability of the token.
        count: 65,536 times the probability with which the device drew it.
        uniform: The random number of (position, accept).
    """
    return uniform * (count / TOTAL) < p


def residual(p: Dist, quantized: QuantizedDist) -> Dist:
    """Return max(0, p - q), normalised, in the order of p; p itself where nothing is left but rounding."""
    rest = p.probs - quantized.probabilities(p.ids)
    kept = rest > 0.0
    if not kept.any():
        return p
    return Dist(p.ids[kept], rest[kept] / rest[kept].sum())


def draw(dist: Dist, uniform: float) -> int:
    """Draw a token by inversion.

    Args:
        dist: Need not sum to exactly 1.
        uniform: A random number in [0, 1).
    """
    mass = np.cumsum(dist.probs)
    where = int(np.searchsorted(mass, uniform * mass[-1], side="right"))
    # The product may round up to the total itself.
    return int(dist.ids[min(where, len(dist) - 1)])

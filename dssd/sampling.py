"""Drawing, accepting and correcting one token, in residual and in coupled mode.

Residual mode (Leviathan, Kalman, Matias, arXiv 2211.17192; Chen et al., arXiv 2302.01318; split between edge and device
by Ning, Zheng, Yang, arXiv 2507.12000): a draft token x drawn with q(x) is accepted with probability
min(1, p(x) / q(x)); after a rejection the token is drawn from max(0, p - q), normalised. For any q the resulting token
has distribution p.

Coupled mode (Daliri, Musco, Suresh, arXiv 2408.07978): device and edge share Gumbel noise g, so only token ids travel.
argmax(log p + g) has distribution p, and the device's argmax(log q + g) is often the same token. A draft token is
accepted iff the target draws it too. The output is therefore the target's own draw at every position: it depends on the
seed and on p, not on the drafter.
"""

from dataclasses import dataclass

import numpy as np

from dssd.counter_rng import Purpose, gumbel, random_uniform
from dssd.distribution import TOTAL, Dist, QuantizedDist, draw_draft, quantize
from schemas.policy import Mode, SamplingPolicy


def coupled_token(dist: Dist, seed: int, position: int) -> int:
    """Return argmax(log p + g), which has distribution p; ties (of probability 0) go to the more probable token."""
    if len(dist) == 1:
        return int(dist.ids[0])
    return int(dist.ids[np.argmax(np.log(dist.probs) + gumbel(seed, position, dist.ids))])


def accepts(p: float, count: int, uniform: float) -> bool:
    """Return whether the edge accepts a draft token.

    Args:
        p: The target's probability of the token.
        count: 65,536 times the probability with which the device drew it.
        uniform: Random number of the position and purpose `ACCEPT`.
    """
    return uniform * (count / TOTAL) < p


def residual(p: Dist, quantized: QuantizedDist) -> Dist:
    """Return max(0, p - q), normalised, in the order of p; p itself if only rounding is left."""
    rest = p.probs - quantized.probabilities(p.ids)
    kept = rest > 0.0
    if not kept.any():
        return p
    return Dist(p.ids[kept], rest[kept] / rest[kept].sum())


def draw(dist: Dist, uniform: float) -> int:
    """Draw a token by inversion.

    Args:
        dist: Its sum may differ from 1.
        uniform: A random number in [0, 1).
    """
    mass = np.cumsum(dist.probs)
    where = int(np.searchsorted(mass, uniform * mass[-1], side="right"))
    # The product may round up to the total itself.
    return int(dist.ids[min(where, len(dist) - 1)])


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """A draft token.

    Attributes:
        token: Token id.
        count: 65,536 times the probability with which it was drawn; None in coupled mode.
        quantized: Distribution that it was drawn from, kept for the correction; None in coupled mode.
        chance: Probability before quantization: the draft model's confidence. It does not affect the output.
        forced: Whether a grammar allows no other token here, so that no model was run.
    """

    token: int
    count: int | None = None
    quantized: QuantizedDist | None = None
    chance: float = 1.0
    forced: bool = False


def propose(q: Dist, *, policy: SamplingPolicy, position: int) -> Proposal:
    """Draw a draft token from the draft model's shaped distribution."""
    if policy.mode is Mode.COUPLED:
        token = coupled_token(q, policy.seed, position)
        return Proposal(token, chance=q.probability(token))
    quantized = quantize(q)
    token, count = draw_draft(quantized, random_uniform(policy.seed, position, Purpose.DRAFT))
    return Proposal(token, count, quantized, q.probability(token))

"""Drawing, accepting and correcting one token, in residual and in coupled mode.

Residual mode (Leviathan, Kalman, Matias, arXiv 2211.17192; Chen et al., arXiv 2302.01318; split between edge and device
by Ning, Zheng, Yang, arXiv 2507.12000): a draft token x drawn with q(x) is accepted with probability
min(1, p(x) / q(x)); after a rejection the token is drawn from max(0, p - q), normalised. For any q the resulting token
has distribution p.

Coupled mode (Daliri, Musco, Suresh, arXiv 2408.07978): device and edge share Gumbel noise g, so only token ids travel.
argmax(log p + g) has distribution p, and the device's argmax(log q + g) is often the same token. A draft token is
accepted iff the target draws it too. The output is therefore the target's own draw at every position: it depends on the
seed and on p, not on the drafter.

Random numbers are a hash of (seed, position, purpose, index), without state. A replayed message, a restarted edge or
another batch shape finds the same number for the same decision. The hash chains the finaliser of SplitMix64 (Steele,
Lea, Flood, OOPSLA 2014) over the four words; each step is a bijection of 64 bits. The purpose separates the domains, so
that two decisions never share a number. Using a position's numbers again after a rejection is sound: whether position t
is drafted again depends on the numbers of earlier positions only.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sampling.distribution import MANY, TOTAL, Dist, Float, Ids, QuantizedDist, draw_draft, quantize
from schemas.policy import Mode, SamplingPolicy

_GOLDEN: Final = 0x9E3779B97F4A7C15
_MIX_1: Final = 0xBF58476D1CE4E5B9
_MIX_2: Final = 0x94D049BB133111EB
_MASK: Final = (1 << 64) - 1

# 53 bits: every value of the grid k / 2^53 in [0, 1) is a float64.
_SHIFT: Final = 11
_UNIT: Final = 2.0**-53


class Purpose(IntEnum):
    DRAFT = 1  # the device draws a draft token
    ACCEPT = 2  # the edge accepts it or not
    BONUS = 3  # the edge draws the token after an accepted draft
    RESIDUAL = 4  # the device draws the correction
    SAMPLE = 5  # the edge draws the i-th sample of p
    THIN = 6  # the device keeps the i-th sample or not
    GUMBEL = 7  # the noise of one token, shared by both ends


def random_uniform(seed: int, position: int, purpose: Purpose, index: int = 0) -> float:
    """Return the uniform random number in [0, 1) of one decision.

    `position` is the number of tokens before the one that is decided. `index` distinguishes numbers of the same purpose
    at the same position.
    """
    state = _mix(seed + _GOLDEN * purpose)
    state = _mix(state + _GOLDEN * (position + 1))
    return (_mix(state + _GOLDEN * (index + 1)) >> _SHIFT) * _UNIT


def random_uniforms(seed: int, position: int, purpose: Purpose, indices: Ids) -> Float:
    """Return `random_uniform(seed, position, purpose, i)` for every i of `indices`."""
    return (_hashes(seed, position, purpose, indices) >> np.uint64(_SHIFT)).astype(np.float64) * _UNIT


def gumbel(seed: int, position: int, tokens: Ids) -> Float:
    """Return the Gumbel noise of each token (int64 `[n]`) at a position; device and edge compute the same."""
    # Half a step off the grid: never 0 or 1, so both logarithms are finite.
    uniform = random_uniforms(seed, position, Purpose.GUMBEL, tokens) + _UNIT / 2
    uniform = np.minimum(uniform, 1.0 - _UNIT)
    return -np.log(-np.log(uniform))


def _mix(word: int) -> int:
    word &= _MASK
    word = ((word ^ (word >> 30)) * _MIX_1) & _MASK
    word = ((word ^ (word >> 27)) * _MIX_2) & _MASK
    return word ^ (word >> 31)


def _hashes(seed: int, position: int, purpose: Purpose, indices: Ids) -> NDArray[np.uint64]:
    state = _mix(_mix(seed + _GOLDEN * purpose) + _GOLDEN * (position + 1))
    # numpy arrays of uint64 wrap silently, as the hash requires.
    words = np.asarray(indices).astype(np.uint64)
    words *= np.uint64(_GOLDEN)
    words += np.uint64((state + _GOLDEN) & _MASK)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    words ^= words >> np.uint64(31)
    return words


_CHUNK: Final = 1 << 14
"""Tokens whose noise is computed at a time: they fit into a core's cache."""

_SLACK: Final = 1e-9
"""Far more than the rounding of a logarithm, far less than what chooses a token."""


def coupled_token(dist: Dist, seed: int, position: int) -> int:
    """Return argmax(log p + g), which has distribution p; ties (of probability 0) go to the more probable token."""
    if len(dist) == 1:
        return int(dist.ids[0])
    ids, probs = dist.ids, dist.probs
    if len(dist) > MANY:
        places = _contenders(dist, seed, position)
        ids, probs = ids[places], probs[places]
    return int(ids[np.argmax(np.log(probs) + gumbel(seed, position, ids))])


def _contenders(dist: Dist, seed: int, position: int) -> Ids:
    """Return places that contain the one of argmax(log p + g), found without logarithms.

    With u = exp(-exp(-g)), a token of probability p beats the value v only if u > exp(-p exp(-v)), which is at least
    1 - p exp(-v). The value of the most probable token rules out nearly all others.
    """
    best = int(np.argmax(dist.probs))
    value = np.log(dist.probs[best]) + gumbel(seed, position, dist.ids[best : best + 1])[0]
    factor = float(np.exp(-value)) * (1.0 + _SLACK)
    found = [np.array([best])]
    for begin in range(0, len(dist), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        uniform = random_uniforms(seed, position, Purpose.GUMBEL, dist.ids[part])
        uniform += dist.probs[part] * factor
        found.append(begin + np.flatnonzero(uniform >= 1.0 - _UNIT))
    return np.unique(np.concatenate(found))


def accepts(p: float, count: int, uniform: float) -> bool:
    """Accept a draft token, drawn with probability count / 65,536, with probability min(1, p / q)."""
    return uniform * (count / TOTAL) < p


def residual(p: Dist, quantized: QuantizedDist) -> Dist:
    """Return max(0, p - q), normalised, in the order of p; p itself if only rounding is left."""
    rest = p.probs - quantized.probabilities(p.ids)
    kept = rest > 0.0
    if not kept.any():
        return p
    return Dist(p.ids[kept], rest[kept] / rest[kept].sum())


def draw(dist: Dist, uniform: float) -> int:
    """Draw a token by inversion of a number in [0, 1); the sum of `dist` may differ from 1."""
    return int(dist.ids[Inversion(dist.probs).place(uniform)])


class Inversion:
    """Draws from weights by inversion: the place of the first running sum that exceeds a share of the total.

    With many weights the running sums are those of blocks, and within a block that is drawn.
    """

    def __init__(self, weights: Float) -> None:
        self._weights = weights
        blocks = len(weights) > MANY
        self._sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK)) if blocks else weights
        self._mass = np.cumsum(self._sums)

    def place(self, uniform: float) -> int:
        """Return the place that a number in [0, 1) falls on."""
        place = inverse(self._mass, uniform)
        if self._sums is self._weights:
            return place
        begin = place * _BLOCK
        mass = np.cumsum(self._weights[begin : begin + _BLOCK])
        left = uniform * self._mass[-1] - (self._mass[place] - self._sums[place])
        return begin + min(int(np.searchsorted(mass, left, side="right")), len(mass) - 1)


_BLOCK: Final = 512


def inverse(mass: Float, uniform: float) -> int:
    """Return the place in a distribution, given as running sums, that a number in [0, 1) falls on."""
    # The product may round up to the total itself.
    return min(int(np.searchsorted(mass, uniform * mass[-1], side="right")), len(mass) - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """A draft token.

    Attributes:
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
    """Draw a draft token."""
    if policy.mode is Mode.COUPLED:
        token = coupled_token(q, policy.seed, position)
        return Proposal(token, chance=q.probability(token))
    quantized = quantize(q)
    token, count = draw_draft(quantized, random_uniform(policy.seed, position, Purpose.DRAFT))
    return Proposal(token, count, quantized, q.probability(token))

"""Counter-based random numbers: a hash of (seed, position, purpose, index), without state.

A replayed message, a restarted edge or another batch shape finds the same number for the same decision. The hash
chains the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) over the four words; each step is a bijection of
64 bits. The purpose separates the domains, so that two decisions never share a number.

Using a position's numbers again after a rejection is sound: whether position t is drafted again depends on the numbers
of earlier positions only.
"""

from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dssd.distribution import Float, Ids

_GOLDEN: Final = 0x9E3779B97F4A7C15
_MIX_1: Final = 0xBF58476D1CE4E5B9
_MIX_2: Final = 0x94D049BB133111EB
_MASK: Final = (1 << 64) - 1

# 53 bits: every value of the grid k / 2^53 in [0, 1) is a float64.
_SHIFT: Final = 11
_UNIT: Final = 2.0**-53


class Purpose(IntEnum):
    """What a random number decides."""

    DRAFT = 1  # the device draws a draft token
    ACCEPT = 2  # the edge accepts it or not
    BONUS = 3  # the edge draws the token after an accepted draft
    RESIDUAL = 4  # the device draws the correction
    SAMPLE = 5  # the edge draws the i-th sample of p
    THIN = 6  # the device keeps the i-th sample or not
    GUMBEL = 7  # the noise of one token, shared by both ends


def random_uniform(seed: int, position: int, purpose: Purpose, index: int = 0) -> float:
    """Return the uniform random number in [0, 1) of one decision.

    Args:
        seed: Seed of the policy, 64 bits.
        position: Number of tokens before the one that is decided.
        purpose: What the number decides.
        index: Distinguishes numbers of the same purpose at the same position.
    """
    state = _mix(seed + _GOLDEN * purpose)
    state = _mix(state + _GOLDEN * (position + 1))
    return (_mix(state + _GOLDEN * (index + 1)) >> _SHIFT) * _UNIT


def random_uniforms(seed: int, position: int, purpose: Purpose, indices: Ids) -> Float:
    """Return `random_uniform(seed, position, purpose, i)` for every i of `indices`."""
    return (_hashes(seed, position, purpose, indices) >> np.uint64(_SHIFT)).astype(np.float64) * _UNIT


def gumbel(seed: int, position: int, tokens: Ids) -> Float:
    """Return the standard Gumbel noise of each token at a position; device and edge compute the same.

    Args:
        seed: Seed of the policy.
        position: Number of tokens before this one.
        tokens: int64 `[n]`.
    """
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
    words = np.asarray(indices).astype(np.uint64)
    # numpy arrays of uint64 wrap silently, as the hash requires.
    words = (words + np.uint64(1)) * np.uint64(_GOLDEN) + np.uint64(state)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(_MIX_1)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(_MIX_2)
    return words ^ (words >> np.uint64(31))

"""Guess of the next token from what followed the same tokens before, and how far guesses of its kind are to be trusted.

The guess is a distribution: the counts of what followed, places that are more alike counting for more. It is the one
that is drawn from and reported, so the law holds whatever it is. It is also the one that is likeliest accepted: with
probability sum(min(p, q)), which is 1 if what followed before follows with the target's own probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from dssd.distribution import Dist, point_mass
from fleet_device.drafters.suffix.index import Match
from schemas.policy import SamplingPolicy

__all__ = ["Guess", "Trust", "make_guess"]

_MOST_ALIKE: Final = 30  # tokens: a place that is so many less alike counts for nothing

_ALIKE: Final = (4, 8, 16)
_AGREED: Final = (0.5, 0.8, 0.999)
_PLACES: Final = (2, 5)
"""Where the tokens that are alike, the share of the likeliest follower, and the number of places part the kinds."""

_ALIKE_SHARE: Final = (0.35, 0.55, 0.75, 0.85)
"""What a guess is trusted at first, by the tokens that are alike, if all places agree."""

_PRIOR_GUESSES: Final = 4.0
_REMEMBERED: Final = 64
"""Guesses of a kind, about, by which that kind is judged."""


@dataclass(frozen=True, slots=True)
class Guess:
    """What may follow.

    Attributes:
        dist: From which a token is drawn.
        kind: Of the guess, for `Trust`.
    """

    dist: Dist
    kind: int

    @property
    def likeliest(self) -> int:
        """The token of the largest probability."""
        return int(self.dist.ids[0])


def make_guess(matches: Sequence[Match], policy: SamplingPolicy) -> Guess:
    """Return the guess that follows from at least one match; where the policy is greedy, of a certain token."""
    followers = np.concatenate([match.followers for match in matches])
    alike = np.concatenate([match.alike for match in matches])
    most = int(alike.max())
    weights = np.exp2(np.maximum(alike - most, -_MOST_ALIKE).astype(np.float64))
    ids, inverse = np.unique(followers, return_inverse=True)
    sums = np.bincount(inverse, weights=weights)
    probs = sums / sums.sum()
    order = np.lexsort((ids, -probs))
    agreed = float(probs[order[0]])
    kind = _kind(most, agreed, int((alike == most).sum()))
    if policy.greedy or len(ids) == 1:
        return Guess(point_mass(int(ids[order[0]])), kind)
    rounded = probs[order].astype(np.float32).astype(np.float64)
    return Guess(Dist(ids[order].astype(np.int64), rounded), kind)


def _place(bounds: Sequence[float], value: float) -> int:
    return sum(value >= bound for bound in bounds)


def _kind(alike: int, agreed: float, places: int) -> int:
    row = _place(_ALIKE, alike) * (len(_AGREED) + 1) + _place(_AGREED, agreed)
    return row * (len(_PLACES) + 1) + _place(_PLACES, places)


def _first_trust() -> list[float]:
    shares = (0.3, 0.55, 0.8, 1.0)
    return [first * share for first in _ALIKE_SHARE for share in shares for _ in range(len(_PLACES) + 1)]


@dataclass(slots=True)
class Trust:
    """How likely a guess of each kind is right: counted on every token that is committed, whoever has drafted it.

    Since nothing but committed text goes in, whoever decides by it decides by what both ends know.
    """

    _right: list[float] = field(default_factory=lambda: [_PRIOR_GUESSES * trust for trust in _first_trust()])
    _guessed: list[float] = field(default_factory=lambda: [_PRIOR_GUESSES] * len(_first_trust()))

    def of(self, guess: Guess) -> float:
        """Return the chance that a token drawn from a guess is accepted, those before it taken as accepted."""
        return self._right[guess.kind] / self._guessed[guess.kind]

    def learn(self, guess: Guess, token: int) -> None:
        """Take note of the token that was committed where a guess was made."""
        kept = 1.0 - 1.0 / _REMEMBERED
        self._guessed[guess.kind] = kept * self._guessed[guess.kind] + 1.0
        self._right[guess.kind] = kept * self._right[guess.kind] + guess.dist.probability(token)

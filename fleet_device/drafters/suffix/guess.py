"""Guess of the next token from what followed the same tokens before, and how far guesses of its kind are to be trusted.

The guess is a distribution: the counts of what followed, places that are more alike counting for more. It is the one
that is drawn from and reported, so the law holds whatever it is. It is also the one that is likeliest accepted: with
probability sum(min(p, q)), which is 1 if what followed before follows with the target's own probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from dssd.distribution import Dist, Ids, point_mass
from fleet_device.drafters.suffix.index import Match
from schemas.policy import SamplingPolicy

__all__ = ["Guess", "Trust", "make_guess", "restrict"]

_ALIKE: Final = (4, 8, 16)
_AGREED: Final = (0.5, 0.8, 0.999)
_PLACES: Final = (2, 5)
"""Where the tokens that are alike, the share of the likeliest follower, and the number of places part the kinds."""

_ALIKE_SHARE: Final = (0.2, 0.5, 0.75, 0.85)
"""What a guess is trusted at first, by the tokens that are alike, if all places agree."""

_PRIOR_GUESSES: Final = 4.0
_REMEMBERED: Final = 64
"""Guesses of a kind, about, by which that kind is judged."""


@dataclass(frozen=True, slots=True)
class Guess:
    """What may follow.

    Attributes:
        tokens: By falling probability, ties by rising id.
        probs: Of each.
        kind: Of the guess, for `Trust`.
    """

    tokens: Sequence[int]
    probs: Sequence[float]
    kind: int

    @property
    def likeliest(self) -> int:
        """The token of the largest probability."""
        return self.tokens[0]

    @property
    def dist(self) -> Dist:
        """The distribution that a token is drawn from."""
        if len(self.tokens) == 1:
            return point_mass(self.tokens[0])
        rounded = np.array(self.probs, dtype=np.float32).astype(np.float64)
        return Dist(np.array(self.tokens, dtype=np.int64), rounded)

    def probability(self, token: int) -> float:
        """Return how likely a token is drawn."""
        return self.probs[self.tokens.index(token)] if token in self.tokens else 0.0


def make_guess(matches: Sequence[Match], policy: SamplingPolicy) -> Guess:
    """Return the guess that follows from at least one match; where the policy is greedy, of a certain token."""
    most = max(max(match.alike) for match in matches)
    sums: dict[int, float] = {}
    places = 0
    for match in matches:
        for token, alike in zip(match.followers, match.alike, strict=True):
            sums[token] = sums.get(token, 0.0) + 2.0 ** (alike - most)
            places += alike == most
    tokens = sorted(sums, key=lambda token: (-sums[token], token))
    total = sum(sums.values())
    kind = _kind(most, sums[tokens[0]] / total, places)
    if policy.greedy:
        return Guess(tokens[:1], (1.0,), kind)
    return Guess(tokens, [sums[token] / total for token in tokens], kind)


def restrict(dist: Dist, allowed: Ids) -> Dist | None:
    """Return a distribution over those of its tokens that are allowed; None if none is."""
    kept = np.isin(dist.ids, allowed)
    probs = dist.probs[kept]
    return Dist(dist.ids[kept], (probs / probs.sum()).astype(np.float32).astype(np.float64)) if kept.any() else None


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
        self._right[guess.kind] = kept * self._right[guess.kind] + guess.probability(token)

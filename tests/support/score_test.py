"""Score test of generated tokens: finds mistakes of a few percent, of the kinds that it is directed at.

Given the tokens before it, what becomes of a token has a known distribution: which token it is and, where drafts are
verified token by token, whether it was accepted or corrected. A *score* is a number for each outcome, less its mean.
So under the exact distribution the sum over all tokens has mean 0, and its covariance is the sum of theirs: the tokens
before may decide how long a text is, and the sum is a martingale all the same. The sums are compared with that
covariance (Rao's test): chi-square with a degree of freedom for each score that is not constant.

The scores are directed at named mistakes:

1. the token was corrected: drafts are accepted too often or too rarely;
2. it was accepted where q > p: the ratio p/q is wrong, as by a reported q that is too high;
3. q / (p + q): committed tokens are drawn towards the draft model, or away from it;
4. log p: they are too likely or too unlikely, as by another temperature;
5. log p of a corrected token: the correction is drawn from the wrong distribution.

A corrected token with p <= q is impossible, however rarely it occurs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Outcome = tuple[int, bool | None]
"""A token, and whether it replaced a rejected draft token; None if no draft token was verified there."""

Float = NDArray[np.float64]
SCORES: Final = 5
LOG_P: Final = 3
"""Index of the score that sessions are compared by."""

_CONSTANT: Final = 1e-7


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """What may become of a token, given those before it.

    Attributes:
        probs: Probability of each outcome.
        scores: `[SCORES]` of each outcome, with mean 0.
        covariance: `[SCORES, SCORES]` of the scores.
    """

    probs: Mapping[Outcome, float]
    scores: Mapping[Outcome, Float]
    covariance: Float

    @classmethod
    def of(cls, probs: Mapping[Outcome, float], p: Mapping[int, float], q: Mapping[int, float]) -> "Outcomes":
        """Return outcomes with their scores; `p` and `q` are probabilities by token, `q` as it was drawn from."""
        possible = {outcome: prob for outcome, prob in probs.items() if prob > 0.0}
        rows = np.array([_scores(*outcome, p=p, q=q) for outcome in possible])
        weights = np.array(list(possible.values()))
        weights /= weights.sum()
        rows -= weights @ rows
        covariance = (rows * weights[:, None]).T @ rows
        return cls(possible, dict(zip(possible, rows, strict=True)), covariance)


def untested(p: Mapping[int, float], q: Mapping[int, float]) -> Outcomes:
    """Return the outcomes where no draft is verified, or nothing is known about that."""
    return Outcomes.of({(token, None): prob for token, prob in p.items()}, p, q)


def residual(p: Mapping[int, float], q: Mapping[int, float]) -> Outcomes:
    """Return the outcomes of a draft token in residual mode."""
    accepted: dict[Outcome, float] = {(token, False): min(prob, q.get(token, 0.0)) for token, prob in p.items()}
    corrected: dict[Outcome, float] = {(token, True): max(0.0, prob - q.get(token, 0.0)) for token, prob in p.items()}
    return Outcomes.of(accepted | corrected, p, q)


def coupled(p: Mapping[int, float], q: Mapping[int, float]) -> Outcomes:
    """Return the outcomes of a draft token in coupled mode.

    Both ends take the token with the smallest E / probability, E being the same exponential noise. So both take x iff
    E(x) is less than E(y) / max(p(y)/p(x), q(y)/q(x)) for each other y.
    """
    either = p.keys() | q.keys()
    both = {
        token: 1.0 / sum(max(p.get(each, 0.0) / prob, q.get(each, 0.0) / q[token]) for each in either)
        for token, prob in p.items()
        if token in q
    }
    accepted: dict[Outcome, float] = {(token, False): prob for token, prob in both.items()}
    corrected: dict[Outcome, float] = {(token, True): prob - both.get(token, 0.0) for token, prob in p.items()}
    return Outcomes.of(accepted | corrected, p, q)


def _scores(token: int, corrected: bool | None, *, p: Mapping[int, float], q: Mapping[int, float]) -> list[float]:
    mine, drafts = p[token], q.get(token, 0.0)
    return [
        corrected is True,
        corrected is False and drafts > mine,
        drafts / (drafts + mine),
        math.log(mine),
        math.log(mine) if corrected else 0.0,
    ]


@dataclass(slots=True)
class ScoreTest:
    """Sums of scores over tokens."""

    total: Float = field(default_factory=lambda: np.zeros(SCORES))
    covariance: Float = field(default_factory=lambda: np.zeros((SCORES, SCORES)))
    impossible: bool = False

    def add(self, outcomes: Outcomes, outcome: Outcome, *, times: int = 1) -> None:
        if outcome in outcomes.scores:
            self.total += times * outcomes.scores[outcome]
            self.covariance += times * outcomes.covariance
        else:
            self.impossible = True

    def p_value(self) -> float | None:
        """Return the p-value; None if no score varies, as in greedy generations."""
        if self.impossible:
            return 0.0
        scale = np.sqrt(np.diag(self.covariance))
        varies = scale > _CONSTANT
        if not varies.any():
            return None
        # Scores that determine each other count once.
        sizes, axes = np.linalg.eigh((self.covariance / np.outer(scale, scale).clip(_CONSTANT))[np.ix_(varies, varies)])
        kept = sizes > _CONSTANT
        along = (self.total[varies] / scale[varies]) @ axes[:, kept]
        return float(stats.chi2.sf((along**2 / sizes[kept]).sum(), kept.sum()))


Scored = Sequence[tuple[float, float]]
"""The score `LOG_P` of each token of a text, and its variance."""


def dependence(pairs: Sequence[tuple[Scored, Scored]]) -> float | None:
    """Return the p-value of the correlation between texts that should be independent; None if nothing varies.

    The product of two scores at the same place has mean 0, and the product of their variances as its own.
    """
    products = [(a * b, v * w) for one, other in pairs for (a, v), (b, w) in zip(one, other, strict=False)]
    variance = sum(size for _, size in products)
    if variance < _CONSTANT:
        return None
    return float(2.0 * stats.norm.sf(abs(sum(product for product, _ in products)) / math.sqrt(variance)))

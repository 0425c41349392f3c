"""Estimates: what a device makes of its measurements, the old ones forgotten bit by bit, a wild one not believed."""

import math
from bisect import bisect
from dataclasses import dataclass, field
from typing import Final

__all__ = ["Acceptance", "Confidence", "Times", "Trend"]

_HORIZON: Final = 32
"""Times that are remembered, about."""

_WILD: Final = 4.0
"""A time so many times the expected one is not believed until the next one is like it."""

_LONGEST_S: Final = 3600.0

_STIFFNESS: Final = 2.0
"""Spread of draft lengths (tokens²) at which half of a slope is believed: with less, noise would look like one."""

_FADED: Final = 2.0
"""Measurements that what is only expected counts for."""

_TYPICAL: Final = 4
"""Draft length at which two trends are compared."""

_TESTED_HORIZON: Final = 128
"""Tested tokens that are remembered, about."""

_LATELY: Final = 32
"""Tested tokens that count as the latest, about."""

_SURPRISE: Final = 2.5
"""Standard deviations by which the latest differ from all where acceptance has changed."""

_SURE: Final = (0.1, 0.25, 0.4, 0.6, 0.8, 0.95)
"""Where the probability of a drawn token parts those that are counted together."""

_SHARED_TOKENS: Final = 4.0
"""Tested tokens that the acceptance of all counts for among those of like probability."""

_PRIOR: Final = 0.7
_PRIOR_TOKENS: Final = 3.0
_TOLD_TOKENS: Final = 16.0
"""Tested tokens for which it counts what an edge says that such a draft model is accepted."""

_UNLIKE: Final = 0.15
"""By how much a device's own acceptance differs from what others have found where it no longer goes by theirs."""

_MOST: Final = 0.995


@dataclass(slots=True)
class Acceptance:
    """How likely a draft token is accepted.

    That differs from text to text, and within one. So the latest tokens are counted beside all that are remembered, and
    where the two differ by more than chance would have it, the latest alone are believed. Before there are many, what
    others have found counts for some.
    """

    _prior: float = _PRIOR
    _prior_tokens: float = _PRIOR_TOKENS
    _others: bool = False  # have found it
    _tested: float = 0.0
    _accepted: float = 0.0
    _lately_tested: float = 0.0
    _lately_accepted: float = 0.0

    def add(self, *, tested: int, accepted: int) -> None:
        """Take a verdict."""
        kept = (1.0 - 1.0 / _TESTED_HORIZON) ** tested
        self._tested = kept * self._tested + tested
        self._accepted = kept * self._accepted + accepted
        kept = (1.0 - 1.0 / _LATELY) ** tested
        self._lately_tested = kept * self._lately_tested + tested
        self._lately_accepted = kept * self._lately_accepted + accepted
        if self._changed:
            self._tested, self._accepted = self._lately_tested, self._lately_accepted

    def told(self, rate: float) -> None:
        """Take what others have found."""
        self._prior, self._prior_tokens, self._others = rate, _TOLD_TOKENS, True

    @property
    def _changed(self) -> bool:
        if self._lately_tested < _LATELY / 2:
            return False
        rate = self._accepted / self._tested
        # Of a rate near 0 or 1 even one token to the contrary is news, and none is proof.
        deviation = math.sqrt(max(rate * (1.0 - rate), 1.0 / _LATELY) / self._lately_tested)
        return abs(self._lately_accepted / self._lately_tested - rate) > _SURPRISE * deviation

    @property
    def rate(self) -> float:
        """Accepted of tested, below 1."""
        return min(_MOST, (self._accepted + self._prior * self._fading) / (self._tested + self._fading))

    @property
    def common(self) -> float:
        """The same where devices are to come to one plan, though they write different texts: what others have found.

        Unless its own is quite another: then it writes what the draft model is much better at, or much worse.
        """
        own = self.rate
        return min(_MOST, self._prior) if self._others and abs(own - self._prior) <= _UNLIKE else own

    @property
    def hoped(self) -> float:
        """What the rate may well be: one standard error above what was counted."""
        rate = self.rate
        return min(_MOST, rate + math.sqrt(rate * (1.0 - rate) / (self._tested + self._fading)))

    @property
    def _fading(self) -> float:
        """Tokens that what others have found counts for: the fewer, the more there are of its own."""
        return self._prior_tokens * max(0.0, 1.0 - self._tested / _TESTED_HORIZON)


@dataclass(slots=True)
class Confidence:
    """How likely a draft token is accepted, by the probability with which the draft model gave it.

    A draft model says by its own probabilities where it is unsure; how far that is to be believed differs from model to
    model, and is counted.
    """

    _tested: list[float] = field(default_factory=lambda: [0.0] * (len(_SURE) + 1))
    _accepted: list[float] = field(default_factory=lambda: [0.0] * (len(_SURE) + 1))

    def add(self, chance: float, *, accepted: bool) -> None:
        """Take a tested token."""
        place, kept = bisect(_SURE, chance), 1.0 - 1.0 / _TESTED_HORIZON
        self._tested[place] = kept * self._tested[place] + 1.0
        self._accepted[place] = kept * self._accepted[place] + accepted

    def rate(self, chance: float, *, overall: float) -> float:
        """Return how likely a token of this probability is accepted, `overall` being that of any."""
        place = bisect(_SURE, chance)
        return (self._accepted[place] + _SHARED_TOKENS * overall) / (self._tested[place] + _SHARED_TOKENS)


@dataclass(slots=True)
class Trend:
    """A time that may grow with the length of a draft: least squares with forgetting, the slope never negative."""

    _weight: float = 0.0
    _tokens: float = 0.0
    _seconds: float = 0.0
    _tokens_tokens: float = 0.0
    _tokens_seconds: float = 0.0
    _doubted: bool = False

    def add(self, seconds: float, *, tokens: int = 0) -> None:
        """Take a measurement, unless it is none or too wild to be believed yet."""
        if not 0.0 <= seconds <= _LONGEST_S:
            return
        wild = self.known and seconds > _WILD * self.at(tokens)
        doubted, self._doubted = self._doubted, wild
        if wild and not doubted:
            return
        kept = 1.0 - 1.0 / _HORIZON
        self._weight = kept * self._weight + 1.0
        self._tokens = kept * self._tokens + tokens
        self._seconds = kept * self._seconds + seconds
        self._tokens_tokens = kept * self._tokens_tokens + tokens * tokens
        self._tokens_seconds = kept * self._tokens_seconds + tokens * seconds

    def faded(self, factor: float = 1.0) -> "Trend":
        """Return a trend that expects the same times so much, and is soon convinced of something else."""
        left = min(1.0, _FADED / self._weight) if self.known else 0.0
        return Trend(
            left * self._weight,
            left * self._tokens,
            left * factor * self._seconds,
            left * self._tokens_tokens,
            left * factor * self._tokens_seconds,
        )

    @property
    def known(self) -> bool:
        """Whether there is a measurement."""
        return self._weight > 0.0

    @property
    def slope(self) -> float:
        """Seconds a token; 0 while the drafts do not vary."""
        if not self.known:
            return 0.0
        together = self._tokens_seconds / self._weight - self._mean_tokens * self._mean
        # A time without any tokens is a time as well, so that the line must not cross zero before.
        steepest = self._mean / self._mean_tokens if self._mean_tokens else 0.0
        return min(max(0.0, together / (self._spread + _STIFFNESS)), steepest)

    def from_start(self, seconds: float) -> tuple[float, float]:
        """Return the time without any tokens, and the slope from there to the mean.

        Drafts of like length leave open what of their time is due to their tokens: anything from nothing to as much for
        each as for the text itself.

        Args:
            seconds: The time without any tokens, as known from elsewhere: of what is open, the nearest is taken.
        """
        most = max(0.0, self.at(0))  # but for rounding it never is below
        if not self.known or not self._mean_tokens:
            return most, self.slope
        unknown = _STIFFNESS / (self._spread + _STIFFNESS)
        each = self._mean / (1.0 + self._mean_tokens)
        least = self._mean - self._mean_tokens * (self.slope + unknown * max(0.0, each - self.slope))
        start = min(most, max(least, seconds))
        return start, (self._mean - start) / self._mean_tokens

    def at(self, tokens: int) -> float:
        """Return the expected seconds; 0 before the first measurement."""
        if not self.known:
            return 0.0
        return self._mean + self.slope * (tokens - self._mean_tokens)

    def with_slope(self, slope: float) -> tuple[float, float]:
        """Return the time without any tokens where each takes `slope`, and that; less where it would be below zero."""
        if not self.known or not self._mean_tokens:
            return self.at(0), slope
        slope = min(slope, self._mean / (1.0 + self._mean_tokens))
        return max(0.0, self._mean - slope * self._mean_tokens), slope

    @property
    def _spread(self) -> float:
        return self._tokens_tokens / self._weight - self._mean_tokens**2

    @property
    def _mean(self) -> float:
        return self._seconds / self._weight

    @property
    def _mean_tokens(self) -> float:
        return self._tokens / self._weight


@dataclass(slots=True)
class Times:
    """What is measured while the device waits for verdicts, or while it drafts ahead.

    The two are kept apart: who drafts ahead may take power or bandwidth from whatever verifies.

    Attributes:
        token: To draft a token.
        beside: From sending to the verdict, without the edge's step and the wait for it.
        queue: That wait.
        compute: The edge's step.
    """

    token: Trend = field(default_factory=Trend)
    beside: Trend = field(default_factory=Trend)
    queue: Trend = field(default_factory=Trend)
    compute: Trend = field(default_factory=Trend)

    def faded(self) -> "Times":
        """Return what these let expect, to be told otherwise soon."""
        return Times(self.token.faded(), self.beside.faded(), self.queue.faded(), self.compute.faded())

    def at_least(self, other: "Times") -> "Times":
        """Return the longer ones of two."""
        return Times(
            max(self.token, other.token, key=_typical),
            max(self.beside, other.beside, key=_typical),
            max(self.queue, other.queue, key=_typical),
            max(self.compute, other.compute, key=_typical),
        )

    def at_most(self, other: "Times") -> "Times":
        """Return the shorter ones of two."""
        return Times(
            min(self.token, other.token, key=_typical),
            min(self.beside, other.beside, key=_typical),
            min(self.queue, other.queue, key=_typical),
            min(self.compute, other.compute, key=_typical),
        )


def _typical(trend: Trend) -> float:
    return trend.at(_TYPICAL)

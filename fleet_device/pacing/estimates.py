"""Estimates from measurements, with forgetting and without trust in outliers."""

import math
from bisect import bisect
from dataclasses import dataclass, field
from typing import Final

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
    """Acceptance of draft tokens.

    It differs between requests and within one. So the latest tokens are counted separately from all remembered ones;
    where the
    two differ by more than chance, only the latest count. With few measurements, the acceptance of other devices counts
    as well.
    """

    _prior: float = _PRIOR
    _prior_tokens: float = _PRIOR_TOKENS
    _others: bool = False  # have found it
    _tested: float = 0.0
    _accepted: float = 0.0
    _lately_tested: float = 0.0
    _lately_accepted: float = 0.0

    def add(self, *, tested: int, accepted: int) -> None:
        kept = (1.0 - 1.0 / _TESTED_HORIZON) ** tested
        self._tested = kept * self._tested + tested
        self._accepted = kept * self._accepted + accepted
        kept = (1.0 - 1.0 / _LATELY) ** tested
        self._lately_tested = kept * self._lately_tested + tested
        self._lately_accepted = kept * self._lately_accepted + accepted
        if self._changed:
            self._tested, self._accepted = self._lately_tested, self._lately_accepted

    def told(self, rate: float) -> None:
        """Record the acceptance of other devices."""
        self._prior, self._prior_tokens, self._others = rate, _TOLD_TOKENS, True

    @property
    def _changed(self) -> bool:
        if self._lately_tested < _LATELY / 2:
            return False
        rate = self._accepted / self._tested
        # Near 0 or 1 a single token to the contrary is news, and none is proof.
        deviation = math.sqrt(max(rate * (1.0 - rate), 1.0 / _LATELY) / self._lately_tested)
        return abs(self._lately_accepted / self._lately_tested - rate) > _SURPRISE * deviation

    @property
    def rate(self) -> float:
        """Accepted ÷ tested, below 1."""
        return min(_MOST, (self._accepted + self._prior * self._fading) / (self._tested + self._fading))

    @property
    def common(self) -> float:
        """Acceptance that similar devices agree on although their requests differ: that of all devices.

        A device whose own acceptance is clearly different uses its own.
        """
        own = self.rate
        return min(_MOST, self._prior) if self._others and abs(own - self._prior) <= _UNLIKE else own

    @property
    def hoped(self) -> float:
        """Upper estimate: one standard error above the measured acceptance."""
        rate = self.rate
        return min(_MOST, rate + math.sqrt(rate * (1.0 - rate) / (self._tested + self._fading)))

    @property
    def _fading(self) -> float:
        """Weight of other devices in tokens; it falls as own measurements grow."""
        return self._prior_tokens * max(0.0, 1.0 - self._tested / _TESTED_HORIZON)


@dataclass(slots=True)
class Confidence:
    """Acceptance of a token by the probability that the draft model gave it.

    How far a draft model's own probabilities can be trusted differs between models, so it is counted.
    """

    _tested: list[float] = field(default_factory=lambda: [0.0] * (len(_SURE) + 1))
    _accepted: list[float] = field(default_factory=lambda: [0.0] * (len(_SURE) + 1))

    def add(self, chance: float, *, accepted: bool) -> None:
        place, kept = bisect(_SURE, chance), 1.0 - 1.0 / _TESTED_HORIZON
        self._tested[place] = kept * self._tested[place] + 1.0
        self._accepted[place] = kept * self._accepted[place] + accepted

    def rate(self, chance: float, *, overall: float) -> float:
        """Return the acceptance of a token of this probability; `overall` is that of any token."""
        place = bisect(_SURE, chance)
        return (self._accepted[place] + _SHARED_TOKENS * overall) / (self._tested[place] + _SHARED_TOKENS)


@dataclass(slots=True)
class Trend:
    """A time that may grow with the draft length: least squares with forgetting, slope never negative."""

    _weight: float = 0.0
    _tokens: float = 0.0
    _seconds: float = 0.0
    _tokens_tokens: float = 0.0
    _tokens_seconds: float = 0.0
    _doubted: bool = False

    def add(self, seconds: float, *, tokens: int = 0) -> None:
        """Record a measurement unless it is empty or an outlier."""
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
        """Return a trend with the same expectation and little weight, so that new measurements replace it soon."""
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
        return self._weight > 0.0

    @property
    def slope(self) -> float:
        """Seconds per token; 0 while drafts do not differ in length."""
        if not self.known:
            return 0.0
        together = self._tokens_seconds / self._weight - self._mean_tokens * self._mean
        # The time without tokens is a time too: the line must not cross zero before it.
        steepest = self._mean / self._mean_tokens if self._mean_tokens else 0.0
        return min(max(0.0, together / (self._spread + _STIFFNESS)), steepest)

    def from_start(self, seconds: float) -> tuple[float, float]:
        """Return the time without tokens, and the slope from there to the mean.

        Drafts of similar length leave open how much of their time is due to their tokens: anything from nothing to the
        full
        time divided by the number of tokens.

        Args:
            seconds: Time without tokens, known from elsewhere; the nearest possible value is used.
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
        """Return the time without tokens for a given slope, and the slope; less where that time would be negative."""
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
    """Measured times of one way of drafting.

    The two ways are separate: drafting ahead may take power or bandwidth from the verification.

    Attributes:
        token: To draft a token.
        beside: From sending to the verdict, without step and queue.
        queue: Waiting time before the edge's step.
        compute: The edge's step.
    """

    token: Trend = field(default_factory=Trend)
    beside: Trend = field(default_factory=Trend)
    queue: Trend = field(default_factory=Trend)
    compute: Trend = field(default_factory=Trend)

    def faded(self) -> "Times":
        """Return the same expectations with little weight."""
        return Times(self.token.faded(), self.beside.faded(), self.queue.faded(), self.compute.faded())

    def at_least(self, other: "Times") -> "Times":
        """Return the longer time of each pair."""
        return Times(
            max(self.token, other.token, key=_typical),
            max(self.beside, other.beside, key=_typical),
            max(self.queue, other.queue, key=_typical),
            max(self.compute, other.compute, key=_typical),
        )

    def at_most(self, other: "Times") -> "Times":
        """Return the shorter time of each pair."""
        return Times(
            min(self.token, other.token, key=_typical),
            min(self.beside, other.beside, key=_typical),
            min(self.queue, other.queue, key=_typical),
            min(self.compute, other.compute, key=_typical),
        )


def _typical(trend: Trend) -> float:
    return trend.at(_TYPICAL)

"""Estimates: the throughput of a plan, and the acceptance and times that it is computed from.

A draft token is accepted with probability a. A draft of n tokens commits (1 - a^(n+1)) / (1 - a) tokens on average,
including the correction or bonus token. Divided by the mean time this gives the rate.

- Waiting for each verdict: n = g; drafting takes g·t and the answer R(g). After a draft that is accepted whole the
  draft model reads two tokens, its last one and the bonus token, which adds a^g·t.
- Drafting ahead: a cycle ends with the first draft that has a rejection, draft k with probability
  a^(g(k-1))·(1 - a^g), or with draft N, which is waited for because the window is full. Without rejections the course
  is fixed: draft k is sent at k·g·t, enters the step after the present one with all that were sent until then, and its
  verdict arrives at v(k). The mean time of a cycle is the sum of P(k)·v(k). The device notices a verdict half a token
  late. If verdicts arrive before the window is full, N is infinite.

If the edge has other requests, a plan is rated as if all of them used it: see `SharedSteps`.
"""

import math
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from fleet_device.pacing.contract import Plan, SharedSteps

_FOLLOWED: Final = 16
"""Drafts of a cycle whose verdicts are computed one by one; later ones keep the last distance."""

_ROUNDS: Final = 3
"""Iterations to find how many requests are in a step, since each depends on the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """Conditions of drafting.

    Attributes:
        acceptance: Probability that a draft token is accepted if those before it are; below 1.
        beside_s: Time from an empty draft to its verdict without the edge's step, and with shared steps without the
            queue; above 0.
        beside_token_s: Further time per draft token.
        compute_s: Time of the edge's step for an empty draft.
        compute_token_s: Further step time per draft token.
        wait_s: Time from the arrival of a draft to the start of its step.
        shared: Step times with other requests; then `compute_s` is not used.
    """

    acceptance: float
    token_s: float
    beside_s: float
    beside_token_s: float = 0.0
    compute_s: float = 0.0
    compute_token_s: float = 0.0
    wait_s: float = 0.0
    window: int = 1
    shared: SharedSteps | None = None

    def rate(self, plan: Plan) -> float:
        committed, seconds = self.cycle(plan)
        return committed / seconds

    def answer_s(self, tokens: int) -> float:
        if self.shared is not None:
            return self._alike(Plan(tokens)).answer_s(tokens)
        return self.beside_s + tokens * self.beside_token_s + self.wait_s + self._step_s(tokens)

    def more_s(self, plan: Plan) -> float:
        tokens = plan.tokens
        return self.token_s + self.answer_s(tokens + 1) - self.answer_s(tokens)

    def cycle(self, plan: Plan) -> tuple[float, float]:
        if self.shared is not None:
            return self._alike(plan).cycle(plan)
        if plan.ahead and plan.tokens:
            return self._ahead(plan.tokens)
        return self._committed(plan.tokens), self._draft_s(plan.tokens) + self.answer_s(plan.tokens)

    def drafting(self, plan: Plan) -> tuple[float, float]:
        """Return how long the draft model computes in a cycle, and how many drafts it makes."""
        if not plan.ahead or not plan.tokens:
            return self._draft_s(plan.tokens), 1.0
        draft_s = plan.tokens * self.token_s
        drafting_s = min(self.cycle(plan)[1], self.window * draft_s)
        return drafting_s, max(1.0, drafting_s / draft_s) if draft_s else float(self.window)

    def _alike(self, plan: Plan) -> "Conditions":
        shared, tokens = self.shared, plan.tokens
        assert shared is not None
        outside_s = self._draft_s(tokens) + self.beside_s + tokens * self.beside_token_s
        if not plan.ahead or not tokens:
            # The last draft follows a bonus token, which the draft model has to read as well.
            last_s = self.token_s * (1.0 - self.acceptance**tokens) if tokens else 0.0
            step_s, wait_s = shared.waiting_s(tokens, outside_s=outside_s, last_s=last_s)
            return self._in_steps(step_s, wait_s=wait_s)
        present = 1.0
        for last in reversed(range(_ROUNDS)):
            step_s = shared.ahead_s(tokens, token_s=self.token_s, window=self.window, present=present)
            own = self._in_steps(step_s, wait_s=step_s / 2)
            if last:
                _, cycle_s = own.cycle(plan)
                present = max(0.0, 1.0 - (outside_s + own.wait_s) / cycle_s)
        return own

    def _in_steps(self, step_s: float, *, wait_s: float) -> "Conditions":
        return replace(self, wait_s=wait_s, compute_s=step_s, compute_token_s=0.0, shared=None)

    def _draft_s(self, tokens: int) -> float:
        return (tokens + self.acceptance**tokens) * self.token_s if tokens else 0.0

    def _ahead(self, tokens: int) -> tuple[float, float]:
        accepted, late_s = self.acceptance**tokens, self.token_s / 2
        verdicts, full = self._verdicts(tokens)
        drafting_s = len(verdicts) * tokens * self.token_s if full else float("inf")
        cycle_s, reached = 0.0, 1.0
        for verdict_s in verdicts:
            cycle_s += reached * (1.0 - accepted) * (verdict_s + (late_s if verdict_s < drafting_s else 0.0))
            reached *= accepted
        if full:
            cycle_s += reached * (verdicts[-1] + self.token_s)
            return self._committed(tokens * len(verdicts)), cycle_s
        distance_s = (verdicts[-1] - verdicts[0]) / (len(verdicts) - 1)
        cycle_s += reached * (verdicts[-1] + late_s + distance_s / (1.0 - accepted))
        return 1.0 / (1.0 - self.acceptance), cycle_s

    def _verdicts(self, tokens: int) -> tuple[list[float], bool]:
        """Return the verdicts' arrival times without rejections, and whether a full window waits for the last."""
        verdicts: list[float] = []
        ended_s = 0.0  # when the last step ended
        while len(verdicts) < _FOLLOWED:
            sent_s = (len(verdicts) + 1) * tokens * self.token_s
            begin_s = max(sent_s, ended_s) if verdicts else sent_s + self.wait_s
            # All that is sent until then is in the step, and makes it longer.
            drafts = 1 + int((begin_s - sent_s) / (tokens * self.token_s)) if self.token_s else self.window
            drafts = min(drafts, self.window)
            ended_s = begin_s + self._step_s(drafts * tokens)
            for _ in range(drafts):
                verdicts.append(ended_s + self.beside_s + tokens * self.beside_token_s)
                if len(verdicts) >= self.window and verdicts[-self.window] + self.token_s / 2 > sent_s:
                    return verdicts, True
                sent_s += tokens * self.token_s
        return verdicts, False

    def _committed(self, tokens: float) -> float:
        missed: float = self.acceptance ** (tokens + 1)
        return (1.0 - missed) / (1.0 - self.acceptance)

    def _step_s(self, tokens: int) -> float:
        return self.compute_s + tokens * self.compute_token_s


_HORIZON: Final = 32
"""Number of times that are remembered, roughly."""

_WILD: Final = 4.0
"""A time that exceeds the expected one by this factor is an outlier unless the next one confirms it."""

_LONGEST_S: Final = 3600.0

_STIFFNESS: Final = 2.0
"""Variance of draft lengths (tokens²) at which a slope counts half: with less it may be noise."""

_FADED: Final = 2.0
"""Weight of an expectation, in measurements."""

_TYPICAL: Final = 4
"""Draft length at which two trends are compared."""

_TESTED_HORIZON: Final = 128
"""Number of tested tokens that are remembered, roughly."""

_LATELY: Final = 32
"""Number of tested tokens that count as the latest, roughly."""

_SURPRISE: Final = 2.5
"""Standard deviations by which the latest tokens differ from all where acceptance has changed."""

_SURE: Final = (0.1, 0.25, 0.4, 0.6, 0.8, 0.95)
"""Bounds of the classes of draft-model probability in which acceptance is counted."""

_SHARED_TOKENS: Final = 4.0
"""Weight of the overall acceptance in each class, in tested tokens."""

_PRIOR: Final = 0.7
_PRIOR_TOKENS: Final = 3.0
_TOLD_TOKENS: Final = 16.0
"""Weight of the acceptance that an edge reports for this draft model, in tested tokens."""

_UNLIKE: Final = 0.15
"""Difference from the reported acceptance from which a device uses only its own."""

_MOST: Final = 0.995


@dataclass(slots=True)
class AcceptanceEstimate:
    """Acceptance of draft tokens.

    It differs between requests and within one. So the latest tokens are counted separately from all remembered ones;
    where the two differ by more than chance, only the latest count. With few measurements, the acceptance of other
    devices counts as well.
    """

    _prior: float = _PRIOR
    _prior_tokens: float = _PRIOR_TOKENS
    _others: bool = False  # whether an edge has reported theirs
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

    def note_reported(self, rate: float) -> None:
        self._prior, self._prior_tokens, self._others = rate, _TOLD_TOKENS, True

    @property
    def _changed(self) -> bool:
        if self._lately_tested < _LATELY / 2:
            return False
        rate = self._accepted / self._tested
        # Near 0 or 1 the variance is not taken below that of one token.
        deviation = math.sqrt(max(rate * (1.0 - rate), 1.0 / _LATELY) / self._lately_tested)
        return abs(self._lately_accepted / self._lately_tested - rate) > _SURPRISE * deviation

    @property
    def rate(self) -> float:
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

    def faded(self, factor: float = 1.0, *, weight: float = _FADED) -> "Trend":
        """Return a trend with the same expectation and little weight, so that new measurements replace it soon."""
        left = min(1.0, weight / self._weight) if self.known else 0.0
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
        # The time without tokens must not be negative.
        steepest = self._mean / self._mean_tokens if self._mean_tokens else 0.0
        return min(max(0.0, together / (self._spread + _STIFFNESS)), steepest)

    def from_start(self, seconds: float) -> tuple[float, float]:
        """Return the time without tokens, and the slope from there to the mean.

        Drafts of similar length leave open how much of their time is due to their tokens: anything from nothing to the
        full time divided by the number of tokens. So `seconds`, known from elsewhere, decides as far as it is possible.
        """
        most = max(0.0, self.at(0))  # it is negative only by rounding
        if not self.known or not self._mean_tokens:
            return most, self.slope
        unknown = _STIFFNESS / (self._spread + _STIFFNESS)
        each = self._mean / (1.0 + self._mean_tokens)
        least = self._mean - self._mean_tokens * (self.slope + unknown * max(0.0, each - self.slope))
        start = min(most, max(least, seconds))
        return start, (self._mean - start) / self._mean_tokens

    def at(self, tokens: int) -> float:
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
    """Measured times of one way of drafting; the other may take power or bandwidth from the verification.

    `beside` is the time from sending to the verdict without step and queue.
    """

    token: Trend = field(default_factory=Trend)
    beside: Trend = field(default_factory=Trend)
    queue: Trend = field(default_factory=Trend)
    compute: Trend = field(default_factory=Trend)

    def faded(self, weight: float = _FADED) -> "Times":
        return Times(*(trend.faded(weight=weight) for trend in (self.token, self.beside, self.queue, self.compute)))

    def choose(self, best: Callable[..., Trend], other: "Times") -> "Times":
        pairs = ((self.token, other.token), (self.beside, other.beside), (self.queue, other.queue))
        return Times(*(best(pair, key=_typical) for pair in (*pairs, (self.compute, other.compute))))


def _typical(trend: Trend) -> float:
    return trend.at(_TYPICAL)

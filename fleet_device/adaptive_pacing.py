"""Adaptive pacing: drafts as long as pays, and goes on before the verdict if that pays, by what has been measured.

It has neither clock nor randomness of its own: the same lessons lead to the same plans.
"""

from dataclasses import dataclass, field
from typing import Final

from fleet_device.estimates import Acceptance, Trend
from fleet_device.pacing import FixedPacing, Lesson, Pacing, Plan
from fleet_device.throughput import Conditions

__all__ = ["AdaptivePacing", "best_plan", "pacing_for"]

_FIRST: Final = 4
"""Draft length before anything has been measured."""

_LESSONS: Final = 3
"""Lessons with an answer time, before they are acted on."""

_LONGEST: Final = 16
_WORTH: Final = 0.98
"""A plan nearly as good as the best will do if it is shorter or waits: others share the edge."""

_STAY: Final = 1.01
"""By how much the last plan is favoured, so that noise does not change it."""

_EXPLORE: Final = 16
"""Every so many plans the draft is a token longer or shorter, so that what depends on its length shows."""

_INSTANT_S: Final = 1e-6


@dataclass(slots=True)
class AdaptivePacing:
    """Maximises committed tokens a second.

    Attributes:
        ahead: Whether to draft ahead of the verdict; None leaves it open.
    """

    ahead: bool | None = None
    _acceptance: Acceptance = field(default_factory=Acceptance)
    _token: Trend = field(default_factory=Trend)
    _answer: Trend = field(default_factory=Trend)
    _compute: Trend = field(default_factory=Trend)
    _last: Plan | None = None
    _plans: int = 0
    _lessons: int = 0
    _bonus: bool = False  # the draft before stood whole, and the edge drew a token after it
    _alone: bool = True  # no draft was under way when the next one to be learnt of was sent

    def plan(self, *, longest: int, window: int) -> Plan:
        """Return the best plan; now and then one token beside it."""
        longest = min(longest, _LONGEST)
        self._plans += 1
        if self._lessons < _LESSONS:
            return Plan(min(_FIRST, longest), self.ahead or False)
        best = best_plan(self.conditions(window), longest=longest, ahead=self.ahead, last=self._last)
        self._last = best
        if self._plans % _EXPLORE:
            return best
        step = 1 if self._plans // _EXPLORE % 2 else -1
        return Plan(max(int(best.ahead), min(longest, best.tokens + step)), best.ahead)

    def learn(self, lesson: Lesson) -> None:
        """Take note of a verdict."""
        self._acceptance.add(tested=lesson.tested, accepted=lesson.accepted)
        if not lesson.opening:
            if lesson.tokens:
                # Behind a bonus token the draft model has that one to read as well.
                self._token.add(lesson.token_s * lesson.tokens / (lesson.tokens + self._bonus))
            if self._alone:
                self._lessons += 1
                # Who goes on drafting looks for verdicts between tokens, on average half a token late.
                late_s = self._token.at(0) / 2 if lesson.ahead else 0.0
                self._answer.add(max(0.0, lesson.answer_s - late_s), tokens=lesson.tokens)
            self._compute.add(lesson.compute_s)
        stands = lesson.accepted == lesson.tokens
        self._bonus = stands and not lesson.ahead
        self._alone = not (stands and lesson.ahead)

    def conditions(self, window: int) -> Conditions:
        """Return what has been measured, as it matters under a window."""
        return Conditions(
            acceptance=self._acceptance.rate,
            token_s=self._token.at(0),
            answer_s=max(_INSTANT_S, self._answer.at(0)),
            answer_token_s=self._answer.slope,
            compute_s=self._compute.at(0),
            window=window,
        )


def best_plan(conditions: Conditions, *, longest: int, ahead: bool | None = None, last: Plan | None = None) -> Plan:
    """Return the plan to follow under conditions that are known.

    Args:
        conditions: What has been measured.
        longest: Most tokens of a draft.
        ahead: Whether to draft ahead of the verdict; None leaves it open.
        last: The plan followed so far.
    """
    going_on = [] if ahead is False else [Plan(tokens, ahead=True) for tokens in range(1, longest + 1)]
    waiting = [] if ahead and going_on else [Plan(tokens) for tokens in range(longest + 1)]
    rates = {plan: conditions.rate(plan) * (_STAY if plan == last else 1.0) for plan in (*waiting, *going_on)}
    enough = _WORTH * max(rates.values())
    # Those that wait come first, and the shortest of each kind.
    return next(plan for plan, rate in rates.items() if rate >= enough)


def pacing_for(draft_length: int | None, *, ahead: bool | None) -> Pacing:
    """Return the pacing that leaves open what is None; a fixed length with `ahead` left open waits."""
    if draft_length is None:
        return AdaptivePacing(ahead=ahead)
    return FixedPacing(draft_length, ahead or False)

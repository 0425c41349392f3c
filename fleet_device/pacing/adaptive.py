"""Adaptive pacing: drafts as long as pays, and drafts ahead of the verdict if that pays, by what has been measured.

It has neither clock nor randomness of its own: the same outcomes lead to the same plans.
"""

from dataclasses import dataclass, field
from typing import Final

from fleet_device.pacing.contract import DraftOutcome, Plan
from fleet_device.pacing.estimates import Acceptance, Times
from fleet_device.pacing.throughput import Conditions

__all__ = ["AdaptivePacing", "best_plan"]

_FIRST: Final = 4
"""Draft length before anything has been measured."""

_OUTCOMES: Final = 3
"""Outcomes with an answer time, before they are acted on."""

_LONGEST: Final = 16
_WORTH: Final = 0.98
"""A plan nearly as good as the best will do if it is shorter or waits: others share the edge."""

_STAY: Final = 1.01
"""By how much the last plan is favoured, so that noise does not change it."""

_UNTRIED: Final = 0.95
"""What a plan to draft ahead counts for before that was tried: it may slow down what it was reckoned with."""

_EXPLORE: Final = 16
"""Every so many plans one is tried that is not thought the best, so that what would speak for it shows."""

_TURN: Final = 8
"""Every so many trials it is the other way of drafting; rarely, since whoever turns to waiting waits."""

_INSTANT_S: Final = 1e-6


@dataclass(slots=True)
class AdaptivePacing:
    """Maximises committed tokens a second.

    Attributes:
        ahead: Whether to draft ahead of the verdict; None leaves it open.
    """

    ahead: bool | None = None
    _acceptance: Acceptance = field(default_factory=Acceptance)
    _times: dict[bool, Times] = field(default_factory=dict)  # by whether the draft was made ahead
    _way: bool | None = None  # of the last outcome
    _last: Plan | None = None
    _plans: int = 0
    _outcomes: int = 0
    _bonus: bool = False  # the draft before stood whole, and the edge drew a token after it
    _alone: bool = True  # no draft was under way when the next one to be learnt of was sent

    def plan(self, *, longest: int, window: int) -> Plan:
        """Return the best plan; now and then another one."""
        longest = min(longest, _LONGEST)
        self._plans += 1
        if self._outcomes < _OUTCOMES:
            return Plan(min(_FIRST, longest), self.ahead or False)
        waiting, drafting_ahead = (self.conditions(window, ahead=ahead) for ahead in (False, True))
        best = best_plan(
            waiting,
            drafting_ahead,
            longest=longest,
            ahead=self.ahead,
            last=self._last,
            trust=1.0 if True in self._times else _UNTRIED,
        )
        self._last = best
        trial, between = divmod(self._plans, _EXPLORE)
        if between:
            return best
        if self.ahead is None and trial % _TURN == 0:
            return best_plan(waiting, drafting_ahead, longest=longest, ahead=not best.ahead)
        step = 1 if trial % 2 else -1
        return Plan(max(int(best.ahead), min(longest, best.tokens + step)), best.ahead)

    def learn(self, outcome: DraftOutcome) -> None:
        """Take note of a verdict."""
        self._acceptance.add(tested=outcome.tested, accepted=outcome.accepted)
        if not outcome.opening:
            self._measure(outcome)
        stands = outcome.accepted == outcome.tokens
        self._bonus = stands and not outcome.ahead
        self._alone = not (stands and outcome.ahead)

    def conditions(self, window: int, *, ahead: bool = False) -> Conditions:
        """Return what has been measured.

        Args:
            window: Most drafts under way.
            ahead: While the device drafts ahead, or else while it waits.
        """
        times = self._expected(ahead=ahead)
        return Conditions(
            acceptance=self._acceptance.rate,
            token_s=times.token.at(0),
            beside_s=max(_INSTANT_S, times.beside.at(0)),
            beside_token_s=times.beside.slope,
            compute_s=max(0.0, times.compute.at(0)),
            compute_token_s=times.compute.slope,
            window=window,
        )

    def _expected(self, *, ahead: bool) -> Times:
        """Return what drafting one way would take now.

        What is known of the way not taken may be old; but who waits is answered no later than who drafts ahead.
        """
        own, other = self._times.get(ahead), self._times.get(not ahead)
        if own is None or other is None:
            return own or other or Times()
        if ahead is self._way:
            return own
        return own.at_least(other) if ahead else own.at_most(other)

    def _measure(self, outcome: DraftOutcome) -> None:
        if outcome.ahead is not self._way:
            # What was measured when it was last drafted this way may have changed since.
            self._times[outcome.ahead] = self._expected(ahead=outcome.ahead).faded()
            self._way = outcome.ahead
        times = self._times[outcome.ahead]
        if outcome.tokens:
            # Behind a bonus token the draft model has that one to read as well.
            times.token.add(outcome.token_s * outcome.tokens / (outcome.tokens + self._bonus))
        times.compute.add(outcome.compute_s, tokens=outcome.tokens)
        if self._alone:
            self._outcomes += 1
            # Who drafts ahead looks for verdicts between tokens, on average half a token late.
            late_s = times.token.at(0) / 2 if outcome.ahead else 0.0
            times.beside.add(max(0.0, outcome.answer_s - outcome.compute_s - late_s), tokens=outcome.tokens)


def best_plan(
    waiting: Conditions,
    drafting_ahead: Conditions,
    *,
    longest: int,
    ahead: bool | None = None,
    last: Plan | None = None,
    trust: float = 1.0,
) -> Plan:
    """Return the plan to follow.

    Args:
        waiting: The conditions while the device waits for each verdict.
        drafting_ahead: The conditions while it does not.
        longest: Most tokens of a draft.
        ahead: Whether to draft ahead of the verdict; None leaves it open.
        last: The plan followed so far.
        trust: What the rates of drafting ahead are multiplied by.
    """
    rates: dict[Plan, float] = {}
    if not ahead or not longest:
        rates |= {plan: waiting.rate(plan) for plan in map(Plan, range(longest + 1))}
    if ahead is not False:
        plans = (Plan(tokens, ahead=True) for tokens in range(1, longest + 1))
        rates |= {plan: trust * drafting_ahead.rate(plan) for plan in plans}
    if last in rates:
        rates[last] *= _STAY
    enough = _WORTH * max(rates.values())
    # Those that wait come first, and the shortest of each kind.
    return next(plan for plan, rate in rates.items() if rate >= enough)

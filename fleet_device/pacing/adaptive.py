"""Adaptive pacing: choose the plan with the highest measured throughput.

It has no clock and no randomness: equal outcomes lead to equal plans.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from fleet_device.drafters.contract import Prospect
from fleet_device.pacing.contract import EDGE_ONLY_TOKENS, Choice, DraftOutcome, FixedPacing, Pacing, Plan, SharedSteps
from fleet_device.pacing.estimates import AcceptanceEstimate, Conditions, Confidence, Times, Trend
from fleet_device.pacing.plans import (
    MOST_SLOWER,
    SPEED,
    STAY,
    SURELY,
    WORTH,
    Alternatives,
    Prices,
    best_plan,
    best_repetition,
    prices_of,
)
from fleet_device.settings import AUTO, NO_DRAFTER, DeviceSettings
from schemas.fields import EdgeLoad

_FIRST: Final = 4
"""Draft length before anything has been measured."""

_OUTCOMES: Final = 3
"""Outcomes with an answer time before they are acted on."""

_LONGEST: Final = 16
_UNTRIED: Final = 0.95
"""Discount on drafting ahead until it has been measured: it may slow down what its estimate is based on."""

_EXPLORE: Final = 16
"""One plan out of this many is an exploration."""

_TURN: Final = 8
"""One exploration out of this many tries the other drafting mode; rarely, since a device that waits loses time."""

_FIRST_EDGE_ONLY: Final = 1
_FIRST_EDGE_ONLY_TOKENS: Final = 8
"""Number of the first edge-only requests and their tokens: output starts at once, and the rate of edge-only decoding
becomes known."""

_EXPLORATION: Final = 0.015
"""Share of the time of edge-only decoding that trials of drafting may cost."""

_FEWEST_BETWEEN: Final = 64
"""Tokens of edge-only decoding between trials of drafting, at least."""

_COLD: Final = 4.0
"""Factor by which the first drafts may be too slow: code is compiled, files are read, other devices start as well."""

_OTHER_LOAD: Final = 2.0
"""The same where drafts were tried while the edge had other requests, or none, unlike now."""

_STALE: Final = 0.25
"""Weight, in measurements, of what a new trial of drafting replaces."""

_TRIAL: Final = 3
"""Drafts of a trial: one alone says little, since other programs may have slowed it down."""

_HOPELESS: Final = 0.6
"""Gain after its first drafts at which a trial ends early."""

_TRIAL_TOKENS: Final = 2
"""Draft length of a trial, at least: the first token includes reading what the edge has decoded, and is not timed."""

_STILL: Final = 1.0
"""As `SURELY`, of a device that drafts, alone at its edge: estimates vary by more than the difference between the two,
and each change costs a trial."""

_SETTLED: Final = 12
"""Plans with the same choice after which it is settled: where it is close, a trial of the other one is among them."""

_STRETCH: Final = 2
"""Limit of a draft that may end early, as a multiple of the length that pays on average."""

_LIKE: Final = 1.25
"""Times that differ by less are similar: few steps are no better known, and one more request makes as much."""

_INSTANT_S: Final = 1e-6


@dataclass(slots=True)
class AdaptivePacing:
    """Maximise the committed tokens per second of all requests at the edge, assuming that they use the same plan.

    `ahead` and `edge_only` are as in the settings; None for `auto`. During edge-only decoding, drafting is tried from
    time to time. With other `prices` than those of speed, the tokens per joule or byte are maximised.
    While `throttled` returns a sentence, the draft model rests.
    """

    ahead: bool | None = None
    edge_only: bool | None = False
    prices: Prices = SPEED
    throttled: Callable[[], str | None] = field(default=lambda: None, compare=False, repr=False)
    _acceptance: AcceptanceEstimate = field(default_factory=AcceptanceEstimate)
    _confidence: Confidence = field(default_factory=Confidence)
    _worth: float = 0.0  # chance of acceptance from which one more token pays
    _typical: int = _FIRST  # tokens of a draft that may end sooner
    _times: dict[bool, Times] = field(default_factory=dict)  # by whether the draft was made ahead
    _edge_only_token: Trend = field(default_factory=Trend)  # time between tokens of edge-only decoding
    _edge_only_step: Trend = field(default_factory=Trend)  # of the edge, meanwhile
    _piece: Trend = field(default_factory=Trend)  # tokens that arrive together in edge-only decoding
    _heat: str | None = None  # why the last plan has no drafts
    _way: bool | None = None  # of the last outcome
    _last: Plan | None = None
    _longest: int = _FIRST  # of the last plan
    _window: int = 1
    _plans: int = 0
    _untried: float = 0.0  # tokens of edge-only decoding since drafts were tried
    _doubt: float = _COLD  # factor by which drafts may have been too slow
    _tried_s: float = 0.0  # time of a token of edge-only decoding when drafts were tried
    _tried_alone: bool = True  # whether the edge had no other request then
    _trying: int = 0  # drafts left of a trial
    _outcomes: int = 0
    _steady: int = 0  # plans since the choice between drafting and edge-only decoding has changed
    _load: EdgeLoad = field(default_factory=lambda: EdgeLoad(requests=1))  # last report of the edge
    _shared: SharedSteps | None = None
    _bonus: bool = False  # the draft before was accepted whole, and the edge drew a bonus token
    _alone: bool = True  # no draft was in flight when the next one was sent

    def plan(self, *, longest: int, window: int) -> Plan:
        """Return the best plan, or from time to time another one to explore."""
        longest = self._longest = min(longest, _LONGEST)
        self._window = window
        self._plans += 1
        if (first := self._begin(longest)) is not None:
            return first
        waiting, drafting_ahead = (self.conditions(window, ahead=ahead) for ahead in (False, True))
        best_of = partial(
            best_plan, waiting, drafting_ahead, longest=longest, trust=self._trust, prices=self.prices,
            edge_only=self._edge_only_rate(),
        )  # fmt: skip
        best = best_of(ahead=self.ahead, last=self._last)
        quickest = best if self.prices is SPEED else best_of(ahead=self.ahead, prices=SPEED)
        fastest = self._rate_of(quickest, drafting_ahead if quickest.ahead else waiting)
        before = self._is_edge_only
        instead = self._instead(best, drafting_ahead if best.ahead else waiting, fastest=fastest)
        if instead is None:
            self._last = best
        self._steady = self._steady + 1 if self._is_edge_only is before else 0
        if instead is not None:
            return instead
        trial, between = divmod(self._plans, _EXPLORE)
        if between:
            # With other requests in the steps, all devices use one length.
            alike = best.ahead or self._shared is not None or self.prices is not SPEED
            return best if alike else self._stretched(best, waiting, longest=longest)
        if self.edge_only is None and trial % _TURN == _TURN // 2:
            return Plan(_FIRST_EDGE_ONLY_TOKENS, edge_only=True)
        if self.ahead is None and trial % _TURN == 0:
            return best_of(ahead=not best.ahead)
        step = 0 if self._shared is not None else 1 if trial % 2 else -1
        return Plan(max(int(best.ahead), min(longest, best.tokens + step)), best.ahead)

    def weigh(self, plan: Plan, prospect: Prospect, *, longest: int, window: int) -> Plan:
        """Return the better of a plan and suffix drafts, once there are measurements."""
        if self._outcomes < _OUTCOMES or self.edge_only:
            return plan
        longest = min(longest, _LONGEST)
        waiting, ahead = (self.conditions(window, ahead=ahead) for ahead in (False, True))
        own = ahead if plan.ahead else waiting
        if prospect.alone and not plan.edge_only:
            plan, own = Plan(0), waiting  # the alternative
        if plan.edge_only:
            edge_only_s = self._edge_only_s()
            rate = 1.0 / edge_only_s if edge_only_s else float("inf")
        else:
            rate = own.rate(replace(plan, tokens=self._typical) if plan.may_stop else plan)
        return (
            best_repetition(
                prospect,
                waiting=None if self.ahead else waiting,
                drafting_ahead=None if self.ahead is False else ahead,
                longest=longest,
                rate=rate,
            )
            or plan
        )

    def goes_on(self, chances: Sequence[float]) -> bool:
        """Return whether one more draft token is worth its time.

        It is accepted only if all tokens before it are; tokens that the draft model was unsure of make that unlikely.
        """
        accepted = overall = self._acceptance.rate
        for chance in chances:
            accepted *= self._confidence.rate(chance, overall=overall)
        return accepted > self._worth

    def _stretched(self, best: Plan, conditions: Conditions, *, longest: int) -> Plan:
        """Lengthen the plan, and require of each further token the acceptance that pays for its time.

        One more token takes time on the device and at the edge. At the best average rate that time would yield rate ·
        time tokens, so that is the acceptance it needs.
        """
        if not best.tokens:
            return best
        self._typical = best.tokens
        self._worth = conditions.rate(best) * conditions.more_s(best)
        return Plan(min(longest, _STRETCH * best.tokens), may_stop=True)

    def learn(self, outcome: DraftOutcome) -> None:
        if not outcome.repeats:
            self._acceptance.add(tested=outcome.tested, accepted=outcome.accepted)
            for place, chance in enumerate(outcome.chances[: outcome.tested]):
                self._confidence.add(chance, accepted=place < outcome.accepted)
        if not outcome.opening:
            self._measure(outcome)
        whole = outcome.accepted == outcome.tokens
        self._bonus = whole and not outcome.ahead
        self._alone = not (whole and outcome.ahead)

    def learn_edge_only(self, tokens: int, seconds: float, *, step_s: float = 0.0) -> None:
        if tokens:
            self._edge_only_token.add(seconds / tokens)
            self._piece.add(tokens)
            if step_s:  # else it was repeated from memory, and says nothing about the present
                self._edge_only_step.add(step_s)

    def note_load(self, load: EdgeLoad) -> None:
        self._load, self._shared = load, SharedSteps.of(load)
        if load.acceptance is not None:
            self._acceptance.note_reported(load.acceptance)

    def choice(self) -> Choice:
        if self._heat:
            then = "it drafts one token at a time" if self.edge_only is False else "the device does not draft"
            return Choice(
                "draft" if self.edge_only is False else "edge-only", f"{self._heat} Until it has cooled, {then}."
            )
        first = Plan(_FIRST) if self.edge_only is False else Plan(_FIRST_EDGE_ONLY_TOKENS, edge_only=True)
        plan = self._last or first
        return Choice(plan.name, self._alternatives().reason(plan), settled=self._settled)

    def _alternatives(self) -> Alternatives:
        waiting, ahead = (
            (self.conditions(self._window, ahead=ahead) if self._outcomes else None) for ahead in (False, True)
        )
        rate = self._edge_only_rate() or None
        return Alternatives(
            waiting=None if self.ahead else waiting,
            drafting_ahead=None if self.ahead is False else ahead,
            edge_only=rate,
            edge_only_value=0.0 if rate is None else self.prices.edge_only_value(rate=rate, piece=self._piece.at(0)),
            longest=self._longest,
            trust=self._trust,
            prices=self.prices,
        )

    @property
    def _settled(self) -> bool:
        return self._outcomes >= _OUTCOMES and self._steady >= _SETTLED

    def _begin(self, longest: int) -> Plan | None:
        self._heat = self.throttled()
        if self._heat:
            return Plan(min(1, longest)) if self.edge_only is False else self._go_edge_only()
        if self.edge_only or (self.edge_only is None and self._plans <= _FIRST_EDGE_ONLY):
            return Plan(EDGE_ONLY_TOKENS if self.edge_only else _FIRST_EDGE_ONLY_TOKENS, edge_only=True)
        if self._outcomes < _OUTCOMES:
            return Plan(min(_FIRST, longest), self.ahead or False)
        return None

    def _instead(self, best: Plan, conditions: Conditions, *, fastest: float) -> Plan | None:
        """Return an edge-only plan if it is at least as good as `best`: it costs device and edge less.

        `fastest` is the rate of the fastest drafting plan.
        """
        if self.edge_only is not None or not self._edge_only_token.known:
            return None
        drafts = self._last is not None and not self._last.edge_only
        least = SURELY / WORTH * (STAY if self._is_edge_only else 1.0)
        if drafts and self._shared is None:
            least = _STILL
        if self._gain(best, conditions, fastest=fastest) > least:
            self._trying, self._doubt = 0, 1.0
            return None
        # The estimate of drafting is old or based on few tokens. An empty draft would teach nothing.
        trial = replace(best, tokens=min(self._longest, max(_TRIAL_TOKENS, best.tokens)))
        under = replace(conditions, acceptance=self._acceptance.hoped if self._shared is None else self._rate)
        # What has sped up edge-only decoding since the last trial may have sped up drafting as well.
        faster = self._tried_s / max(_INSTANT_S, self._edge_only_s())
        if (self._load.requests == 1) is not self._tried_alone:
            faster = max(faster, _OTHER_LOAD)
        if faster > _LIKE:
            self._steady = 0
        doubt = max(self._doubt, faster)
        hoped = doubt * self._gain(trial, under, fastest=fastest)
        if self._trying:
            self._trying -= 1
            if self._trying and hoped > _HOPELESS:
                return trial
            self._trying, self._doubt = 0, 1.0
        self._untried += EDGE_ONLY_TOKENS / 2
        if self._untried < max(_FEWEST_BETWEEN, self._cost(trial, under, hoped) / _EXPLORATION):
            return self._go_edge_only()
        self._untried, self._doubt, self._trying = 0.0, doubt, _TRIAL
        self._note_tried()
        self._times = {way: times.faded(_STALE) for way, times in self._times.items()}
        return trial

    def _cost(self, trial: Plan, conditions: Conditions, gain: float) -> float:
        """Return the tokens that edge-only decoding would yield in the time that a trial of this gain loses."""
        committed, _ = conditions.cycle(trial)
        change = conditions.beside_s / max(_INSTANT_S, self._edge_only_s())
        return change + _TRIAL * committed * max(0.0, 1.0 / max(_INSTANT_S, gain) - 1.0)

    def _gain(self, plan: Plan, conditions: Conditions, *, fastest: float) -> float:
        """Return how many times the value of edge-only decoding a drafting plan has."""
        rate = self._rate_of(plan, conditions)
        if self.prices is SPEED:
            return rate * self._edge_only_s()
        edge_only = self._edge_only_rate()
        if fastest > MOST_SLOWER * edge_only:
            return fastest / edge_only
        if edge_only > MOST_SLOWER * rate:
            return rate / edge_only
        value = self.prices.edge_only_value(rate=edge_only, piece=self._piece.at(0))
        return self.prices.value(conditions, plan, rate=rate) / value

    def _rate_of(self, plan: Plan, conditions: Conditions) -> float:
        return (self._trust if plan.ahead else 1.0) * conditions.rate(plan)

    def _go_edge_only(self) -> Plan:
        if not self._is_edge_only:
            self._begin_edge_only()
        self._last = Plan(EDGE_ONLY_TOKENS, edge_only=True)
        return self._last

    def conditions(self, window: int, *, ahead: bool = False) -> Conditions:
        times = self._expected(ahead=ahead)
        compute_s, compute_token_s = self._compute(times)
        if self._is_edge_only and self._edge_only_step.known and not self._has_no_other:
            # Use the edge's present step times, not those of the last verified draft.
            compute_s = self._edge_only_step.at(0)
        if ahead and (ahead not in self._times or self._is_edge_only):
            # Measured with drafts that have a bonus token, or edge-only: drafts ahead compute one token less.
            compute_s -= compute_token_s
        return Conditions(
            acceptance=self._rate,
            token_s=times.token.at(0),
            beside_s=max(_INSTANT_S, times.beside.at(0) + (0.0 if self._shared else times.queue.at(0))),
            beside_token_s=times.beside.slope,
            compute_s=max(0.0, compute_s),
            compute_token_s=compute_token_s,
            window=window,
            shared=self._shared,
        )

    @property
    def _trust(self) -> float:
        if self._shared is not None:
            return self._shared.trust
        return 1.0 if True in self._times else _UNTRIED

    @property
    def _rate(self) -> float:
        """Acceptance of a draft token; with shared steps, that of all devices with this draft model."""
        return self._acceptance.rate if self._shared is None else self._acceptance.common

    @property
    def _is_edge_only(self) -> bool:
        return self._last is not None and self._last.edge_only

    @property
    def _has_no_other(self) -> bool:
        """The edge has no other request.

        Then the time that drafts take beyond edge-only decoding is their own: on a CPU two rows may take twice the time
        of one, and each further row little.
        """
        return self._load.token_ms is not None and self._load.requests == 1

    def _begin_edge_only(self) -> None:
        """Let new measurements soon replace old expectations, of edge-only decoding and of later drafts."""
        self._note_tried()
        if measured := self._edge_only_token.at(0):
            self._edge_only_token = self._edge_only_token.faded(self._edge_only_s() / measured)
        self._edge_only_step = self._edge_only_step.faded(self._step_ratio())
        self._times = {way: times.faded() for way, times in self._times.items()}

    def _note_tried(self) -> None:
        self._tried_s, self._tried_alone = self._edge_only_s(), self._load.requests == 1

    def _step_ratio(self) -> float:
        then, now = (
            self._edge_only_step.at(0),
            self._compute(self._times[self._way])[0] if self._way in self._times else 0.0,
        )
        ratio = now / then if then > 0.0 and now > 0.0 else 1.0
        return 1.0 if self._has_no_other or 1.0 / _LIKE < ratio < _LIKE else ratio

    def _compute(self, times: Times) -> tuple[float, float]:
        """Return the edge's time for an empty draft and for each further token.

        The edge's report is best: it sees steps of all loads. Until it reports, what drafts of similar length leave
        open is estimated from edge-only steps, whose load is assumed to be unchanged unless drafts show otherwise.
        Otherwise drafts that are slow because of their own tokens would make edge-only decoding seem slow.
        """
        if self._load.token_ms is not None:
            return times.compute.with_slope(self._load.token_ms / 1e3)
        return times.compute.from_start(self._edge_only_step.at(0) if self._edge_only_step.known else float("inf"))

    def _edge_only_s(self) -> float:
        """Return the time per token of edge-only decoding now; 0 if it was never measured.

        While the device drafts, the measurement is old, so it is scaled by how the step time has changed. It is at most
        the time of an empty draft, which also commits a token and must also be requested.
        """
        measured = self._edge_only_token.at(0)
        if measured and self._shared is not None:
            return self._shared.writing_s
        if self._is_edge_only or self._way is None or not measured:
            return measured
        return min(measured * self._step_ratio(), self.conditions(self._window).answer_s(0))

    def _edge_only_rate(self) -> float:
        """Return the tokens/s of edge-only decoding; 0 if it is not allowed or was never measured."""
        if self.edge_only is False or not self._edge_only_token.known:
            return 0.0
        return 1.0 / max(_INSTANT_S, self._edge_only_s())

    def _expected(self, *, ahead: bool) -> Times:
        """Return the expected times of one way of drafting now.

        Measurements of the other way may be old; but a waiting device is answered no later than one that drafts ahead.
        """
        own, other = self._times.get(ahead), self._times.get(not ahead)
        if own is None or other is None:
            return own or other or Times()
        if ahead is self._way:
            return own
        return own.choose(max if ahead else min, other)

    def _measure(self, outcome: DraftOutcome) -> None:
        if outcome.ahead is not self._way:
            # The last measurements of this way may be outdated.
            self._times[outcome.ahead] = self._expected(ahead=outcome.ahead).faded()
            self._way = outcome.ahead
        times = self._times[outcome.ahead]
        if outcome.tokens and not outcome.repeats:
            # After a bonus token the draft model has to read that token as well.
            times.token.add(outcome.token_s * outcome.tokens / (outcome.tokens + self._bonus))
        times.compute.add(outcome.compute_s, tokens=outcome.tokens + outcome.chained)
        if self._alone:
            self._outcomes += 1
            # While drafting ahead, the device notices a verdict half a token late on average.
            late_s = times.token.at(0) / 2 if outcome.ahead else 0.0
            beside_s = outcome.answer_s - outcome.compute_s - outcome.queue_s - late_s
            times.beside.add(max(0.0, beside_s), tokens=outcome.tokens)
            times.queue.add(outcome.queue_s)


def make_pacing(settings: DeviceSettings, throttled: Callable[[], str | None] = lambda: None) -> Pacing:
    """Return the pacing that the settings ask for; `throttled` returns why the draft model has to rest."""
    ahead = None if settings.ahead == AUTO else settings.ahead
    if settings.edge_only is True or (settings.drafter == NO_DRAFTER and settings.edge_only == AUTO):
        return FixedPacing(EDGE_ONLY_TOKENS, edge_only=True)
    if settings.draft_length == AUTO:
        prices = prices_of(settings.goal, settings.power)
        return AdaptivePacing(ahead, None if settings.edge_only == AUTO else False, prices, throttled)
    return FixedPacing(settings.draft_length, ahead or False)

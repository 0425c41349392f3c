"""Adaptive pacing: choose the plan with the highest measured throughput.

It has no clock and no randomness: equal outcomes lead to equal plans.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from fleet_device.drafters.contract import Prospect
from fleet_device.pacing.contract import STREAMED, Choice, DraftOutcome, EdgeLoad, Plan
from fleet_device.pacing.estimates import Acceptance, Confidence, Times, Trend
from fleet_device.pacing.throughput import Conditions

_BETTER: Final = 1.1
"""By how much it must promise more: its chances are estimates, and a change of plans costs something."""

_MOST_ACCEPTED: Final = 0.995


def best_repetition(
    prospect: Prospect,
    *,
    waiting: Conditions | None,
    drafting_ahead: Conditions | None,
    longest: int,
    rate: float,
) -> Plan | None:
    """Return the best plan for suffix drafts, or None if it does not beat the present plan.

    A suffix token costs no time of the draft model, but the model reads it later if it drafts again. So such a token
    costs
    the look-up and that reading time, and its throughput is computed from the acceptance that suffix tokens have had.

    Args:
        prospect: What the suffix index expects of the next tokens.
        waiting: Conditions while the device waits for each verdict; None if it may not.
        drafting_ahead: Conditions while it drafts ahead; None if it may not.
        longest: Largest number of tokens of a draft.
        rate: Tokens per second of the present plan.
    """
    token_s = prospect.token_s + prospect.catch_up_s
    best, found = _BETTER * rate, None
    for ahead, conditions in ((False, waiting), (True, drafting_ahead)):
        if conditions is None or (ahead and conditions.window < 2):  # noqa: PLR2004 - one is waited for
            continue
        for tokens in range(1, min(longest, len(prospect.stands)) + 1):
            acceptance = min(_MOST_ACCEPTED, prospect.acceptance(tokens))
            own = replace(conditions, acceptance=acceptance, token_s=token_s)
            promised = own.rate(Plan(tokens, ahead=ahead))
            if promised > best:
                least = min(prospect.stands[tokens - 1], promised * own.more_s(Plan(tokens, ahead=ahead)))
                best, found = promised, Plan(tokens, ahead=ahead, repeats=True, least=least)
    return found


WORTH: Final = 0.98
"""A plan nearly as good as the best will do if it is shorter or waits: others share the edge."""

STAY: Final = 1.01
"""By how much the last plan is favoured, so that noise does not change it."""

_SHARED_LENGTHS: Final = (0, 1, 2, 4, 8, 16)
"""Draft lengths where other texts are in the edge's steps: of devices that are alike each chooses the same one, however
little they differ in what they have measured. Texts with equally many tokens are computed at once, and others not."""

_SHARED_STAY: Final = 1.05
_SHARED_WORTH: Final = 0.94
"""Likewise `STAY` and `WORTH`: whose plan differs from that of others slows down all, its own text too."""


def draft_lengths(conditions: Conditions, longest: int) -> Sequence[int]:
    """Return the draft lengths to consider, from 0 to `longest`."""
    if conditions.shared is None:
        return range(longest + 1)
    return [tokens for tokens in _SHARED_LENGTHS if tokens <= longest]


def best_plan(
    waiting: Conditions,
    drafting_ahead: Conditions,
    *,
    longest: int,
    ahead: bool | None = None,
    last: Plan | None = None,
    trust: float = 1.0,
) -> Plan:
    """Return the plan with the highest estimated rate; prefer a cheaper one that is nearly as good.

    Args:
        waiting: Conditions while the device waits for each verdict.
        drafting_ahead: Conditions while it drafts ahead.
        longest: Largest number of tokens of a draft.
        ahead: Whether to draft ahead; None leaves it open.
        last: The present plan.
        trust: Factor on the rates of drafting ahead.
    """
    rates: dict[Plan, float] = {}
    lengths = draft_lengths(waiting, longest)
    if not ahead or not longest:
        rates |= {plan: waiting.rate(plan) for plan in map(Plan, lengths)}
    if ahead is not False:
        plans = (Plan(tokens, ahead=True) for tokens in lengths if tokens)
        rates |= {plan: trust * drafting_ahead.rate(plan) for plan in plans}
    if last in rates:
        rates[last] *= STAY if waiting.shared is None else _SHARED_STAY
    enough = (WORTH if waiting.shared is None else _SHARED_WORTH) * max(rates.values())
    # Waiting plans come first, and the shortest of each kind.
    return next(plan for plan, rate in rates.items() if rate >= enough)


def explain(
    waiting: Conditions | None,
    drafting_ahead: Conditions | None,
    *,
    longest: int,
    streamed_s: float,
    trust: float = 1.0,
) -> str:
    """Describe the measurements and the estimated rate of each plan in a sentence.

    Args:
        waiting: Conditions while the device waits for each verdict; None if not allowed or not measured.
        drafting_ahead: Conditions while it drafts ahead; None likewise.
        longest: Largest number of tokens of a draft.
        streamed_s: Time per token of edge-only decoding; 0 if not allowed or not measured.
        trust: Factor on the rates of drafting ahead.
    """
    parts = []
    if streamed_s:
        parts.append(f"the edge by itself {1.0 / streamed_s:.1f} tokens/s")
    if waiting is not None:
        parts.append(_promise("drafting", {n: waiting.rate(Plan(n)) for n in draft_lengths(waiting, longest)}))
    if drafting_ahead is not None and longest:
        lengths = [n for n in draft_lengths(drafting_ahead, longest) if n]
        rates = {n: trust * drafting_ahead.rate(Plan(n, ahead=True)) for n in lengths}
        parts.append(_promise("drafting ahead", rates))
    if (known := waiting or drafting_ahead) is not None:
        more_ms = (known.compute_token_s + known.beside_token_s) * 1e3
        parts.append(
            f"acceptance {known.acceptance:.2f}, {known.token_s * 1e3:.1f} ms a draft token, "
            f"{known.answer_s(0) * 1e3:.0f} ms an answer and {more_ms:.1f} ms more for each token"
        )
        if known.shared is not None:
            parts.append(f"all of it as it would be if all {known.shared.texts} texts at the edge were written so")
    sentence = "; ".join(parts) or "nothing has been measured yet"
    return f"{sentence[:1].upper()}{sentence[1:]}."


def _promise(way: str, rates: Mapping[int, float]) -> str:
    tokens = max(rates, key=rates.__getitem__)
    return f"{way} {rates[tokens]:.1f} tokens/s with {tokens} a draft"


_FIRST: Final = 4
"""Draft length before anything has been measured."""

_OUTCOMES: Final = 3
"""Outcomes with an answer time, before they are acted on."""

_LONGEST: Final = 16
_UNTRIED: Final = 0.95
"""What a plan to draft ahead counts for before that was tried: it may slow down what it was reckoned with."""

_EXPLORE: Final = 16
"""Every so many plans one is tried that is not thought the best, so that what would speak for it shows."""

_TURN: Final = 8
"""Every so many trials it is the other way of drafting; rarely, since whoever turns to waiting waits."""

_FIRST_STREAMS: Final = 1
_FIRST_STREAMED: Final = 8
"""The first request to write, before anything has been measured, and its tokens: text comes, and its rate is known."""

_EXPLORE_STREAMING: Final = 4.0
"""Every so many requests to write drafts are tried instead, where they may well be as good."""

_LESS_OFTEN: Final = 1.5
"""By how much rarer trials become with each that has shown nothing better."""

_MOST_PATIENCE: Final = 24.0

_TRIAL: Final = 3
"""Drafts of a trial that may well be better than having the edge write: one tells little, and to turn costs time."""

_SURELY: Final = 1.07
"""By how much drafts must promise more than what the edge writes by itself: what they promise is reckoned, its pace was
measured; and where texts share steps, who drafts slows down all others."""

_STRETCH: Final = 2
"""How many times the draft length that pays on average a draft may have, where it may end sooner."""

_LIKE: Final = 1.25
"""Times that differ by less are alike: few steps tell no better, and one text more or less makes as much."""

_INSTANT_S: Final = 1e-6


@dataclass(slots=True)
class AdaptivePacing:
    """Maximise the committed tokens per second of all requests at the edge, assuming that they use the same plan.

    Attributes:
        ahead: Whether to draft ahead; None leaves it open.
        stream: Whether to use edge-only decoding; None leaves it open. While it does, drafts are only tried from time
            to
            time.
    """

    ahead: bool | None = None
    stream: bool | None = False
    _acceptance: Acceptance = field(default_factory=Acceptance)
    _confidence: Confidence = field(default_factory=Confidence)
    _worth: float = 0.0  # chance to stand from which one more token pays
    _typical: int = _FIRST  # tokens of a draft that may end sooner
    _times: dict[bool, Times] = field(default_factory=dict)  # by whether the draft was made ahead
    _streamed: Trend = field(default_factory=Trend)  # time between tokens that the edge writes by itself
    _stream_step: Trend = field(default_factory=Trend)  # of the edge, meanwhile
    _way: bool | None = None  # of the last outcome
    _last: Plan | None = None
    _longest: int = _FIRST  # of the last plan
    _window: int = 1
    _plans: int = 0
    _untried: float = _EXPLORE_STREAMING / 2  # requests to write since drafts were tried
    _patience: float = _EXPLORE_STREAMING  # requests between trials, where drafts may well be as good
    _trying: int = 0  # drafts left of a trial
    _outcomes: int = 0
    _load: EdgeLoad = field(default_factory=EdgeLoad)  # of the edge, as it said last
    _bonus: bool = False  # the draft before stood whole, and the edge drew a token after it
    _alone: bool = True  # no draft was under way when the next one to be learnt of was sent

    def plan(self, *, longest: int, window: int) -> Plan:
        """Return the best plan, or from time to time another one to explore."""
        longest = self._longest = min(longest, _LONGEST)
        self._window = window
        self._plans += 1
        if (first := self._begin(longest)) is not None:
            return first
        waiting, drafting_ahead = (self.conditions(window, ahead=ahead) for ahead in (False, True))
        best = best_plan(
            waiting,
            drafting_ahead,
            longest=longest,
            ahead=self.ahead,
            last=self._last,
            trust=self._trust,
        )
        if (streaming := self._instead(best, drafting_ahead if best.ahead else waiting)) is not None:
            return streaming
        self._last = best
        trial, between = divmod(self._plans, _EXPLORE)
        if between:
            # With other requests in the steps, all devices use one length.
            alike = best.ahead or self._load.shared is not None
            return best if alike else self._stretched(best, waiting, longest=longest)
        if self.stream is None and trial % _TURN == _TURN // 2:
            return Plan(_FIRST_STREAMED, stream=True)
        if self.ahead is None and trial % _TURN == 0:
            return best_plan(waiting, drafting_ahead, longest=longest, ahead=not best.ahead)
        step = 0 if self._load.shared is not None else 1 if trial % 2 else -1
        return Plan(max(int(best.ahead), min(longest, best.tokens + step)), best.ahead)

    def weigh(self, plan: Plan, prospect: Prospect, *, longest: int, window: int) -> Plan:
        """Return the better of a plan and suffix drafts, once there are measurements."""
        if self._outcomes < _OUTCOMES or self.stream:
            return plan
        longest = min(longest, _LONGEST)
        waiting, ahead = (self.conditions(window, ahead=ahead) for ahead in (False, True))
        own = ahead if plan.ahead else waiting
        if prospect.alone and not plan.stream:
            plan, own = Plan(0), waiting  # what is to be drafted else
        if plan.stream:
            streamed_s = self._streamed_s()
            rate = 1.0 / streamed_s if streamed_s else float("inf")
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
        stands = overall = self._acceptance.rate
        for chance in chances:
            stands *= self._confidence.rate(chance, overall=overall)
        return stands > self._worth

    def _stretched(self, best: Plan, conditions: Conditions, *, longest: int) -> Plan:
        """Lengthen the plan, and require of each further token the acceptance that pays for its time.

        One more token takes time on the device and at the edge. At the best average rate that time would yield rate ·
        time
        tokens, so that is the acceptance it needs.
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
        stands = outcome.accepted == outcome.tokens
        self._bonus = stands and not outcome.ahead
        self._alone = not (stands and outcome.ahead)

    def streamed(self, tokens: int, seconds: float, *, step_s: float = 0.0) -> None:
        if tokens:
            self._streamed.add(seconds / tokens)
            if step_s:  # else it was sent again, from memory: nothing is known of now
                self._stream_step.add(step_s)

    def note_load(self, load: EdgeLoad) -> None:
        self._load = load
        if load.acceptance is not None:
            self._acceptance.told(load.acceptance)

    def choice(self) -> Choice:
        """Return the present plan and the estimate of each alternative."""
        ways = (
            [self.conditions(self._window, ahead=ahead) for ahead in (False, True)] if self._outcomes else [None, None]
        )
        reason = explain(
            None if self.ahead else ways[0],
            None if self.ahead is False else ways[1],
            longest=self._longest,
            streamed_s=0.0 if self.stream is False else self._streamed_s(),
            trust=self._trust,
        )
        first = Plan(_FIRST) if self.stream is False else Plan(_FIRST_STREAMED, stream=True)
        return Choice((self._last or first).name, reason)

    def _begin(self, longest: int) -> Plan | None:
        """Return the plan to use before there are measurements; None if there are."""
        if self.stream or (self.stream is None and self._plans <= _FIRST_STREAMS):
            return Plan(STREAMED if self.stream else _FIRST_STREAMED, stream=True)
        if self._outcomes < _OUTCOMES:
            return Plan(min(_FIRST, longest), self.ahead or False)
        return None

    def _instead(self, best: Plan, conditions: Conditions) -> Plan | None:
        """Return an edge-only plan if it is at least as good as the best drafting plan: it costs device and edge less.

        Args:
            best: Best drafting plan.
            conditions: Conditions of that plan.
        """
        if self.stream is not None or not self._streamed.known:
            return None
        stay = STAY if self._last is not None and self._last.stream else 1.0
        trust = self._trust if best.ahead else 1.0
        if WORTH * trust * conditions.rate(best) * self._streamed_s() > stay * _SURELY:
            self._patience = _EXPLORE_STREAMING
            return None
        # The estimate of drafting is old or based on few tokens. Try it again, less often the less it promises, since a
        # change
        # of plan costs round trips. An empty draft would teach nothing.
        trial = best if best.tokens else replace(best, tokens=1)
        if self._trying:
            self._trying -= 1
            return trial
        self._untried += 1.0
        under = replace(conditions, acceptance=self._acceptance.hoped if self._load.shared is None else self._rate)
        hoped = trust * under.rate(trial) * self._streamed_s()
        if not self._writing:
            self._begin_writing()
        self._last = Plan(STREAMED, stream=True)
        if self._untried * hoped**4 < self._patience:
            return self._last
        self._untried, self._patience = 0.0, min(_MOST_PATIENCE, _LESS_OFTEN * self._patience)
        self._trying = _TRIAL - 1 if hoped > 1.0 else 0
        return trial

    def conditions(self, window: int, *, ahead: bool = False) -> Conditions:
        """Return the measured conditions.

        Args:
            window: Largest number of drafts in flight.
            ahead: Conditions of drafting ahead instead of waiting.
        """
        times = self._expected(ahead=ahead)
        compute_s, compute_token_s = self._compute(times)
        if self._writing and self._stream_step.known and not self._by_itself:
            # Use the edge's present step times, not those of the last verified draft.
            compute_s = self._stream_step.at(0)
        return Conditions(
            acceptance=self._rate,
            token_s=times.token.at(0),
            beside_s=max(_INSTANT_S, times.beside.at(0) + (0.0 if self._load.shared else times.queue.at(0))),
            beside_token_s=times.beside.slope,
            compute_s=max(0.0, compute_s),
            compute_token_s=compute_token_s,
            window=window,
            shared=self._load.shared,
        )

    @property
    def _trust(self) -> float:
        if self._load.shared is not None:
            return self._load.shared.trust
        return 1.0 if True in self._times else _UNTRIED

    @property
    def _rate(self) -> float:
        """Acceptance of a draft token; with shared steps, that of all devices with this draft model."""
        return self._acceptance.rate if self._load.shared is None else self._acceptance.common

    @property
    def _writing(self) -> bool:
        return self._last is not None and self._last.stream

    @property
    def _by_itself(self) -> bool:
        """Whether the edge has no other request.

        Then the time that drafts take beyond edge-only decoding is their own: on a CPU two rows may take twice the time
        of one,
        and each further row little.
        """
        return self._load.token_s is not None and self._load.alone

    def _begin_writing(self) -> None:
        """Let new measurements soon replace old expectations, of edge-only decoding and of later drafts."""
        if measured := self._streamed.at(0):
            self._streamed = self._streamed.faded(self._streamed_s() / measured)
        self._stream_step = self._stream_step.faded(self._step_ratio())
        self._times = {way: times.faded() for way, times in self._times.items()}

    def _step_ratio(self) -> float:
        """Return present step time ÷ step time of the last edge-only decoding; 1 if they are similar."""
        then, now = (
            self._stream_step.at(0),
            self._compute(self._times[self._way])[0] if self._way in self._times else 0.0,
        )
        ratio = now / then if then > 0.0 and now > 0.0 else 1.0
        return 1.0 if self._by_itself or 1.0 / _LIKE < ratio < _LIKE else ratio

    def _compute(self, times: Times) -> tuple[float, float]:
        """Return the edge's time for an empty draft and for each further token.

        The edge's report is best: it sees steps of all loads. Until it reports, what drafts of similar length leave
        open is
        estimated from edge-only steps, whose load is assumed to be unchanged unless drafts show otherwise. Otherwise
        drafts
        that are slow because of their own tokens would make edge-only decoding seem slow.
        """
        if self._load.token_s is not None:
            return times.compute.with_slope(self._load.token_s)
        return times.compute.from_start(self._stream_step.at(0) if self._stream_step.known else float("inf"))

    def _streamed_s(self) -> float:
        """Return the time per token of edge-only decoding now; 0 if it was never measured.

        While the device drafts, the measurement is old, so it is scaled by how the step time has changed. It is at most
        the
        time of an empty draft, which also commits a token and must also be requested.
        """
        measured = self._streamed.at(0)
        if measured and self._load.shared is not None:
            return self._load.shared.writing_s
        if self._writing or self._way is None or not measured:
            return measured
        return min(measured * self._step_ratio(), self.conditions(self._window).answer_s(0))

    def _expected(self, *, ahead: bool) -> Times:
        """Return the expected times of one way of drafting now.

        Measurements of the other way may be old; but a waiting device is answered no later than one that drafts ahead.
        """
        own, other = self._times.get(ahead), self._times.get(not ahead)
        if own is None or other is None:
            return own or other or Times()
        if ahead is self._way:
            return own
        return own.at_least(other) if ahead else own.at_most(other)

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

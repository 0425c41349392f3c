"""Compare plans by goal: cost per token, the best plan under measured conditions, and the reason in a sentence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from fleet_device.drafters.contract import Prospect
from fleet_device.pacing.contract import EDGE_ONLY_TOKENS, Plan
from fleet_device.pacing.estimates import Conditions
from fleet_device.settings import Goal, Power

MOST_SLOWER: Final = 2.0
"""With the goals energy and bytes a plan reaches at least half the tokens/s of the fastest one.

Edge-only decoding, which needs little energy, reached that share in nearly all measurements. What saves a little and is
slower still, such as drafts of sixteen tokens from a slow processor, nobody would want.
"""

MESSAGE_BYTES: Final = 250
"""Bytes of a message on the wire, without tokens, with acknowledgements and the headers of TLS, TCP and IP, as
`python -m benchmarks bytes` measures them."""

_TOKEN_BYTES: Final = 5  # of a draft token
_REJECTION_BYTES: Final = 100  # of the correction in a verdict, residual mode
RENEWED: Final = EDGE_ONLY_TOKENS / 2
"""Tokens of edge-only decoding after which the device requests more."""

_NOTHING: Final = 1e-12
"""Cost of a plan that costs nothing, so that its value is finite."""


@dataclass(frozen=True, slots=True)
class Prices:
    """Cost, by a goal, of a second, of a second in which the draft model computes (in addition), and of a byte."""

    second: float
    drafting: float
    byte: float
    unit: str

    def value(self, conditions: Conditions, plan: Plan, *, rate: float) -> float:
        """Return the tokens that a drafting plan commits per unit of the goal; `rate` is its tokens/s."""
        if self is SPEED:
            return rate
        committed, _ = conditions.cycle(plan)
        drafting_s, drafts = conditions.drafting(plan)
        rejected = 1.0 - conditions.acceptance**plan.tokens
        sent = drafts * (2 * MESSAGE_BYTES + plan.tokens * _TOKEN_BYTES) + rejected * _REJECTION_BYTES
        return self._value(rate, drafting_s / committed, sent / committed)

    def edge_only_value(self, *, rate: float, piece: float) -> float:
        """Return the same for edge-only decoding that arrives in pieces of a mean number of tokens."""
        if self is SPEED:
            return rate
        return self._value(rate, 0.0, MESSAGE_BYTES / max(1.0, piece) + MESSAGE_BYTES / RENEWED + _TOKEN_BYTES)

    def _value(self, rate: float, drafting_s: float, sent: float) -> float:
        if rate <= 0.0:
            return 0.0
        return 1.0 / (self.second / rate + self.drafting * drafting_s + self.byte * sent + _NOTHING)


SPEED: Final = Prices(1.0, 0.0, 0.0, "s")
_BYTES: Final = Prices(0.0, 0.0, 1.0, "bytes")


def prices_of(goal: Goal, power: Power) -> Prices:
    """Return the prices of a goal. Without figures, energy is the time in which the draft model computes."""
    if goal is Goal.SPEED:
        return SPEED
    if goal is Goal.BYTES:
        return _BYTES
    if not power.known:
        return Prices(0.0, 1.0, 0.0, "s of drafting")
    return Prices(power.idle_w, max(0.0, power.drafting_w - power.idle_w), power.joules_per_mb / 1e6, "J")


_BETTER: Final = 1.1
"""Factor by which suffix drafts must promise more: chances are estimates, and a change of plans has a cost."""

_MOST_ACCEPTED: Final = 0.995


def best_repetition(
    prospect: Prospect, *, waiting: Conditions | None, drafting_ahead: Conditions | None, longest: int, rate: float
) -> Plan | None:
    """Return the best plan for suffix drafts, or None if it does not beat the present plan's `rate`.

    A suffix token takes no time of the draft model, but the model reads it later if it drafts again. So it costs the
    look-up and that reading time, and its throughput is computed from the acceptance that suffix tokens have had.
    `waiting` and `drafting_ahead` are None if not allowed.
    """
    token_s = prospect.token_s + prospect.catch_up_s
    best, found = _BETTER * rate, None
    for ahead, conditions in ((False, waiting), (True, drafting_ahead)):
        if conditions is None or (ahead and conditions.window < 2):  # noqa: PLR2004 - one is waited for
            continue
        for tokens in range(1, min(longest, len(prospect.chances)) + 1):
            acceptance = min(_MOST_ACCEPTED, prospect.acceptance(tokens))
            own = replace(conditions, acceptance=acceptance, token_s=token_s)
            promised = own.rate(Plan(tokens, ahead=ahead))
            if promised > best:
                least = min(prospect.chances[tokens - 1], promised * own.more_s(Plan(tokens, ahead=ahead)))
                best, found = promised, Plan(tokens, ahead=ahead, repeats=True, least=least)
    return found


WORTH: Final = 0.98
"""Prefer a shorter or waiting plan that is within 2 % of the best: others share the edge."""

STAY: Final = 1.01
"""Factor in favour of the last plan, so that noise does not change it."""

SURELY: Final = 1.07
"""Factor by which drafting must promise more than edge-only decoding: the first is estimated, the second measured, and
with shared steps drafts slow down all other requests."""

_SHARED_LENGTHS: Final = (0, 1, 2, 4, 8, 16)
"""Draft lengths while other requests are in the edge's steps. Similar devices choose the same one despite small
differences in their measurements; the edge computes sequences with the same number of tokens together, and others
separately."""

_SHARED_STAY: Final = 1.05
_SHARED_WORTH: Final = 0.94
"""As `STAY` and `WORTH` with other requests: a plan that differs from theirs slows down all of them."""


def draft_lengths(conditions: Conditions, longest: int) -> Sequence[int]:
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
    prices: Prices = SPEED,
    edge_only: float = 0.0,
) -> Plan:
    """Return the drafting plan of the highest estimated value; prefer a shorter one that is nearly as good.

    `ahead` of None leaves open whether to draft ahead; `trust` is a factor on the rates of drafting ahead. Plans are
    left out that are `MOST_SLOWER` times slower than the fastest one or than `edge_only` (tokens/s, 0 if unknown).
    """
    lengths = draft_lengths(waiting, longest)
    rates: dict[Plan, float] = {}
    if not ahead or not longest:
        rates |= {plan: waiting.rate(plan) for plan in map(Plan, lengths)}
    if ahead is not False:
        plans = (Plan(tokens, ahead=True) for tokens in lengths if tokens)
        rates |= {plan: trust * drafting_ahead.rate(plan) for plan in plans}
    values = rates
    if prices is not SPEED:
        values = {
            plan: prices.value(drafting_ahead if plan.ahead else waiting, plan, rate=rate)
            for plan, rate in within(rates, edge_only=edge_only).items()
        }
    if last in values:
        values[last] *= STAY if waiting.shared is None else _SHARED_STAY
    enough = (WORTH if waiting.shared is None else _SHARED_WORTH) * max(values.values())
    # Waiting plans come first, and the shortest of each kind.
    return next(plan for plan, value in values.items() if value >= enough)


def within(rates: Mapping[Plan, float], *, edge_only: float = 0.0) -> dict[Plan, float]:
    """Return the plans that are not `MOST_SLOWER` times slower than the fastest; that one, if edge-only is faster."""
    fastest = max(rates.values())
    least = max(fastest, edge_only) / MOST_SLOWER
    return {plan: rate for plan, rate in rates.items() if rate >= min(least, fastest)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternatives:
    """What a choice between drafting and edge-only decoding is based on; None for what is not allowed or not measured.

    Attributes:
        edge_only: Rate of edge-only decoding, in tokens/s.
        edge_only_value: The same in tokens per unit of the goal.
        trust: Factor on the rates of drafting ahead.
    """

    waiting: Conditions | None = None
    drafting_ahead: Conditions | None = None
    edge_only: float | None = None
    edge_only_value: float = 0.0
    longest: int
    trust: float = 1.0
    prices: Prices = SPEED

    def reason(self, chosen: Plan) -> str:
        """Return the estimate of each way in a sentence, and what decides between them."""
        found = self._drafting()
        if found is None:
            if self.edge_only is None:
                return "Nothing has been measured yet."
            return f"The edge alone gives {_figure(self.edge_only)} tokens/s; drafting has not been measured yet."
        plan, conditions, rate, value = found
        way = "Drafting ahead" if plan.ahead else "Drafting"
        drafting = f"{_figure(rate)} tokens/s{self._cost(value)}"
        facts = (
            f"{_percent(conditions.acceptance)} of the draft tokens are accepted, and each takes "
            f"{_figure(conditions.token_s * 1e3)} ms"
        )
        if self.edge_only is None:
            return f"{way} gives {drafting}: {facts}."
        alone = f"{_figure(self.edge_only)}{self._cost(self.edge_only_value)}"
        if not chosen.edge_only:
            return f"{way} gives {drafting}, the edge alone would give {alone}: {facts}."
        cause = "drafts must gain 7 %, because they cost device and edge more"
        if value < self.edge_only_value:
            cause = self._cause(conditions)
        elif WORTH * value > STAY * SURELY * self.edge_only_value:
            cause = "this is known since the last plan, and the next one drafts"
        return f"{way} would give {drafting}, the edge alone {alone}: {cause}."

    def _drafting(self) -> tuple[Plan, Conditions, float, float] | None:
        """Return the drafting plan of the highest value, with its conditions, rate and value."""
        found: list[tuple[Plan, Conditions, float, float]] = []
        for conditions, factor in ((self.waiting, 1.0), (self.drafting_ahead, self.trust)):
            ahead = conditions is self.drafting_ahead
            if conditions is None:
                continue
            lengths = (tokens for tokens in draft_lengths(conditions, self.longest) if tokens)
            rates = {plan: factor * conditions.rate(plan) for plan in (Plan(n, ahead=ahead) for n in lengths)}
            if rates and self.prices is not SPEED:
                rates = within(rates, edge_only=self.edge_only or 0.0)
            found += [
                (plan, conditions, rate, self.prices.value(conditions, plan, rate=rate)) for plan, rate in rates.items()
            ]
        return max(found, key=lambda each: each[-1], default=None)

    def _cause(self, conditions: Conditions) -> str:
        """Return the bottleneck of drafting: the fact without which it would be fastest."""
        answer_ms = (conditions.beside_s + conditions.wait_s) * 1e3
        causes = {
            f"a draft token takes {_figure(conditions.token_s * 1e3)} ms here": replace(conditions, token_s=0.0),
            f"only {_percent(conditions.acceptance)} of the draft tokens are accepted": replace(
                conditions, acceptance=_MOST_ACCEPTED
            ),
            f"a draft and its verdict travel for {_figure(answer_ms)} ms": replace(
                conditions, beside_s=_INSTANT_S, beside_token_s=0.0
            ),
            f"each draft token lengthens the edge's step by {_figure(conditions.compute_token_s * 1e3)} ms": replace(
                conditions, compute_token_s=0.0
            ),
        }
        if conditions.shared is not None:
            causes[f"{conditions.shared.requests} requests share the edge's steps"] = replace(conditions, shared=None)

        def best(without: Conditions) -> float:
            return max(without.rate(Plan(tokens)) for tokens in range(1, max(1, self.longest) + 1))

        return max(causes, key=lambda cause: best(causes[cause]))

    def _cost(self, value: float) -> str:
        return "" if self.prices is SPEED or not value else f" at {1.0 / value:.2g} {self.prices.unit} a token"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 10.0 else f"{value:.1f}"  # noqa: PLR2004 - two digits are enough


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


_INSTANT_S: Final = 1e-6

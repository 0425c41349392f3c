"""Ranking of plans to draft: the best by what each promises, and of those nearly as good the one that costs least."""

from collections.abc import Sequence
from typing import Final

from fleet_device.pacing.contract import Plan
from fleet_device.pacing.throughput import Conditions

__all__ = ["STAY", "WORTH", "best_plan", "draft_lengths"]

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
    """Return the tokens that a draft may have under these conditions, none among them; `longest` at most."""
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
    lengths = draft_lengths(waiting, longest)
    if not ahead or not longest:
        rates |= {plan: waiting.rate(plan) for plan in map(Plan, lengths)}
    if ahead is not False:
        plans = (Plan(tokens, ahead=True) for tokens in lengths if tokens)
        rates |= {plan: trust * drafting_ahead.rate(plan) for plan in plans}
    if last in rates:
        rates[last] *= STAY if waiting.shared is None else _SHARED_STAY
    enough = (WORTH if waiting.shared is None else _SHARED_WORTH) * max(rates.values())
    # Those that wait come first, and the shortest of each kind.
    return next(plan for plan, rate in rates.items() if rate >= enough)

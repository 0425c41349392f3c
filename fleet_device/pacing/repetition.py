"""Drafting from earlier text: when it promises more than the draft model, or than the edge by itself, and how long.

What was written before costs no time of the draft model; but the model reads it later, if it drafts again. So a token
costs the time to look it up and the time to catch up, and with the chance to stand that such tokens have had, the
throughput that follows is worked out as for the model's own drafts.
"""

from dataclasses import replace
from typing import Final

from fleet_device.drafters.suffix.prospect import Prospect
from fleet_device.pacing.contract import Plan
from fleet_device.pacing.throughput import Conditions

__all__ = ["best_repetition"]

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
    """Return the best plan to draft from earlier text; None if it is no better than what is planned already.

    Args:
        prospect: What earlier text says of the next tokens.
        waiting: The conditions while the device waits for each verdict; None if it may not.
        drafting_ahead: The conditions while it does not; None likewise.
        longest: Most tokens of a draft.
        rate: What is planned already promises (tokens a second).
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

"""Goals of pacing: what a plan costs the device per token, in seconds, joules or bytes."""

from dataclasses import dataclass
from typing import Final

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

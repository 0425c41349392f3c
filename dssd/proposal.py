"""Proposal: the device's draw of one draft token."""

from dataclasses import dataclass

from dssd.counter_rng import Purpose, random_uniform
from dssd.coupling import coupled_token
from dssd.distribution import Dist
from dssd.quantized import QuantizedDist, draw_draft, quantize
from schemas.policy import Mode, SamplingPolicy

__all__ = ["Proposal", "propose"]


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """A drafted token.

    Attributes:
        token: Its id.
        count: 65,536 times the probability with which it was drawn; None in coupled mode.
        quantized: What it was drawn from, kept for the correction; None in coupled mode.
        chance: Probability of the token before quantization: how sure the draft model is. It is no part of the law.
        forced: Whether a grammar allows no other token there, so that no model was asked.
    """

    token: int
    count: int | None = None
    quantized: QuantizedDist | None = None
    chance: float = 1.0
    forced: bool = False


def propose(q: Dist, *, policy: SamplingPolicy, position: int) -> Proposal:
    """Draw a draft token from the draft model's shaped distribution."""
    if policy.mode is Mode.COUPLED:
        token = coupled_token(q, policy.seed, position)
        return Proposal(token, chance=q.probability(token))
    quantized = quantize(q)
    token, count = draw_draft(quantized, random_uniform(policy.seed, position, Purpose.DRAFT))
    return Proposal(token, count, quantized, q.probability(token))

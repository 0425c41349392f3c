"""Toy pair of the exactness proof: a target and a draft language whose laws are known in closed form."""

from dataclasses import dataclass
from typing import Final

from fleet_testing.markov import MarkovScript
from schemas.policy import Mode, SamplingPolicy

__all__ = ["END_TOKENS", "PROMPT", "ToyPair", "policy"]

PROMPT: Final = (1,)
END_TOKENS: Final = (0,)
"""Texts may end early, so that the law of the end is proved too."""

_SIZE: Final = 6


@dataclass(frozen=True, slots=True)
class ToyPair:
    """The two languages.

    Attributes:
        target: The law to follow.
        draft: A disturbed copy, accepted about two times in three.
    """

    target: MarkovScript
    draft: MarkovScript

    @classmethod
    def standard(cls) -> "ToyPair":
        """Return the pair of the proof."""
        target = MarkovScript(size=_SIZE, seed=7, sharpness=1.2, period=3)
        return cls(target, target.perturbed(seed=8, amount=1.5))


def policy(mode: Mode, seed: int) -> SamplingPolicy:
    """Return the proof's sampling policy: every step of the shaping takes effect."""
    return SamplingPolicy(mode=mode, temperature=0.8, top_k=5, top_p=0.93, seed=seed)

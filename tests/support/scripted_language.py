"""Language of the scripted edge, without the edge's dependencies."""

from collections.abc import Sequence
from typing import Final

from dssd.distribution import shape
from schemas.policy import SamplingPolicy
from tests.support.markov import MarkovScript, coupled_text

CONTEXT: Final = 4096
"""Most tokens in one sequence."""

LANGUAGE: Final = MarkovScript(size=1024, seed=9, sharpness=3.0, period=5)
"""The target's language, without an end token."""


def draft_language() -> MarkovScript:
    """Return the draft model's language: about three tokens in four are accepted."""
    return LANGUAGE.perturbed(seed=10, amount=0.7)


def reference_text(prompt: Sequence[int], policy: SamplingPolicy, length: int) -> list[int]:
    """Return the target's own output in coupled mode."""
    return coupled_text(LANGUAGE, prompt, policy, length)


def is_possible(prompt: Sequence[int], policy: SamplingPolicy, tokens: Sequence[int]) -> bool:
    """Return whether each token has a positive probability under the policy."""
    text = [*prompt, *tokens]
    first = len(prompt)
    return all(
        shape(LANGUAGE.logits(text[:end]), policy).probability(text[end]) > 0.0 for end in range(first, len(text))
    )

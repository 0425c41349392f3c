"""Language of the scripted edge, for whoever writes with it: a device need not load what the edge computes with."""

from collections.abc import Sequence
from typing import Final

from dssd.distribution import shape
from dssd.sampling import coupled_token
from schemas.policy import SamplingPolicy
from tests.support.markov import MarkovScript

CONTEXT: Final = 4096
"""Most tokens in one sequence."""

LANGUAGE: Final = MarkovScript(size=1024, seed=9, sharpness=3.0, period=5)
"""What the target writes. No token ends a text."""


def draft_language() -> MarkovScript:
    """Return what a draft model of it writes: three tokens in four, or so, are accepted."""
    return LANGUAGE.perturbed(seed=10, amount=0.7)


def reference_text(prompt: Sequence[int], policy: SamplingPolicy, length: int) -> list[int]:
    """Return the text that the seed and the target alone determine in coupled mode."""
    text = list(prompt)
    for position in range(length):
        text.append(coupled_token(shape(LANGUAGE.logits(text), policy), policy.seed, position))
    return text[len(prompt) :]


def is_possible(prompt: Sequence[int], policy: SamplingPolicy, tokens: Sequence[int]) -> bool:
    """Return whether each token of a text has a probability above zero, as the policy shapes it."""
    text = [*prompt, *tokens]
    first = len(prompt)
    return all(
        shape(LANGUAGE.logits(text[:end]), policy).probability(text[end]) > 0.0 for end in range(first, len(text))
    )

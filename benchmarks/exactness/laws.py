"""Laws that the proof of exactness holds texts against, early ends included."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from schemas.policy import Grammar, Mode
from tests.support.markov import MarkovScript
from tests.support.toy_grammar import joint_given_grammar
from tests.support.toy_pair import END_TOKENS, PROMPT, ToyPair, policy

Law = np.ndarray[Any, np.dtype[np.float64]]

LENGTH: Final = 3
"""Tokens of a text."""


def law(
    mode: Mode,
    pair: ToyPair | None = None,
    *,
    greedy: bool = False,
    prompt: Sequence[int] = PROMPT,
    grammar: Grammar | None = None,
) -> Law:
    """Return the joint law of a text, `[size] * LENGTH`.

    Args:
        mode: Of verification.
        pair: The languages; the standard ones by default.
        greedy: Whether the most likely token is taken.
        prompt: Of the text.
        grammar: The toy grammar, if the texts have it.
    """
    target = (pair or ToyPair.standard()).target
    if grammar is not None:
        assert isinstance(target, MarkovScript)
        given = policy(mode, 0, greedy=greedy, grammar=grammar)
        return joint_given_grammar(target, prompt, length=LENGTH, policy=given, end=END_TOKENS[0])
    return fold_ends(target.joint(prompt, length=LENGTH, policy=policy(mode, 0, greedy=greedy)), END_TOKENS)


def fold_ends(joint: Law, end_tokens: Sequence[int]) -> Law:
    """Return a joint law with early ends counted under their end token repeated."""
    length = joint.ndim
    for end in end_tokens:
        for position in range(length - 1):
            # All that would follow an end token falls together on one outcome.
            head = (slice(None),) * position + (end,)
            rest = tuple(range(position, length - 1))
            mass = joint[head].sum(axis=rest)
            joint[head] = 0.0
            joint[head + (end,) * (length - 1 - position)] = mass
    return joint

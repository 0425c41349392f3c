"""Toy grammar of the exactness proof: a finite language over the toy words, and the target distribution under it."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from sampling.distribution import Float
from schemas.policy import Grammar, GrammarKind, SamplingPolicy
from tests.support.markov import MarkovScript
from tests.support.reference import shaped

TEXTS: Final[tuple[tuple[int, ...], ...]] = (
    (1, 2), (1, 2, 4), (1, 3, 5), (1, 3, 4), (1, 5),
    (2, 3, 1), (2, 3, 4),
    (3,), (3, 5, 5, 2), (3, 1, 2, 2),
    (4, 5, 1, 1),
    (5, 4, 4), (5, 4, 2, 1), (5, 2),
)  # fmt: skip
"""All outputs of the grammar, without end tokens: some are prefixes of others, some have only one continuation."""


def _regex() -> str:
    return "|".join("".join(f"t{token} " for token in text) for text in TEXTS)


GRAMMAR: Final = Grammar(kind=GrammarKind.REGEX, text=_regex())
"""Over the words, each followed by a space, as devices encode them."""


def allowed(text: Sequence[int], *, end: int) -> list[int]:
    """Return the ids that may follow a prefix, from the list of all outputs; the matcher is tested against it."""
    begun = tuple(text)
    longer = {known[len(begun)] for known in TEXTS if len(known) > len(begun) and known[: len(begun)] == begun}
    return sorted(longer | ({end} if begun in TEXTS else set()))


def joint_by_prefix(
    language: MarkovScript, prefix: Sequence[int], *, length: int, policy: SamplingPolicy, end: int
) -> Float:
    """Return the joint distribution of the next tokens, `[size] * length`, with ends repeated.

    It follows every prefix, for policies whose grammar or penalties make p depend on all tokens before.
    """
    law = np.zeros((language.size,) * length)

    def walk(text: tuple[int, ...], mass: float) -> None:
        if len(text) == length or (text and text[-1] == end):
            law[text + text[-1:] * (length - len(text))] += mass
            return
        kept = None if policy.grammar is None else allowed(text, end=end)
        probs = shaped(language.logits([*prefix, *text]), policy.after(prefix, text, (end,)), allowed=kept)
        for token, chance in probs.items():
            walk((*text, token), mass * chance)

    walk((), 1.0)
    return law

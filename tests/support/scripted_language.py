"""Language of the scripted edge, without the edge's dependencies."""

from collections.abc import Sequence
from typing import Final

from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_device.drafters.without_model import ScriptedDrafter, WordCodec
from sampling.distribution import shape
from schemas.policy import SamplingPolicy
from tests.support.markov import MarkovScript, coupled_text

CONTEXT: Final = 4096
"""Most tokens in one sequence."""

LANGUAGE: Final = MarkovScript(size=1024, seed=9, sharpness=3.0, period=5)
"""The target's language, without an end token."""


LETTERS: Final = MarkovScript(size=96, seed=9, sharpness=3.0, period=5)
"""Language of single letters, and an end token: its generations can follow JSON schemas."""

LETTER_WORDS: Final = (*map(chr, range(32, 127)), "end")
LETTER_END: Final = (len(LETTER_WORDS) - 1,)


class LetterCodec(WordCodec):
    def piece(self, token: int) -> bytes:
        return b"" if token in LETTER_END else LETTER_WORDS[token].encode()

    def grammar_tokenizer(self) -> GrammarTokenizer:
        return GrammarTokenizer.of_words(LETTER_WORDS, end_tokens=LETTER_END)


class LetterDrafter(ScriptedDrafter):
    def __init__(self) -> None:
        super().__init__(LETTERS.perturbed(seed=10, amount=0.7), LETTER_WORDS, end_tokens=LETTER_END)
        self.codec = LetterCodec(LETTER_WORDS, LETTER_END)

    def another(self) -> "LetterDrafter":
        return LetterDrafter()


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

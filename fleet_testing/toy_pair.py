"""Toy pair of the exactness proof: a target and a draft language whose laws are known in closed form."""

from dataclasses import dataclass
from typing import Final

from fleet_device.drafters.contract import Drafter
from fleet_device.drafters.scripted import ScriptedDrafter, WordCodec
from fleet_device.drafters.unlike import UnlikeVocabularyDrafter
from fleet_testing.markov import MarkovScript
from schemas.policy import Mode, SamplingPolicy
from schemas.vocabulary import Vocabulary

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
        draft_words: The draft's words by id.
        draft_ends: The draft's tokens that end a text.
    """

    target: MarkovScript
    draft: MarkovScript
    draft_words: tuple[str, ...]
    draft_ends: tuple[int, ...] = END_TOKENS

    @classmethod
    def standard(cls) -> "ToyPair":
        """Return the pair of the proof."""
        target = MarkovScript(size=_SIZE, seed=7, sharpness=1.2, period=3)
        return cls(target, target.perturbed(seed=8, amount=1.5), target.words)

    @classmethod
    def unlike(cls) -> "ToyPair":
        """Return a pair of other vocabularies: three words are common, under other ids, and the ends have two names."""
        target = MarkovScript(size=_SIZE, seed=7, sharpness=1.2, period=3)
        words = ("d0", "t4", "stop", "t2", "d1", "t1", "d2")
        return cls(target, MarkovScript(size=len(words), seed=9, sharpness=0.8, period=3), words, (2,))

    def drafter(self) -> Drafter:
        """Return a draft model of the pair, for the target's vocabulary."""
        own = ScriptedDrafter(self.draft, self.draft_words, end_tokens=self.draft_ends)
        if self.draft_words == self.target.words:
            return own
        words = self.target.words
        return UnlikeVocabularyDrafter(own, Vocabulary.of(words), WordCodec(words, END_TOKENS))


def policy(mode: Mode, seed: int) -> SamplingPolicy:
    """Return the proof's sampling policy: every step of the shaping takes effect."""
    return SamplingPolicy(mode=mode, temperature=0.8, top_k=5, top_p=0.93, seed=seed)

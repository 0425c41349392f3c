"""Toy pair of the exactness proof: a target and a draft language with known distributions."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, Protocol

from numpy.typing import NDArray

from fleet_device.drafters.contract import Drafter
from fleet_device.drafters.suffix import SuffixDrafter
from fleet_device.drafters.suffix_index import History
from fleet_device.drafters.unlike import UnlikeVocabularyDrafter
from fleet_device.drafters.without_model import LogitsScript, ScriptedDrafter, WordCodec
from sampling.distribution import Float
from schemas.policy import Grammar, Mode, SamplingPolicy
from schemas.vocabulary import Vocabulary
from tests.support.markov import MarkovScript, SpreadScript, coupled_text
from tests.support.toy_transformer import ToyTransformer

PROMPT: Final = (1,)
GUESSABLE: Final = (1, 2, 3, 5, 3, 3, 1, 5, 5, 1, 4, 3, 2, 1, 1, 3, 4, 2, 2, 4, 4, 5, 2, 5, 4, 1, 2)
"""A prompt with every pair of tokens, so that suffix drafts always find a match; about a third are right."""

END_TOKENS: Final = (0,)
"""Outputs may end early, so that the end token's distribution is tested too."""

TOP_K: Final = 5
"""One token of the vocabulary is always excluded."""

TEMPERATURE: Final = 0.8

NEAR_SIZE: Final = 24
"""More tokens than samples of p are sent at first."""

_SIZE: Final = 6
_HISTORY_BYTES: Final = 1 << 14


class ToyLanguage(Protocol):
    @property
    def size(self) -> int:
        """Tokens in the vocabulary."""

    @property
    def ids(self) -> Sequence[int]:
        """The tokens that may occur."""

    @property
    def words(self) -> tuple[str, ...]:
        """The token strings by id."""

    def state(self, prefix: Sequence[int]) -> Hashable:
        """Return what the row after a prefix depends on."""

    def logits(self, prefix: Sequence[int]) -> NDArray[Any]:
        """Return `[size]` for the token after the prefix."""

    def joint(self, prefix: Sequence[int], *, length: int, policy: SamplingPolicy) -> Float:
        """Return the joint law of the next tokens, `[tokens that may occur] * length`, as shaped by a policy."""


@dataclass(frozen=True, slots=True)
class Disturbed:
    """A language whose logits are the sum of two, as a draft model is to its target."""

    target: LogitsScript
    noise: LogitsScript

    def logits(self, prefix: Sequence[int]) -> NDArray[Any]:
        total: NDArray[Any] = self.target.logits(prefix) + self.noise.logits(prefix)
        return total


class Languages(StrEnum):
    """A toy pair.

    Attributes:
        STANDARD: A draft model that is often wrong.
        UNLIKE: Different vocabularies: three words are common, under other ids, and the ends differ.
        NEAR: q is nearly p, over 24 tokens that all have a chance.
        WIDE: The same with token ids that need more than 16 bits.
        ENDLESS: The same as `NEAR`, without ends.
    """

    STANDARD = "standard"
    UNLIKE = "unlike"
    NEAR = "near"
    WIDE = "wide"
    ENDLESS = "endless"


@dataclass(frozen=True, slots=True)
class ToyPair:
    target: ToyLanguage
    draft: LogitsScript
    draft_words: tuple[str, ...]
    draft_ends: tuple[int, ...] = END_TOKENS
    suffix: bool = False

    @classmethod
    def standard(cls) -> "ToyPair":
        target = MarkovScript(size=_SIZE, seed=7, sharpness=1.2, period=3)
        return cls(target, target.perturbed(seed=8, amount=1.5), target.words)

    @staticmethod
    def foreign() -> MarkovScript:
        """Return another target with the standard vocabulary."""
        return MarkovScript(size=_SIZE, seed=27, sharpness=1.2, period=3)

    @classmethod
    def near(cls, languages: Languages = Languages.NEAR) -> "ToyPair":
        """Return a pair where one draft token of fifty is rejected, and most corrections need further samples."""
        target = MarkovScript(size=NEAR_SIZE, seed=18, sharpness=1.2, period=3)
        target = target.shifted(END_TOKENS[0], -20.0) if languages is Languages.ENDLESS else target
        draft = target.perturbed(seed=8, amount=0.05)
        if languages is not Languages.WIDE:
            return cls(target, draft, target.words)
        wide, close = (SpreadScript(each, size=70_000, first=65_500, step=7) for each in (target, draft))
        return cls(wide, close, wide.words)

    @classmethod
    def unlike(cls) -> "ToyPair":
        """Return a pair with different vocabularies."""
        target = MarkovScript(size=_SIZE, seed=7, sharpness=1.2, period=3)
        words = ("d0", "t4", "stop", "t2", "d1", "t1", "d2")
        return cls(target, MarkovScript(size=len(words), seed=9, sharpness=0.8, period=3), words, (2,))

    @classmethod
    def transformer(cls) -> "ToyPair":
        """Return a pair whose target depends on the whole prefix.

        An engine's rounding moves its logits by some thousandths, and no row has an edge of `top_k` or `top_p` that
        close: all engines keep the same tokens.
        """
        target = ToyTransformer(size=_SIZE, seed=51, sharpness=1.8)
        return cls(target, Disturbed(target, MarkovScript(size=_SIZE, seed=8, sharpness=1.0, period=3)), target.words)

    def drafter(self) -> Drafter:
        """Return a drafter of the pair for the target's vocabulary, with or without suffix drafts."""
        model = self._model()
        if not self.suffix:
            return model
        return SuffixDrafter.before(model, History(memory_bytes=_HISTORY_BYTES))

    def _model(self) -> Drafter:
        own = ScriptedDrafter(self.draft, self.draft_words, end_tokens=self.draft_ends)
        if self.draft_words == self.target.words:
            return own
        words = self.target.words
        return UnlikeVocabularyDrafter(own, Vocabulary.of(words), WordCodec(words, END_TOKENS))


def policy(
    mode: Mode,
    seed: int,
    *,
    greedy: bool = False,
    grammar: Grammar | None = None,
    top_k: int | None = None,
    controls: Mapping[str, Any] = MappingProxyType({}),
) -> SamplingPolicy:
    """Return the proof's sampling policy: every step of the shaping has an effect, or none with `greedy`.

    With a grammar, which leaves few tokens at each place, it keeps fewer; with `top_k`, that number, or all with 0.
    """
    temperature = 0.0 if greedy else TEMPERATURE
    kept, top_p = (TOP_K, 0.93) if grammar is None else (2, 0.85)
    if top_k is not None:
        kept, top_p = top_k, 1.0
    fields = {"mode": mode, "temperature": temperature, "top_k": kept, "top_p": top_p, "seed": seed, **controls}
    return SamplingPolicy(grammar=grammar, **fields)


def own_text(seed: int, tokens: int) -> list[int]:
    """Return the target's own output in coupled mode."""
    return coupled_text(ToyPair.standard().target, PROMPT, policy(Mode.COUPLED, seed), tokens, ends=END_TOKENS)

"""Drafters without a model, which need only a vocabulary: none, and a scripted toy language."""

from collections.abc import Sequence
from typing import Any, Protocol, Self

from numpy.typing import NDArray

from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_device.drafters.contract import DrafterError, TextCodec, require_tokens
from fleet_device.drafters.model_file import GgufModel, locate_model
from fleet_device.settings import DeviceSettings
from sampling.distribution import Dist, Ids, shape
from schemas.fields import MAX_TOKENS
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary


class WithoutWeights:
    """The descriptive part of a `Drafter` without a model; the vocabulary must be the target's."""

    name: str
    quantization = "none"

    def __init__(self, vocabulary: Vocabulary, codec: TextCodec, *, context: int) -> None:
        self.vocabulary = vocabulary
        self.codec = codec
        self.context = context
        self.owns_file = True  # the vocabulary's, which further sequences only use

    def another(self) -> Self:
        other = type(self)(self.vocabulary, self.codec, context=self.context)
        other.owns_file = False
        return other

    def close(self) -> None:
        if self.owns_file and callable(close := getattr(self.codec, "close", None)):
            close()


class NoDrafter(WithoutWeights):
    """A `Drafter` that never has a proposal, for edge-only decoding; the target's context alone limits a request."""

    name = "none"
    _length = 0

    def __init__(self, vocabulary: Vocabulary, codec: TextCodec, *, context: int = MAX_TOKENS) -> None:
        super().__init__(vocabulary, codec, context=context)

    def reset(self, tokens: Sequence[int]) -> None:
        require_tokens(tokens, self.vocabulary)
        self._length = len(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        require_tokens(tokens, self.vocabulary)
        self._length += len(tokens)

    def next(self, policy: SamplingPolicy) -> Dist | None:  # noqa: ARG002 - it looks at nothing
        if not self._length:
            raise DrafterError("At least one token is needed: the sequence is empty.")
        if self._length > self.context:
            raise DrafterError(f"The context of {self.context} tokens is full.")
        return None

    def truncate(self, length: int) -> None:
        self._length = min(self._length, max(length, 0))


def load_none(settings: DeviceSettings) -> NoDrafter:
    """Load the vocabulary of the model file that the settings name; raise DrafterError."""
    model = GgufModel(locate_model(settings.model, folder=settings.models_dir).path, vocabulary_only=True)
    return NoDrafter(model.vocabulary, model)


class LogitsScript(Protocol):
    """A language: logits of shape `[vocabulary]` for every prefix."""

    def logits(self, prefix: Sequence[int]) -> NDArray[Any]: ...


class WordCodec:
    """Text side of a toy language: tokens are distinct words, separated by spaces."""

    control_texts: tuple[str, ...] = ()

    def __init__(self, words: Sequence[str], end_tokens: tuple[int, ...] = ()) -> None:
        self._words = tuple(words)
        self._ids = {word: token for token, word in enumerate(words)}
        self.end_tokens = end_tokens

    @property
    def chat_template(self) -> str | None:
        return None

    def special_text(self, name: str) -> str:  # noqa: ARG002
        return ""

    def encode(self, text: str, *, special: bool = False) -> list[int]:  # noqa: ARG002
        """Return the ids of the words; raise DrafterError for a word that is not in the language."""
        try:
            return [self._ids[word] for word in text.split()]
        except KeyError as error:
            raise DrafterError(f"The scripted language has no word {error.args[0]!r}.") from None

    def piece(self, token: int) -> bytes:
        return f"{self._words[token]} ".encode()

    def grammar_tokenizer(self) -> GrammarTokenizer:
        return GrammarTokenizer.of_words([f"{word} " for word in self._words], end_tokens=self.end_tokens)


class ScriptedDrafter(WithoutWeights):
    """A `Drafter` that reads its logits from a script; token ids are the positions of the words."""

    def __init__(
        self,
        script: LogitsScript,
        words: Sequence[str],
        *,
        context: int = 4096,
        end_tokens: tuple[int, ...] = (),
        name: str = "scripted",
    ) -> None:
        super().__init__(Vocabulary.of(words), WordCodec(words, end_tokens), context=context)
        self.name = name
        self._script = script
        self._words = words
        self._tokens: list[int] = []

    def another(self) -> "ScriptedDrafter":
        return ScriptedDrafter(
            self._script, self._words, context=self.context, end_tokens=self.codec.end_tokens, name=self.name
        )

    def reset(self, tokens: Sequence[int]) -> None:
        require_tokens(tokens, self.vocabulary)
        self._tokens[:] = tokens

    def extend(self, tokens: Sequence[int]) -> None:
        require_tokens(tokens, self.vocabulary)
        self._tokens.extend(tokens)

    def next(self, policy: SamplingPolicy) -> Dist:
        return self.next_allowed(policy, None)

    def next_allowed(self, policy: SamplingPolicy, allowed: Ids | None) -> Dist:
        if not self._tokens:
            raise DrafterError("The scripted drafter needs at least one token: the sequence is empty.")
        if len(self._tokens) > self.context:
            raise DrafterError(f"The scripted drafter's context of {self.context} tokens is full.")
        row = self._script.logits(self._tokens)
        if row.shape != (self.vocabulary.size,):
            raise DrafterError(
                f"The script gives logits of shape {row.shape} for a vocabulary of {self.vocabulary.size}."
            )
        try:
            return shape(row, policy, allowed=allowed)
        except ValueError as error:
            raise DrafterError(f"The script gives nonsense: {error}") from error

    def truncate(self, length: int) -> None:
        del self._tokens[max(length, 0) :]

"""Scripted drafter: a toy language whose distributions are known, for tests and for load."""

from collections.abc import Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from dssd.distribution import Dist, Ids, shape
from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_device.drafters.contract import DrafterError, require_tokens
from fleet_device.drafters.without_weights import WithoutWeights
from schemas.policy import SamplingPolicy
from schemas.vocabulary import Vocabulary


class Script(Protocol):
    """A language: logits for every prefix."""

    def logits(self, prefix: Sequence[int]) -> NDArray[Any]:
        """Return `[vocabulary]`, any float type, for the token after the prefix."""


class WordCodec:
    """Text of a toy language: a token is a word, words are parted by spaces.

    Args:
        words: One a token id, distinct, without spaces.
        end_tokens: Ids that end a text.
    """

    def __init__(self, words: Sequence[str], end_tokens: tuple[int, ...] = ()) -> None:
        self._words = tuple(words)
        self._ids = {word: token for token, word in enumerate(words)}
        self._end_tokens = end_tokens

    @property
    def end_tokens(self) -> tuple[int, ...]:
        return self._end_tokens

    @property
    def chat_template(self) -> str | None:
        """A toy language has no chats."""
        return None

    @property
    def control_texts(self) -> tuple[str, ...]:
        """A toy language has no control tokens."""
        return ()

    def special_text(self, name: str) -> str:  # noqa: ARG002
        """Return nothing: there are no control tokens."""
        return ""

    def encode(self, text: str, *, special: bool = False) -> list[int]:  # noqa: ARG002
        """Return the ids of the text's words.

        Raises:
            DrafterError: A word is not of the language.
        """
        try:
            return [self._ids[word] for word in text.split()]
        except KeyError as error:
            raise DrafterError(f"The scripted language has no word {error.args[0]!r}.") from None

    def piece(self, token: int) -> bytes:
        """Return the word with a space after it."""
        return f"{self._words[token]} ".encode()

    def grammar_tokenizer(self) -> GrammarTokenizer:
        """Return the words for grammars, each with its space."""
        return GrammarTokenizer.of_words([f"{word} " for word in self._words], end_tokens=self.end_tokens)


class ScriptedDrafter(WithoutWeights):
    """A `Drafter` that reads its logits from a script.

    Args:
        script: The language.
        words: One a token id; the vocabulary's fingerprint is over them.
        context: Most tokens in the sequence.
        end_tokens: Ids that end a text.
        name: For the log.
    """

    def __init__(
        self,
        script: Script,
        words: Sequence[str],
        *,
        context: int = 4096,
        end_tokens: tuple[int, ...] = (),
        name: str = "scripted",
    ) -> None:
        super().__init__(Vocabulary.of(words), WordCodec(words, end_tokens), context=context, name=name)
        self._script = script
        self._words = words
        self._tokens: list[int] = []

    def another(self) -> "ScriptedDrafter":
        return ScriptedDrafter(
            self._script,
            self._words,
            context=self._context,
            end_tokens=self._codec.end_tokens,
            name=self._name,
        )

    def reset(self, tokens: Sequence[int]) -> None:
        require_tokens(tokens, self._vocabulary)
        self._tokens[:] = tokens

    def extend(self, tokens: Sequence[int]) -> None:
        require_tokens(tokens, self._vocabulary)
        self._tokens.extend(tokens)

    def next(self, policy: SamplingPolicy) -> Dist:
        """Shape the script's row for the sequence."""
        return self._next(policy)

    def next_allowed(self, policy: SamplingPolicy, allowed: Ids) -> Dist:
        """Likewise, of the tokens that are allowed."""
        return self._next(policy, allowed)

    def _next(self, policy: SamplingPolicy, allowed: Ids | None = None) -> Dist:
        if not self._tokens:
            raise DrafterError("The scripted drafter has nothing to go on: the sequence is empty.")
        if len(self._tokens) > self._context:
            raise DrafterError(f"The scripted drafter's context of {self._context} tokens is full.")
        row = self._script.logits(self._tokens)
        if row.shape != (self._vocabulary.size,):
            raise DrafterError(
                f"The script gives logits of shape {row.shape} for a vocabulary of {self._vocabulary.size}."
            )
        try:
            return shape(row, policy, allowed=allowed)
        except ValueError as error:
            raise DrafterError(f"The script gives nonsense: {error}") from error

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on."""
        del self._tokens[max(length, 0) :]

    def close(self) -> None: ...

"""Tokens as a grammar needs them: the bytes of each, and how a text that is sure to come is cut into them."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Final

from fleet_runtime.grammar.errors import GrammarUnavailable

if TYPE_CHECKING:
    from llguidance import LLTokenizer

__all__ = ["GrammarTokenizer"]

_BEFORE: Final = "\x02"
"""Stands before a text that is encoded, which so is not taken for the beginning of one; it is a token of its own."""


class GrammarTokenizer:
    """A vocabulary for grammars. Building it takes about a second.

    Attributes:
        native: llguidance's.
        vocabulary: Number of tokens.
        end_tokens: Ids that end a text.
    """

    def __init__(self, native: "LLTokenizer", *, vocabulary: int, end_tokens: Sequence[int]) -> None:
        self.native = native
        self.vocabulary = vocabulary
        self.end_tokens = tuple(end_tokens)

    def piece(self, token: int) -> bytes:
        """Return what a token reads, maybe half a character; nothing for one that ends a text or controls it."""
        unread = token in self.end_tokens or self.native.is_special_token(token)
        return b"" if unread else bytes(self.native.decode_bytes([token]))

    @classmethod
    def of_pieces(
        cls, pieces: Sequence[bytes], *, end_tokens: Sequence[int], encode: Callable[[str], Sequence[int]]
    ) -> "GrammarTokenizer":
        """Build it of the tokens' bytes.

        Args:
            pieces: UTF-8 bytes of each token, maybe half a character; none for control tokens, which no text holds.
            end_tokens: Ids that end a text.
            encode: Returns the ids of a text; a token that begins every text may stand before them.

        Raises:
            GrammarUnavailable: llguidance is not installed, or the vocabulary has no token that ends a text.
        """
        ends = _require_ends(end_tokens)
        library = _library()
        wrapper = library.TokenizerWrapper(_Encoder(pieces, ends[0], encode))
        native = library.LLTokenizer(wrapper, n_vocab=len(pieces), eos_token=ends)
        return cls(native, vocabulary=len(pieces), end_tokens=ends)

    @classmethod
    def of_words(cls, words: Sequence[str], *, end_tokens: Sequence[int]) -> "GrammarTokenizer":
        """Build it of whole words, of which the longest that fits is always the right one.

        Raises:
            GrammarUnavailable: See `of_pieces`.
        """
        pieces = [b"" if token in end_tokens else word.encode() for token, word in enumerate(words)]
        # Text that is sure to come may end inside a word: to llguidance every byte is a token, behind the vocabulary.
        spelled = [*pieces, *(bytes([byte]) for byte in range(256))]
        ids = {piece: token for token, piece in reversed(list(enumerate(spelled))) if piece}
        longest = max(map(len, ids))

        def encode(text: str) -> list[int]:
            raw, place, found = text.encode(), 0, list[int]()
            while place < len(raw):
                lengths = range(min(longest, len(raw) - place), 0, -1)
                piece = next(raw[place : place + each] for each in lengths if raw[place : place + each] in ids)
                found.append(ids[piece])
                place += len(piece)
            return found

        found = cls.of_pieces(spelled, end_tokens=end_tokens, encode=encode)
        return cls(found.native, vocabulary=len(pieces), end_tokens=end_tokens)

    @classmethod
    def of_tokenizer_json(cls, text: str, *, vocabulary: int, end_tokens: Sequence[int]) -> "GrammarTokenizer":
        """Build it of a `tokenizer.json`'s text.

        Args:
            text: The file's.
            vocabulary: Number of tokens, padding left out.
            end_tokens: Ids that end a text.

        Raises:
            GrammarUnavailable: llguidance is not installed, or does not know such a tokenizer.
        """
        ends = _require_ends(end_tokens)
        try:
            native = _library().LLTokenizer(text, n_vocab=vocabulary, eos_token=ends)
        except (ValueError, RuntimeError) as error:
            raise GrammarUnavailable(f"The target's tokenizer cannot be used for grammars: {error}.") from error
        return cls(native, vocabulary=vocabulary, end_tokens=ends)


class _Encoder:
    """What llguidance asks of a tokenizer."""

    def __init__(self, pieces: Sequence[bytes], end: int, encode: Callable[[str], Sequence[int]]) -> None:
        self.tokens = list(pieces)
        self.eos_token_id = end
        self.bos_token_id = None
        self.special_token_ids: list[int] = []
        self._encode = encode
        self._before = list(encode(_BEFORE))

    def __call__(self, text: str | bytes) -> list[int]:
        plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        found = list(self._encode(_BEFORE + plain))
        before = len(self._before)
        return found[before:] if found[:before] == self._before else list(self._encode(plain))


def _require_ends(end_tokens: Sequence[int]) -> list[int]:
    if not end_tokens:
        raise GrammarUnavailable("A grammar needs a token that ends a text, and this model has none.")
    return list(end_tokens)


def _library() -> ModuleType:
    try:
        import llguidance  # noqa: PLC0415 - an end may do without it
    except ImportError:
        raise GrammarUnavailable(
            "Grammars need the package llguidance, which is not installed; install it: pip install llguidance."
        ) from None
    return llguidance

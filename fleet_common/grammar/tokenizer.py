"""Vocabulary for grammars: the bytes of each token, and how text that a grammar forces is cut into tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fleet_common.grammar.errors import GrammarUnavailable

_BEFORE: Final = "\x02"
"""Put before a text that is encoded, so that it is not taken for the beginning of one; it is a token of its own."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GrammarTokenizer:
    """A vocabulary for grammars, which the grammar worker is given.

    Attributes:
        vocabulary: Number of tokens.
        end_tokens: Ids that end a generation.
        pieces: UTF-8 bytes of each token, maybe half a character; none for control tokens. Behind the vocabulary there
            may be further ones, which no model has. Empty where `file` says it.
        encode: Returns the ids of a text; a token that begins every text may come first. Unused if there is a `file`.
        file: Text of a `tokenizer.json`.
    """

    vocabulary: int
    end_tokens: tuple[int, ...]
    pieces: tuple[bytes, ...] = ()
    encode: Callable[[str], Sequence[int]] = lambda _text: ()
    file: str | None = None

    def description(self) -> dict[str, Any]:
        """Return what the worker is given, as JSON values."""
        if self.file is not None:
            return {"end_tokens": self.end_tokens, "file": self.file, "size": self.vocabulary}
        return {"end_tokens": self.end_tokens, "pieces": [piece.decode("latin-1") for piece in self.pieces]}

    def encode_inside(self, text: str) -> Sequence[int]:
        """Return the ids of a text that others come before."""
        before = list(self.encode(_BEFORE))
        found = list(self.encode(_BEFORE + text))
        return found[len(before) :] if found[: len(before)] == before else self.encode(text)

    @classmethod
    def of_pieces(
        cls, pieces: Sequence[bytes], *, end_tokens: Sequence[int], encode: Callable[[str], Sequence[int]]
    ) -> "GrammarTokenizer":
        """Build it of the tokens' bytes; see the attributes.

        Raises:
            GrammarUnavailable: The vocabulary has no token that ends a generation.
        """
        return cls(vocabulary=len(pieces), end_tokens=_require_ends(end_tokens), pieces=tuple(pieces), encode=encode)

    @classmethod
    def of_words(cls, words: Sequence[str], *, end_tokens: Sequence[int]) -> "GrammarTokenizer":
        """Build it of whole words, of which the longest that fits is always the right one.

        Raises:
            GrammarUnavailable: See `of_pieces`.
        """
        own = [b"" if token in end_tokens else word.encode() for token, word in enumerate(words)]
        # Forced text may end inside a word: to llguidance every byte is a token, behind the vocabulary.
        pieces = [*own, *(bytes([byte]) for byte in range(256))]
        ids = {piece: token for token, piece in reversed(list(enumerate(pieces))) if piece}
        longest = max(map(len, ids))

        def encode(text: str) -> list[int]:
            raw, place, found = text.encode(), 0, list[int]()
            while place < len(raw):
                lengths = range(min(longest, len(raw) - place), 0, -1)
                piece = next(raw[place : place + each] for each in lengths if raw[place : place + each] in ids)
                found.append(ids[piece])
                place += len(piece)
            return found

        return cls(vocabulary=len(words), end_tokens=_require_ends(end_tokens), pieces=tuple(pieces), encode=encode)

    @classmethod
    def of_tokenizer_json(cls, text: str, *, vocabulary: int, end_tokens: Sequence[int]) -> "GrammarTokenizer":
        """Build it of a `tokenizer.json`'s text.

        Args:
            text: The file's.
            vocabulary: Number of tokens, padding left out.
            end_tokens: Ids that end a generation.

        Raises:
            GrammarUnavailable: See `of_pieces`.
        """
        return cls(vocabulary=vocabulary, end_tokens=_require_ends(end_tokens), file=text)


def _require_ends(end_tokens: Sequence[int]) -> tuple[int, ...]:
    if not end_tokens:
        raise GrammarUnavailable("A grammar needs a token that ends a text, and this model has none.")
    return tuple(end_tokens)

"""The vocabulary of a model, for grammars."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleet_common.grammar.errors import GrammarUnavailable

_BEFORE: Final = "\x02"
"""Prefix of a text that is encoded as if it were not at the beginning; it is a separate token."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GrammarTokenizer:
    """A vocabulary for the grammar worker; raise GrammarUnavailable if it has no end token.

    Attributes:
        vocabulary: Number of tokens, without padding.
        pieces: UTF-8 bytes of each token, maybe half a character; none for control tokens. There may be further ones
            beyond the vocabulary, which no model has. Empty if `file` is given.
        encode: Returns the ids of a text, maybe with a token that begins every text. Unused if `file` is given.
        file: Content of a `tokenizer.json`.
    """

    vocabulary: int
    end_tokens: tuple[int, ...]
    pieces: tuple[bytes, ...] = ()
    encode: Callable[[str], Sequence[int]] = lambda _text: ()
    file: str | None = None

    def __post_init__(self) -> None:
        if not self.end_tokens:
            raise GrammarUnavailable("A grammar needs an end token, and this model has none.")

    def description(self) -> dict[str, Any]:
        if self.file is not None:
            return {"end_tokens": self.end_tokens, "file": self.file, "size": self.vocabulary}
        return {"end_tokens": self.end_tokens, "pieces": [piece.decode("latin-1") for piece in self.pieces]}

    def encode_inside(self, text: str) -> Sequence[int]:
        """Return the ids of a text that is not at the beginning."""
        before = list(self.encode(_BEFORE))
        found = list(self.encode(_BEFORE + text))
        return found[len(before) :] if found[: len(before)] == before else self.encode(text)

    def ids(self, mask: bytes) -> NDArray[np.int64]:
        """Return the ids of a bit mask, ascending."""
        bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
        return np.flatnonzero(bits[: self.vocabulary])

    def known(self, forced: Sequence[int]) -> tuple[int, ...]:
        """Return forced ids up to the first that the model does not have."""
        return tuple(itertools.takewhile(lambda token: token < self.vocabulary, forced))

    @classmethod
    def of_words(cls, words: Sequence[str], *, end_tokens: Sequence[int]) -> "GrammarTokenizer":
        """Return the vocabulary of whole words, of which the longest match is always the right one."""
        own = [b"" if token in end_tokens else word.encode() for token, word in enumerate(words)]
        # Forced text may end inside a word: for llguidance every byte is a token, beyond the vocabulary.
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

        return cls(vocabulary=len(words), end_tokens=tuple(end_tokens), pieces=tuple(pieces), encode=encode)

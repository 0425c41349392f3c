"""Vocabulary fingerprint and token digest: cheap checks that both ends mean the same tokens.

Draft and target must give the same token the same id, so both ends hash the token strings by id and compare at Open.
The files of one model spell the strings in more than one way, and are often padded to a round number of rows that are
no tokens; `token_strings` returns one spelling at both ends.

The digest of a prefix is CRC-32 over the token ids as 32-bit little-endian words. It finds protocol errors, not
attackers: a device can only deceive itself about its own text.
"""

import hashlib
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from schemas.fields import MAX_VOCABULARY

_SPACE: Final = "\u2581"
_PADDING: Final = re.compile(r"\[PAD[0-9]+\]")


class Vocabulary(BaseModel):
    """A vocabulary's identity.

    Attributes:
        size: Number of tokens, padding rows left out.
        fingerprint: SHA-256 over the token strings by id.
    """

    model_config = ConfigDict(frozen=True)

    size: int = Field(ge=2, le=MAX_VOCABULARY, strict=True)
    fingerprint: bytes = Field(min_length=32, max_length=32, strict=True)

    @classmethod
    def of(cls, tokens: Sequence[str]) -> "Vocabulary":
        """Fingerprint the token strings, in order of id, as `token_strings` returns them."""
        return cls(size=len(tokens), fingerprint=_fingerprint(tokens))

    def __str__(self) -> str:
        return f"{self.size} tokens, {self.fingerprint[:4].hex()}"


def token_strings(rows: Iterable[str]) -> list[str]:
    """Return the token strings of a model, by id, given what its file or its tokenizer stores for every row.

    Padding is recognised by its string alone: `[PAD<n>]`, at the end. Converters write it, and number either the rows
    or the padding, so `n` may be any number. Nothing else is padding: a reserved or unused token has its string and its
    row of logits in every file of the family. Padding between tokens is kept, since the following ids depend on it.

    A space is stored as a space or as U+2581, depending on the converter and even within one vocabulary: SentencePiece
    writes U+2581 in every token, and converters put spaces into tokens that a tokenizer's configuration adds. No
    tokenizer has a separate token for each, so reading both as U+2581 makes no two tokens equal.

    llama.cpp, with which devices read a file, ends a string at its first NUL and names an empty one after its id.
    """
    strings = [row.partition("\0")[0].replace(" ", _SPACE) or f"[EMPTY_{index}]" for index, row in enumerate(rows)]
    while strings and _PADDING.fullmatch(strings[-1]):
        strings.pop()
    return strings


def _fingerprint(tokens: Iterable[str]) -> bytes:
    digest = hashlib.sha256()
    for token in tokens:
        raw = token.encode("utf-8", "surrogatepass")
        # The length first: no two token lists share a byte string.
        digest.update(len(raw).to_bytes(4, "little"))
        digest.update(raw)
    return digest.digest()


EMPTY_DIGEST = 0
"""Digest of no tokens."""


def extend_digest(digest: int, tokens: Sequence[int]) -> int:
    """Return the digest of the tokens already covered by `digest`, followed by `tokens`."""
    return zlib.crc32(np.asarray(tokens, dtype="<u4").tobytes(), digest)

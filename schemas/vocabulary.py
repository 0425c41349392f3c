"""Vocabulary fingerprint: draft and target must give the same token the same id.

Both ends hash the token strings by id and compare at Open. Models are often padded to a round number
of rows that no string uses; those rows are not part of the vocabulary.
"""

import hashlib
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["MAX_VOCABULARY", "Vocabulary"]

MAX_VOCABULARY = 1 << 21


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
        """Fingerprint the token strings, in order of id.

        Args:
            tokens: One string a token id, as stored by the tokenizer (not detokenized), without
                padding rows at the end.
        """
        return cls(size=len(tokens), fingerprint=_digest(tokens))

    def __str__(self) -> str:
        return f"{self.size} tokens, {self.fingerprint[:4].hex()}"


def _digest(tokens: Iterable[str]) -> bytes:
    digest = hashlib.sha256()
    for token in tokens:
        raw = token.encode("utf-8", "surrogatepass")
        # The length first: no two token lists share a byte string.
        digest.update(len(raw).to_bytes(4, "little"))
        digest.update(raw)
    return digest.digest()

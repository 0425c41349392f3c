"""Decodes a text that grows token by token, and never gives out half a character."""

import codecs
from collections.abc import Iterable

from fleet_device.drafters.contract import TextCodec

__all__ = ["Detokenizer"]


class Detokenizer:
    """Decodes a growing text.

    Bytes that cannot become valid UTF-8 any more come out as U+FFFD, so that the text always goes on. The bytes of a
    character that is not complete yet are kept for the tokens to come; where none come, the text ends before it.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, tokens: Iterable[int]) -> str:
        """Return the text that these tokens complete."""
        return self._decoder.decode(b"".join(map(self._codec.piece, tokens)))

"""Decodes a text that grows token by token, and never gives out half a character."""

import codecs
from collections.abc import Iterable

from fleet_device.drafters.contract import TextCodec

__all__ = ["TextStream"]


class TextStream:
    """Decodes a growing text; never gives out half a character."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        # What cannot become valid UTF-8 any more comes out as U+FFFD, so that text always goes on.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, tokens: Iterable[int]) -> str:
        """Return the text that these tokens complete; an unfinished character waits for the next ones."""
        return self._decoder.decode(b"".join(map(self._codec.piece, tokens)))

    def finish(self) -> str:
        """Return what is left at the end: nothing, or a mark for a character that never got whole."""
        return self._decoder.decode(b"", final=True)

"""Between text and token ids: what a vocabulary can do, and text that grows token by token."""

import codecs
from collections.abc import Iterable
from typing import Protocol

__all__ = ["TextCodec", "TextStream"]


class TextCodec(Protocol):
    """A vocabulary's text side."""

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Ids after which the draft model's own text ends. The edge's list rules while an edge is there."""

    @property
    def chat_template(self) -> str | None:
        """The Jinja source that turns messages into a prompt, if the model has one."""

    def special_text(self, name: str) -> str:
        """Return the text of the `bos` or `eos` token, empty if there is none; chat templates want it."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: Any.
            special: False for plain text: nothing in it is taken for a control token, and the model's own
                beginning-of-text token is put before it, where it has one. True for a rendered chat template:
                control tokens are recognised and none is added.
        """

    def piece(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token, maybe half a character; nothing for control tokens."""


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

"""Conversation codec: encodes a chat that goes on with the tokens that were written, not with others of the same text.

A model may write a text in other tokens than a tokenizer makes of it. If the next turn of a conversation were encoded
anew as a whole, everything from the first such place on would be another prefix, and be computed again at both ends.
"""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from fleet_device.drafters.contract import TextCodec

_REMEMBERED: Final = 8
"""Conversations that may take turns at one device."""


@dataclass(frozen=True, slots=True)
class _Written:
    """A prompt and what was written behind it."""

    text: str
    tokens: tuple[int, ...]


class ConversationCodec:
    """`TextCodec` over another, which remembers the latest texts. For use from any thread.

    Args:
        codec: Encodes what is new.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._one = threading.Lock()
        self._encoded: deque[_Written] = deque(maxlen=_REMEMBERED)
        self._written: deque[_Written] = deque(maxlen=2 * _REMEMBERED)  # the latest first

    @property
    def end_tokens(self) -> tuple[int, ...]:
        return self._codec.end_tokens

    @property
    def chat_template(self) -> str | None:
        return self._codec.chat_template

    @property
    def control_texts(self) -> tuple[str, ...]:
        return self._codec.control_texts

    def special_text(self, name: str) -> str:
        return self._codec.special_text(name)

    def piece(self, token: int) -> bytes:
        return self._codec.piece(token)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the token ids of a text; of a rendered chat that goes on, its beginning as it was written."""
        with self._one:
            return self._encode(text, special=special)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        if not special:
            return self._codec.encode(text)
        known = next((each for each in self._written if self._goes_on(text, each.text)), None)
        if known is None:
            tokens = self._codec.encode(text, special=True)
        else:
            tokens = [*known.tokens, *self._codec.encode(text[len(known.text) :], special=True)]
        self._encoded.append(_Written(text, tuple(tokens)))
        return tokens

    def remember(self, prompt: Sequence[int], text: str, tokens: Sequence[int]) -> None:
        """Note what was written.

        Args:
            prompt: Token ids. Of one that did not come out of `encode` as a whole nothing is noted.
            text: Behind it.
            tokens: Of the text. They are noted only where they say the text, the whole text, and nothing else: no
                control token, no beginning of a character.
        """
        with self._one:
            self._remember(prompt, text, tokens)

    def _remember(self, prompt: Sequence[int], text: str, tokens: Sequence[int]) -> None:
        encoded = next((each for each in self._encoded if each.tokens == tuple(prompt)), None)
        written = list(tokens)
        while written and written[-1] in self.end_tokens:
            written.pop()
        pieces = [self._codec.piece(token) for token in written]
        if encoded is None or not text or not all(pieces) or b"".join(pieces) != text.encode("utf-8", "replace"):
            return
        self._note(encoded, text, written)
        # Many templates, and many applications, leave out the white space at an answer's end.
        stripped = text.rstrip().encode("utf-8", "replace")
        lengths = list(accumulate(map(len, pieces)))
        if len(stripped) < lengths[-1] and len(stripped) in lengths:
            self._note(encoded, text.rstrip(), written[: lengths.index(len(stripped)) + 1])

    def _note(self, encoded: "_Written", text: str, tokens: Sequence[int]) -> None:
        self._written.appendleft(_Written(encoded.text + text, (*encoded.tokens, *tokens)))

    def _goes_on(self, text: str, beginning: str) -> bool:
        """Whether a text goes on behind another where a control token parts them: each part is encoded by itself."""
        return text.startswith(beginning) and any(text.startswith(each, len(beginning)) for each in self.control_texts)

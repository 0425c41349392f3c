"""API responses in OpenAI's shapes: whole, or in chunks."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fleet_device.api.logprobs import (
    Spell,
    Told,
    chat_logprobs,
    completion_logprobs,
    pieces_of,
    spelled_tokens,
)
from fleet_device.api.usage import told_of, usage_of
from fleet_device.texts.generate import GeneratedText
from fleet_device.texts.piece import Piece
from schemas.reasons import EndReason

__all__ = ["DONE", "VERIFIED_HEADER", "Reply", "event"]

VERIFIED_HEADER: Final = "X-Fleet-Verified"
"""Header of an answer in one: whether all of its text follows the large model's law, `true` or `false`."""

DONE: Final = b"data: [DONE]\n\n"
"""The end of a stream."""

_FINISH: Final = {EndReason.STOP: "stop", EndReason.LENGTH: "length"}


def event(body: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


@dataclass(frozen=True, slots=True)
class Reply:
    """The shapes of one answer.

    Attributes:
        chat: Whether it answers a chat, or continues a prompt.
        name: The answer's id.
        created: Unix seconds.
        model: The model's name.
        include_usage: Whether chunks have a `usage`.
        spell: Returns the bytes of a token; None where no log-probabilities are asked for.
    """

    chat: bool
    name: str
    created: int
    model: str
    include_usage: bool = False
    spell: Spell | None = None
    _shown: dict[int, int] = field(default_factory=dict)  # characters of each choice in chunks that are sent

    def whole(self, texts: Sequence[GeneratedText]) -> dict[str, Any]:
        """Return the answer in one, with a choice for each text."""
        choices = []
        for number, text in enumerate(texts):
            content = {"message": {"role": "assistant", "content": text.text}} if self.chat else {"text": text.text}
            told = None if self.spell is None else self._logprobs(spelled_tokens(text, self.spell), self.spell)
            choices.append({"index": number, **content, "logprobs": told, "finish_reason": _finish(text)})
        kind = "chat.completion" if self.chat else "text_completion"
        own = [told_of(text) for text in texts]
        fleet = own[0] if len(own) == 1 else {**own[0], "choices": own}
        return {**self._head(kind), "choices": choices, "usage": usage_of(texts), "fleet": fleet}

    def first(self, number: int = 0) -> list[dict[str, Any]]:
        """Return the chunks of a choice before any text."""
        return [self._chunk({"role": "assistant", "content": ""}, number)] if self.chat else []

    def piece(self, piece: Piece, number: int = 0) -> dict[str, Any]:
        """Return a chunk of text; one that does not follow the large model's law says so."""
        chunk = self._chunk({"content": piece.text} if self.chat else piece.text, number)
        if self.spell is not None and piece.parts:
            before = self._shown.get(number, 0)
            self._shown[number] = before + len(piece.text)
            chunk["choices"][0]["logprobs"] = self._logprobs(pieces_of(piece.parts), self.spell, offset=before)
        return chunk if piece.verified else {**chunk, "fleet": {"verified": False}}

    def last(self, text: GeneratedText, number: int = 0) -> dict[str, Any]:
        """Return the chunk after all text of a choice."""
        return {**self._chunk({} if self.chat else "", number, _finish(text)), "fleet": told_of(text)}

    def end(self, texts: Sequence[GeneratedText]) -> list[dict[str, Any]]:
        """Return the chunks after all choices."""
        if not self.include_usage:
            return []
        return [{**self._chunk("", 0), "choices": [], "usage": usage_of(texts)}]

    def _logprobs(self, tokens: Sequence[Told], spell: Spell, *, offset: int = 0) -> dict[str, Any]:
        return chat_logprobs(tokens, spell) if self.chat else completion_logprobs(tokens, spell, offset=offset)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, content: dict[str, str] | str, number: int, finish: str | None = None) -> dict[str, Any]:
        choice = {
            "index": number,
            "delta" if self.chat else "text": content,
            "logprobs": None,
            "finish_reason": finish,
        }
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        chunk = {**self._head(kind), "choices": [choice]}
        if self.include_usage:
            chunk["usage"] = None
        return chunk


def _finish(text: GeneratedText) -> str:
    # Any other end is a failure, and answered as one.
    return _FINISH[text.reason]

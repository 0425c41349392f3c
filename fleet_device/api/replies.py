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
from fleet_device.api.tool_calls import ToolCalls
from fleet_device.api.usage import told_of, usage_of
from fleet_device.client.request import Piece
from fleet_device.texts.generate import GeneratedText
from schemas.reasons import EndReason

VERIFIED_HEADER: Final = "X-Fleet-Verified"
"""Header of an answer in one: whether all of its text follows the large model's law, `true` or `false`."""

WAITED_HEADER: Final = "X-Fleet-Queue-Ms"
"""Header of an answer: for how long the request waited in the device's queue, in whole milliseconds."""

IGNORED_HEADER: Final = "X-Fleet-Ignored"
"""Header of an answer: names of the request's fields that were ignored."""

QUOTA_HEADER: Final = "X-Fleet-Quota-Ms"
"""Header of an answer in one: how long it waited because the device had used up a quota at the edge."""

DONE: Final = b"data: [DONE]\n\n"
"""The end of a stream."""

_FINISH: Final = {EndReason.STOP: "stop", EndReason.LENGTH: "length"}


def event(body: dict[str, Any]) -> bytes:
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
        tools: How texts are calls of functions, if they may be.
    """

    chat: bool
    name: str
    created: int
    model: str
    include_usage: bool = False
    spell: Spell | None = None
    tools: ToolCalls | None = None
    _shown: dict[int, int] = field(default_factory=dict)  # characters of each choice in chunks that are sent

    def whole(self, texts: Sequence[GeneratedText]) -> dict[str, Any]:
        """Return the answer in one, with a choice for each text."""
        choices = []
        for number, text in enumerate(texts):
            said = {"content": text.text} if self.tools is None else self._called(self.tools, text)
            content = {"message": {"role": "assistant", **said}} if self.chat else {"text": text.text}
            told = None if self.spell is None else self._logprobs(spelled_tokens(text, self.spell), self.spell)
            finish = _finish(text, calls="tool_calls" in said)
            choices.append({"index": number, **content, "logprobs": told, "finish_reason": finish})
        kind = "chat.completion" if self.chat else "text_completion"
        own = [told_of(text) for text in texts]
        fleet = own[0] if len(own) == 1 else {**own[0], "choices": own}
        return {**self._head(kind), "choices": choices, "usage": usage_of(texts), "fleet": fleet}

    def first(self, number: int = 0) -> list[dict[str, Any]]:
        """Return the chunks of a choice before any text."""
        return [self._chunk({"role": "assistant", "content": ""}, number)] if self.chat else []

    def pieces(self, piece: Piece, number: int = 0) -> list[dict[str, Any]]:
        """Return the chunks of a piece of text; those of one that does not follow the large model's law say so."""
        told = None
        if self.spell is not None and piece.parts:
            before = self._shown.get(number, 0)
            self._shown[number] = before + len(piece.text)
            told = self._logprobs(pieces_of(piece.parts), self.spell, offset=before)
        if self.tools is None:
            deltas: Sequence[dict[str, Any] | str] = [{"content": piece.text} if self.chat else piece.text]
        else:
            # Log-probabilities come with the first chunk of a piece, also where nothing of a call can be told yet.
            deltas = self.tools.pieces(number, piece.text) or ([{}] if told else [])
        chunks = [self._chunk(delta, number) for delta in deltas]
        if told is not None:
            chunks[0]["choices"][0]["logprobs"] = told
        return chunks if piece.verified else [{**chunk, "fleet": {"verified": False}} for chunk in chunks]

    def last(self, text: GeneratedText, number: int = 0) -> list[dict[str, Any]]:
        """Return the chunks after all text of a choice."""
        tools, chunks, calls = self.tools, list[dict[str, Any]](), False
        if tools is not None:
            chunks = [self._chunk(each, number) for each in tools.last(number, ended=text.reason is EndReason.STOP)]
            calls = tools.calls(number)
        last = self._chunk({} if self.chat else "", number, _finish(text, calls=calls))
        return [*chunks, {**last, "fleet": told_of(text)}]

    def end(self, texts: Sequence[GeneratedText]) -> list[dict[str, Any]]:
        """Return the chunks after all choices."""
        if not self.include_usage:
            return []
        return [{**self._chunk("", 0), "choices": [], "usage": usage_of(texts)}]

    def _logprobs(self, tokens: Sequence[Told], spell: Spell, *, offset: int = 0) -> dict[str, Any]:
        return chat_logprobs(tokens, spell) if self.chat else completion_logprobs(tokens, spell, offset=offset)

    def _called(self, tools: ToolCalls, text: GeneratedText) -> dict[str, Any]:
        return tools.message(text.text, ended=text.reason is EndReason.STOP)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, content: dict[str, Any] | str, number: int, finish: str | None = None) -> dict[str, Any]:
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


def _finish(text: GeneratedText, *, calls: bool = False) -> str:
    # Any other end is a failure, and answered as one.
    return "tool_calls" if calls and text.reason is EndReason.STOP else _FINISH[text.reason]

"""API responses in OpenAI's shapes: whole, or in chunks."""

import json
from dataclasses import dataclass
from typing import Any, Final

from fleet_device.texts.generate import GeneratedText
from schemas.reasons import EndReason

__all__ = ["DONE", "Reply", "event"]

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
    """

    chat: bool
    name: str
    created: int
    model: str
    include_usage: bool = False

    def whole(self, text: GeneratedText) -> dict[str, Any]:
        """Return the answer in one."""
        content = {"message": {"role": "assistant", "content": text.text}} if self.chat else {"text": text.text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": _finish(text)}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": [choice], "usage": _usage(text), "fleet": _session(text)}

    def first(self) -> list[dict[str, Any]]:
        """Return the chunks before any text."""
        return [self._chunk({"role": "assistant", "content": ""})] if self.chat else []

    def piece(self, text: str) -> dict[str, Any]:
        """Return a chunk of text."""
        return self._chunk({"content": text} if self.chat else text)

    def last(self, text: GeneratedText) -> list[dict[str, Any]]:
        """Return the chunks after all text."""
        chunks = [{**self._chunk({} if self.chat else "", _finish(text)), "fleet": _session(text)}]
        if self.include_usage:
            chunks.append({**self._chunk(""), "choices": [], "usage": _usage(text)})
        return chunks

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, content: dict[str, str] | str, finish: str | None = None) -> dict[str, Any]:
        choice = {
            "index": 0,
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


def _usage(text: GeneratedText) -> dict[str, int]:
    prompt, written = len(text.request.prompt), len(text.generation.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def _session(text: GeneratedText) -> dict[str, Any]:
    """Return what OpenAI's shapes have no place for: how to find the session in the log, and how it went."""
    counters, policy, choice = text.generation.counters, text.request.policy, text.generation.choice
    return {
        "session": text.generation.session.hex(),
        "seed": policy.seed,
        "mode": policy.mode.value,
        "plan": choice and choice.plan,
        "plan_reason": choice and choice.reason,
        "streamed_tokens": counters.streamed,
        "acceptance": counters.acceptance,
        "rounds": counters.rounds,
        "uplink_bytes": counters.uplink_bytes,
        "downlink_bytes": counters.downlink_bytes,
        "resumes": text.generation.resumes,
    }

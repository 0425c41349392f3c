"""`POST /v1/responses`: OpenAI's newer request for a generation, as far as it is text in, text out.

It is read as a chat, and answered in its own shapes. Nothing is stored, so no response can be continued by its id: an
application sends the previous messages with its next request, as in a chat.
"""

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from fleet_device.api.problems import ApiProblem, problem_of
from fleet_device.api.replies import ChoiceEvents, Happened, session_summary, usage_of
from fleet_device.api.requests import ChatRequest, read_object, read_request
from fleet_device.requests.generate import GeneratedText
from fleet_device.requests.queue import Failed
from schemas.reasons import EndReason

_SAME: Final = frozenset(
    ("model", "temperature", "top_p", "top_k", "mode", "seed", "stream", "truncate", "offline", "rejoin", "grammar")
)
"""Parameters with the same name in a chat request."""

_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "background": (False,),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "parallel_tool_calls": (True, False),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "stream_options": ({}, {"include_obfuscation": False}, {"include_obfuscation": True}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
"""Parameters that are not supported, with the values that ask for nothing."""

_IGNORED: Final = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "user"})
_PARTS: Final = frozenset({"input_text", "output_text", "text"})


class _AsChat(ChatRequest):
    """A chat request whose errors name the fields of this request."""

    prompt_field: ClassVar[str] = "input"
    format_field: ClassVar[str] = "text"


def read_responses_request(body: bytes) -> ChatRequest:
    """Read a request's body as a chat; ApiProblem names the first error."""
    chat = _chat(read_object(body))
    try:
        return read_request(_AsChat, json.dumps(chat).encode())
    except ApiProblem as problem:
        named = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text"}
        first = (problem.param or "").partition(".")[0]
        if first not in named:
            raise
        raise ApiProblem(
            problem.status, str(problem).replace(first, named[first]), code=problem.code, param=named[first]
        ) from problem


def _chat(asked: Mapping[str, Any]) -> dict[str, Any]:
    chat: dict[str, Any] = {"messages": _messages(asked.get("input"), asked.get("instructions"))}
    for name, given in asked.items():
        if name in _SAME:
            chat[name] = given
        elif name == "max_output_tokens":
            chat["max_completion_tokens"] = given
        elif name == "text":
            chat |= _text(given)
        elif name in _NEUTRAL:
            _require_nothing(name, given)
        elif name not in _IGNORED | {"input", "instructions"}:
            raise ApiProblem(400, f"There is no parameter {name[:100]!r}.", code="unknown_parameter", param=name[:100])
    return chat


def _require_nothing(name: str, given: object) -> None:
    if given is None or any(given == neutral and type(given) is type(neutral) for neutral in _NEUTRAL[name]):
        return
    why = (
        "no response is stored here; send the previous messages as input"
        if name in ("previous_response_id", "conversation")
        else "leave it out"
    )
    raise ApiProblem(
        400,
        f"The parameter {name!r} is not supported with that value: {why}.",
        code="unsupported_parameter",
        param=name,
    )


def _text(given: object) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict) or set(given) - {"format", "verbosity"}:
        raise ApiProblem(400, "The parameter 'text' cannot be used: it has a format, and no more.", param="text")
    form = given.get("format")
    if given.get("verbosity") not in (None, "medium"):
        raise ApiProblem(
            400, "The parameter 'text.verbosity' is not supported; leave it out.",
            code="unsupported_parameter", param="text.verbosity",
        )  # fmt: skip
    if isinstance(form, dict) and form.get("type") == "json_schema":
        return {
            "response_format": {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}
        }
    return {} if form is None else {"response_format": form}


def _messages(given: object, instructions: object) -> list[dict[str, Any]]:
    if instructions is not None and not isinstance(instructions, str):
        raise ApiProblem(400, "The parameter 'instructions' cannot be used: it must be text.", param="instructions")
    system = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*system, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise ApiProblem(
            400, "The parameter 'input' cannot be used: it is a text, or a list of messages.", param="input"
        )
    return system + [_message(each) for each in given]


def _message(given: object) -> dict[str, Any]:
    if not isinstance(given, dict) or given.get("type", "message") != "message":
        kind = given.get("type") if isinstance(given, dict) else None
        what = f"an item of type {kind!r}"[:100] if isinstance(kind, str) else "an item that is none"
        raise ApiProblem(400, f"The parameter 'input' cannot be used: {what} is not supported.", param="input")
    content = given.get("content")
    if isinstance(content, list):
        content = [
            {**part, "type": "text"} if isinstance(part, dict) and part.get("type") in _PARTS else part
            for part in content
        ]
    return {"role": given.get("role"), "content": content}


@dataclass(slots=True)
class ResponseReply:
    name: str
    created: int
    model: str
    asked: ChatRequest
    _events: int = field(default=0)

    def whole(self, text: GeneratedText) -> dict[str, Any]:
        cut = text.reason is EndReason.LENGTH
        usage = usage_of([text])
        return {
            **self._head("incomplete" if cut else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._item(text.text, "incomplete" if cut else "completed")],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
                "fleet": usage["fleet"],
            },
            "fleet": session_summary(text),
        }

    def first(self) -> list[bytes]:
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        begun = self._head("in_progress") | {"output": [], "usage": None, "incomplete_details": None}
        empty = {**self._item("", "in_progress"), "content": []}
        return [
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
            self._event("response.output_item.added", output_index=0, item=empty),
            self._event("response.content_part.added", **place, part=_part("")),
        ]

    def piece(self, text: str) -> bytes:
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        return self._event("response.output_text.delta", **place, delta=text, logprobs=[])

    def last(self, text: GeneratedText) -> list[bytes]:
        whole = self.whole(text)
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        return [
            self._event("response.output_text.done", **place, text=text.text, logprobs=[]),
            self._event("response.content_part.done", **place, part=_part(text.text)),
            self._event("response.output_item.done", output_index=0, item=whole["output"][0]),
            self._event(f"response.{whole['status']}", response=whole),
        ]

    def failed(self, error: Exception) -> bytes:
        problem = problem_of(error)
        return self._event("error", code=problem.code, message=str(problem), param=problem.param)

    @property
    def _item_id(self) -> str:
        return f"msg_{self.name}"

    def _head(self, status: str) -> dict[str, Any]:
        return {
            "id": f"resp_{self.name}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "instructions": None,
            "max_output_tokens": self.asked.token_limit,
            "model": self.model,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "temperature": self.asked.temperature,
            "top_p": self.asked.top_p,
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
            "store": False,
            "metadata": {},
        }

    def _item(self, text: str, status: str) -> dict[str, Any]:
        return {"type": "message", "id": self._item_id, "status": status, "role": "assistant", "content": [_part(text)]}

    def _event(self, kind: str, **content: Any) -> bytes:  # noqa: ANN401 - JSON
        body = {"type": kind, "sequence_number": self._events, **content}
        self._events += 1
        return f"event: {kind}\ndata: ".encode() + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


async def stream_response(reply: ResponseReply, text: ChoiceEvents, first: Happened) -> AsyncIterator[bytes]:
    """Stream a response. Failures are sent as events, because the status has been sent already."""
    for sent in reply.first():
        yield sent
    _, current = first
    while True:
        if isinstance(current, Failed):
            yield reply.failed(current.error)
            return
        if isinstance(current, GeneratedText):
            for sent in reply.last(current):
                yield sent
            return
        yield text.comment_or(current, reply.piece)
        _, current = await text.next()

"""Ollama's API, translated: `/api/chat` and `/api/generate` are read as a chat or a completion."""

import json
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from fleet_common.grammar.closing import closed
from fleet_device.api.problems import problem_of
from fleet_device.api.replies import ChoiceEvents, Happened
from fleet_device.api.requests import ChatRequest, CompletionRequest, TextRequest, validated
from fleet_device.requests.generate import GeneratedText, Piece
from fleet_device.requests.queue import Failed
from fleet_device.requests.structured import ToolCalls, schema_grammar

MEDIA_TYPE: Final = "application/x-ndjson"

_BUDGETS: Final = {"low": 1024, "medium": 8192}
"""Most tokens of the thinking by its level: our choice, since most templates cannot tell levels apart."""

_Zero = Annotated[float, Field(ge=0, le=0)] | None
_One = Annotated[float, Field(ge=1, le=1)] | None
_Nothing = Annotated[tuple[Any, ...], Field(max_length=0)] | None


class _Lenient(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class OllamaOptions(_Lenient):
    """Options of the model. Those of memory and speed are ignored; what would change the output must change nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    num_predict: int | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_p: float | None = None
    typical_p: _One = None
    mirostat: _Zero = None


class OllamaFunction(_Lenient):
    name: str
    arguments: dict[str, Any]


class OllamaCall(_Lenient):
    function: OllamaFunction


class OllamaMessage(_Lenient):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: tuple[OllamaCall, ...] | None = None
    images: _Nothing = None
    thinking: str | None = None

    def openai(self, names: Iterator[str], called: deque[str]) -> dict[str, Any]:
        """Return the message in OpenAI's shape, its calls named by `names`; `called` has those without a result."""
        calls = []
        for each in self.tool_calls or ():
            called.append(name := next(names))
            function = {"name": each.function.name, "arguments": json.dumps(each.function.arguments)}
            calls.append({"id": name, "function": function})
        result = {"tool_call_id": called.popleft() if called else next(names)} if self.role == "tool" else {}
        said = {"role": self.role, "content": self.content or "", "tool_calls": calls or None, **result}
        return said | ({"reasoning_content": self.thinking} if self.thinking else {})


class OllamaRequest(BaseModel):
    """Fields of both requests; `keep_alive` has no effect."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: Annotated[str, Field(min_length=1)]
    stream: bool = True
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: OllamaOptions | None = None
    keep_alive: Any = None
    think: bool | Literal["low", "medium", "high"] | None = None

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        if isinstance(self.format, dict):
            return self.format or None
        return {"type": "object"} if self.format == "json" else None

    def fields(self) -> dict[str, Any]:
        """Return the fields that a chat and a completion have in common."""
        options = self.options or OllamaOptions()
        names = ("temperature", "top_k", "top_p", "stop", "min_p", "presence_penalty", "frequency_penalty")
        given = {name: getattr(options, name) for name in names}
        given["repetition_penalty"] = options.repeat_penalty
        if options.seed is not None and options.seed >= 0:
            given["seed"] = options.seed
        if options.num_predict is not None and options.num_predict > 0:  # others: until the model ends
            given["max_tokens"] = options.num_predict
        return {"model": self.model, "stream": self.stream, **given}

    def chat(self, **fields: Any) -> ChatRequest:  # noqa: ANN401 - JSON
        schema = self.schema_of_answer
        if schema is not None:
            fields["response_format"] = {"type": "json_object", "schema": schema}
        if isinstance(self.think, str):
            fields |= {"reasoning_effort": self.think, "thinking_token_budget": _BUDGETS.get(self.think)}
        elif self.think is not None:
            fields["reasoning_effort"] = "medium" if self.think else "none"
        return validated(_AsChat, self.fields() | fields)


class _AsChat(ChatRequest):
    """A chat request. Clients may leave out the calls whose results they send."""

    needs_calls: ClassVar[bool] = False


class OllamaChatRequest(OllamaRequest):
    """`POST /api/chat`. Without messages it only says that the model is there."""

    messages: tuple[OllamaMessage, ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None

    def openai(self) -> TextRequest | None:
        """Return the request in OpenAI's shape, None if it asks for no text; raise ApiProblem as that does."""
        # Ollama's calls have no ids: results follow in the order of their calls.
        names, called = map("call_{}".format, count()), deque[str]()
        messages = [each.openai(names, called) for each in self.messages]
        return self.chat(messages=messages, tools=self.tools) if messages else None


class OllamaGenerateRequest(OllamaRequest):
    """`POST /api/generate`. Without a prompt it only says that the model is there."""

    prompt: str = ""
    system: str = ""
    raw: bool = False
    suffix: Literal[""] | None = None
    template: Literal[""] | None = None
    context: _Nothing = None
    images: _Nothing = None

    def openai(self) -> TextRequest | None:
        """Return the request in OpenAI's shape, None if it asks for no text; raise ApiProblem as that does."""
        if not self.prompt:
            return None
        if self.raw:
            schema = self.schema_of_answer
            grammar = None if schema is None else schema_grammar(closed(schema))
            return validated(CompletionRequest, self.fields() | {"prompt": self.prompt, "grammar": grammar})
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.chat(messages=[*system, {"role": "user", "content": self.prompt}])


class OllamaShowRequest(BaseModel):
    """`POST /api/show`; `name` is an older name of `model`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = ""
    name: str = ""
    verbose: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaReply:
    """The shapes of one answer: lines of JSON. `chat`: of a chat; `tools` reads tool calls if there may be some."""

    chat: bool
    model: str
    created_at: str
    tools: ToolCalls | None = None

    def loaded(self) -> dict[str, Any]:
        """Return the answer to a request without a prompt, by which Ollama's clients load a model."""
        return self._line("") | {"done": True, "done_reason": "load"}

    def whole(self, text: GeneratedText) -> dict[str, Any]:
        said: dict[str, Any] = {"content": text.text}
        if self.tools is not None:
            said = self.tools.message(text.text, text.request.native_calls)
        return self._line(said["content"] or "", said.get("tool_calls"), text.reasoning) | _ended(text)

    def pieces(self, piece: Piece | None) -> list[dict[str, Any]]:
        """Return the lines of a piece; an empty one if nothing came, so that the connection is seen to be alive."""
        if piece is None:
            return [self._line("")]
        lines = [self._line("", thinking=piece.reasoning)] if piece.reasoning else []
        if lines and not piece.text:
            return lines
        deltas: list[dict[str, Any]] = [{"content": piece.text}]
        if self.tools is not None:
            deltas = self.tools.pieces(0, piece.text, piece.native_calls)
        return lines + [self._line(delta["content"]) for delta in deltas if "content" in delta]

    def last(self, text: GeneratedText) -> list[dict[str, Any]]:
        """Return the last lines, with all calls as a whole."""
        if self.tools is None:
            return [self._line("") | _ended(text)]
        rest = [self._line(each["content"]) for each in self.tools.last(0) if "content" in each]
        calls = self.tools.message(text.text, text.request.native_calls).get("tool_calls")
        return [*rest, self._line("", calls) | _ended(text)]

    def _line(self, text: str, calls: list[dict[str, Any]] | None = None, thinking: str = "") -> dict[str, Any]:
        thought = {"thinking": thinking} if thinking else {}
        said: Mapping[str, Any] = {"response": text, **thought}
        if self.chat:
            message = {"role": "assistant", "content": text, **thought}
            said = {"message": message if calls is None else message | {"tool_calls": _calls(calls)}}
        return {"model": self.model, "created_at": self.created_at, **said, "done": False}


def _calls(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return calls in Ollama's shape; one that was cut off has no arguments, and is left out."""
    found = []
    for call in calls:
        try:
            arguments = json.loads(call["function"]["arguments"])
        except ValueError:
            continue
        found.append({"function": {"name": call["function"]["name"], "arguments": arguments}})
    return found


def _ended(text: GeneratedText) -> dict[str, Any]:
    """Return the fields of the last line; durations are in nanoseconds."""
    whole = int(text.generation.wall_ms * 1e6)
    first = min(whole, int((text.generation.first_ms or 0.0) * 1e6))
    return {
        "done": True,
        "done_reason": text.reason.value,
        "total_duration": whole,
        "load_duration": 0,
        "prompt_eval_count": len(text.request.prompt),
        "prompt_eval_duration": first,
        "eval_count": len(text.tokens),
        "eval_duration": whole - first,
    }


async def stream_lines(reply: OllamaReply, text: ChoiceEvents, first: Happened) -> AsyncIterator[bytes]:
    """Stream an answer. Failures are sent as lines, because the status has been sent already."""
    _, current = first
    while True:
        match current:
            case Failed():
                yield _json({"error": str(problem_of(current.error))})
                return
            case GeneratedText():
                for line in reply.last(current):
                    yield _json(line)
                return
            case Piece():
                lines = reply.pieces(current)
            case _:
                lines = reply.pieces(None)
        for line in lines:
            yield _json(line)
        _, current = await text.next()


def _json(line: dict[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"

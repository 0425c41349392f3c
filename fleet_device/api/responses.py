"""`POST /v1/responses`: OpenAI's newer request for a generation: text and functions.

It is read as a chat, and answered in its own shapes. Only those in the background are stored, for minutes, and none can
be continued by its id: an application sends the previous messages with its next request, as in a chat.
"""

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from fleet_device.api.logprobs import TokenSpelling, spelled_tokens, token_logprobs
from fleet_device.api.problems import problem_of
from fleet_device.api.replies import ChoiceEvents, Happened, session_summary, usage_of
from fleet_device.api.requests import ChatRequest, GenerationRequest, TokenLimit
from fleet_device.requests.generate import GeneratedText, Piece
from fleet_device.requests.queue import Failed
from fleet_device.requests.structured import (
    MISSING,
    NAME,
    AllowedTools,
    CalledFunction,
    Function,
    NamedFunction,
    NamedSchema,
    RequestMessage,
    ResponseFormat,
    StrictModel,
    TextContent,
    Tool,
    ToolCall,
    ToolCalls,
    unusable,
)
from fleet_device.requests.thinking import TemplateVariables
from fleet_device.settings import DeviceSettings, ReasoningEffort
from schemas.fields import MAX_TOKENS, MAX_TOP_LOGPROBS
from schemas.reasons import EndReason


class _Item(BaseModel):
    """An item of the input. An application sends those of earlier answers back, with fields of which none is needed."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class MessageItem(_Item):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: TextContent


class CallItem(_Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class ReasoningText(_Item):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(_Item):
    """Thinking of an earlier answer; one without a text, as OpenAI's own models give it, has no effect."""

    type: Literal["reasoning"]
    content: tuple[ReasoningText, ...] | None = None


class ResultItem(_Item):
    type: Literal["function_call_output"]
    call_id: str
    output: TextContent


def _kind(item: object) -> object:
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]
_KINDS: Final = ("message", "function_call", "function_call_output", "reasoning")


def _items(given: object) -> object:
    if isinstance(given, str):
        return (MessageItem(role="user", content=given),)
    if not isinstance(given, list) or not given:
        raise ValueError("it is a text, or a list of messages")
    for each in given:
        if (kind := _kind(each)) not in _KINDS:
            what = f"an item of type {kind!r}"[:100] if isinstance(kind, str) else "an item that is none"
            raise ValueError(f"{what} is not supported")
    return given


class _OfFunction(StrictModel):
    type: Literal["function"]


class FunctionTool(Function, _OfFunction): ...


class FunctionChoice(_OfFunction):
    name: str

    def of_chat(self) -> NamedFunction:
        return NamedFunction(type="function", function=NamedFunction.Name(name=self.name))


class AllowedChoice(StrictModel):
    """`tool_choice` of a chat, in one level."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[tuple[FunctionChoice, ...], Field(min_length=1, max_length=128, fail_fast=True)]

    def of_chat(self) -> AllowedTools:
        tools = tuple(each.of_chat() for each in self.tools)
        return AllowedTools(type=self.type, allowed_tools=AllowedTools.Tools(mode=self.mode, tools=tools))


class TextFormat(StrictModel):
    """`response_format` of a chat, in one level."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=NAME)] | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    def response_format(self) -> ResponseFormat:
        if self.schema_ is None or self.name is None:
            return ResponseFormat(type=self.type)
        schema = NamedSchema(name=self.name, schema=self.schema_, strict=self.strict)
        return ResponseFormat(type=self.type, json_schema=schema)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for name, value in (("name", self.name), ("schema", self.schema_)):
            if self.type == "json_schema" and value is None:
                raise unusable(f"text.format.{name}", "it is required", code=MISSING)
        if self.type != "json_schema" and self.schema_ is not None:
            raise unusable("text.format.schema", "it goes only with the type json_schema")
        return self


class TextField(StrictModel):
    format: TextFormat | None = None
    verbosity: Any = None


class ReasoningField(StrictModel):
    """How long the model thinks. There are no summaries: the thinking itself is in the answer."""

    effort: ReasoningEffort | None = None
    summary: Any = None
    generate_summary: Any = None


class ResponsesRequest(GenerationRequest):
    """`POST /v1/responses`. The labels come back in the answer."""

    needs_model: ClassVar[bool] = True

    input: Annotated[
        tuple[InputItem, ...],
        BeforeValidator(_items, json_schema_input_type=str | Annotated[list[InputItem], Field(min_length=1)]),
    ]
    instructions: str | None = None
    max_output_tokens: TokenLimit | None = None
    text: TextField | None = None
    reasoning: ReasoningField | None = None
    chat_template_kwargs: TemplateVariables | None = None
    thinking_token_budget: Annotated[int, Field(ge=0, le=MAX_TOKENS, strict=True)] | None = None
    tools: Annotated[tuple[FunctionTool, ...], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | AllowedChoice | None = None
    parallel_tool_calls: Annotated[bool, Field(strict=True)] | None = None
    include: tuple[Literal["message.output_text.logprobs"], ...] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS, strict=True)] | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool = False

    @model_validator(mode="after")
    def _stored(self) -> Self:
        if self.store and not self.background:
            raise unusable("store", "only a response in the background is stored; send background too")
        return self

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if not self._messages():
            raise unusable("input", "it has only an earlier thinking; add a message")
        return self

    def chat(self) -> ChatRequest:
        """Return the same as a chat; raise InvalidRequest as that does."""
        choice = self.tool_choice if isinstance(self.tool_choice, str | None) else self.tool_choice.of_chat()
        given = {name: getattr(self, name) for name in GenerationRequest.model_fields}
        return _AsChat(
            **given,
            messages=self._messages(),
            max_completion_tokens=self.max_output_tokens,
            response_format=self.text.format.response_format() if self.text and self.text.format else None,
            tools=tuple(Tool(type="function", function=each) for each in self.tools or ()),
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            logprobs=bool(self.include or self.top_logprobs),
            top_logprobs=self.top_logprobs,
            reasoning_effort=self.reasoning and self.reasoning.effort,
            chat_template_kwargs=self.chat_template_kwargs,
            thinking_token_budget=self.thinking_token_budget,
        )

    def _messages(self) -> tuple[RequestMessage, ...]:
        messages = [RequestMessage(role="system", content=self.instructions)] if self.instructions else []
        thought: str | None = None
        for item in self.input:
            match item:
                case ReasoningItem():
                    thought = "".join(part.text for part in item.content or ()) or None
                    continue
                case MessageItem():
                    reasoning = thought if item.role == "assistant" else None
                    messages.append(RequestMessage(role=item.role, content=item.content, reasoning_content=reasoning))
                case CallItem():
                    function = CalledFunction(name=item.name, arguments=item.arguments)
                    call = ToolCall(id=item.call_id, function=function)
                    before = messages[-1] if messages and messages[-1].role == "assistant" else None
                    if before is None:
                        messages.append(
                            RequestMessage(role="assistant", content="", tool_calls=(call,), reasoning_content=thought)
                        )
                    else:  # a model may call several functions in one turn
                        messages[-1] = before.model_copy(update={"tool_calls": (*(before.tool_calls or ()), call)})
                case ResultItem():
                    messages.append(RequestMessage(role="tool", content=item.output, tool_call_id=item.call_id))
            thought = None
        return tuple(messages)


class _AsChat(ChatRequest):
    """A chat request whose errors name the fields of this request."""

    prompt_field: ClassVar[str] = "input"
    format_field: ClassVar[str] = "text"


@dataclass(slots=True)
class ResponseReply:
    """The shapes of one response.

    `tools` turns generated output into function calls, if the request allows that; `spelling` is None if no
    log-probabilities were requested. A function call has none.
    """

    name: str
    created: int
    model: str
    asked: ResponsesRequest
    settings: DeviceSettings
    wall_clock: Callable[[], float] = time.time
    tools: ToolCalls | None = None
    spelling: TokenSpelling | None = None
    _events: int = 0
    _items: list[dict[str, Any]] = field(default_factory=list)  # of a stream; the last one grows
    _grown: str = ""  # text or arguments of the last one
    _logprobs: list[dict[str, Any]] = field(default_factory=list)  # of its text
    _unsent: int = 0  # of these, at the end

    def whole(self, text: GeneratedText) -> dict[str, Any]:
        said: dict[str, Any] = (
            {"content": text.text} if self.tools is None else self.tools.message(text.text, text.request.native_calls)
        )
        items = [self._reasoning(text.reasoning)] if text.reasoning else []
        if calls := said.get("tool_calls"):
            called = [self._call(place, call, **call["function"]) for place, call in enumerate(calls)]
            said_first = [self._message(said["content"], [])] if said["content"] else []
            return self._ended(text, items + said_first + called)
        if items and not text.text:  # cut within the thinking
            return self._ended(text, items)
        logprobs = token_logprobs(spelled_tokens(text), self.spelling) if self.spelling else []
        return self._ended(text, [*items, self._message(said["content"], logprobs)])

    def first(self) -> list[bytes]:
        begun = self._head("in_progress") | {"output": [], "usage": None}
        return [self._event("response.created", response=begun), self._event("response.in_progress", response=begun)]

    def piece(self, piece: Piece) -> list[bytes]:
        if self.spelling is not None:
            found = token_logprobs([(part.token, part.logprobs) for part in piece.parts], self.spelling)
            self._logprobs += found
            self._unsent += len(found)
        deltas: list[dict[str, Any]] = [{"reasoning_content": piece.reasoning}] if piece.reasoning else []
        if self.tools is not None:
            deltas += self.tools.pieces(0, piece.text, piece.native_calls)
        elif piece.text or not deltas:
            deltas.append({"content": piece.text})
        return [sent for delta in deltas for sent in self._delta(delta)]

    def last(self, text: GeneratedText) -> list[bytes]:
        rest = [] if self.tools is None else self.tools.last(0)
        sent = [each for delta in rest for each in self._delta(delta)]
        if not self._items:
            sent += self._begin(self._message(""))
        status = _status(text)
        whole = self._ended(text, [*self._items[:-1], self._finished()])
        return [*sent, *self._end(status), self._event(f"response.{status}", response=whole)]

    def failed(self, error: Exception) -> bytes:
        problem = problem_of(error)
        if self.asked.background:
            if problem.code == "cancelled":
                return self._event("response.failed", response=self.unfinished("cancelled"))
            cause = {"code": problem.code, "message": str(problem)}
            return self._event("response.failed", response=self.unfinished("failed") | {"error": cause})
        return self._event("error", code=problem.code, message=str(problem), param=problem.param)

    def unfinished(self, status: str) -> dict[str, Any]:
        """Return the response with what there is."""
        items = [*self._items[:-1], self._finished() | {"status": "incomplete"}] if self._items else []
        return self._head(status) | {"output": items, "usage": None}

    def ended_as(self, last: bytes) -> dict[str, Any]:
        """Return the response of the last event of a stream."""
        response: dict[str, Any] = json.loads(last.partition(b"data: ")[2])["response"]
        return response

    def _delta(self, delta: dict[str, Any]) -> list[bytes]:
        """Return the events of a delta in a chat's shape; the first one of each item begins it."""
        sent, kind = [], "response.output_text.delta"
        if calls := delta.get("tool_calls"):
            [call] = calls
            kind, text = "response.function_call_arguments.delta", call["function"]["arguments"]
            if "id" in call:
                if self._items:
                    sent += self._end("completed")
                sent += self._begin(self._call(call["index"], call, call["function"]["name"], ""))
            place = self._place
        elif thought := delta.get("reasoning_content"):
            kind, text = "response.reasoning_text.delta", thought
            if not self._items:
                sent += self._begin(self._reasoning(""))
            place = self._part
        else:
            text = delta["content"]
            if self._items and self._items[-1]["type"] == "reasoning":
                if not text:
                    return []
                sent += self._end("completed")
                sent += self._begin(self._message(""))
            elif not self._items:
                sent += self._begin(self._message(""))
            place = self._part | {"logprobs": self._logprobs[len(self._logprobs) - self._unsent :]}
            self._unsent = 0 if text else self._unsent
        self._grown += text
        return [*sent, self._event(kind, **place, delta=text)] if text else sent

    def _begin(self, item: dict[str, Any]) -> list[bytes]:
        self._items.append(item)
        self._grown = ""
        empty = item | {"status": "in_progress"} | ({"content": []} if "content" in item else {})
        sent = [self._event("response.output_item.added", output_index=len(self._items) - 1, item=empty)]
        if "content" in item:
            part = item["content"][0] | {"text": ""}
            sent.append(self._event("response.content_part.added", **self._part, part=part))
        return sent

    def _finished(self) -> dict[str, Any]:
        """Return the last item with all of its text or arguments."""
        match self._items[-1]["type"]:
            case "function_call":
                return self._items[-1] | {"arguments": self._grown}
            case "reasoning":
                return self._reasoning(self._grown)
        return self._message(self._grown, self._logprobs)

    def _end(self, status: str) -> list[bytes]:
        """Return the events that end the last item."""
        self._items[-1] = item = self._finished() | {"status": status}
        if item["type"] == "function_call":
            named = self._place | {"name": item["name"], "arguments": self._grown}
            sent = [self._event("response.function_call_arguments.done", **named)]
        else:
            if item["type"] == "reasoning":
                done = self._event("response.reasoning_text.done", **self._part, text=self._grown)
            else:
                done = self._event("response.output_text.done", **self._part, text=self._grown, logprobs=self._logprobs)
            sent = [done, self._event("response.content_part.done", **self._part, part=item["content"][0])]
        return [*sent, self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)]

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    @property
    def _part(self) -> dict[str, Any]:
        return self._place | {"content_index": 0}

    def _message(self, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        return {
            "type": "message", "id": f"msg_{self.name}", "status": "completed", "role": "assistant",
            "content": [_part(text, logprobs)],
        }  # fmt: skip

    def _reasoning(self, text: str) -> dict[str, Any]:
        return {
            "type": "reasoning", "id": f"rs_{self.name}", "status": "completed", "summary": [],
            "content": [{"type": "reasoning_text", "text": text}], "encrypted_content": None,
        }  # fmt: skip

    def _call(self, place: int, call: dict[str, Any], name: str, arguments: str) -> dict[str, Any]:
        return {
            "type": "function_call", "id": f"fc_{self.name}_{place}", "call_id": call["id"], "status": "completed",
            "name": name, "arguments": arguments,
        }  # fmt: skip

    def _ended(self, text: GeneratedText, items: list[dict[str, Any]]) -> dict[str, Any]:
        status, usage = _status(text), usage_of([text])
        return {
            **self._head(status),
            "completed_at": int(self.wall_clock()) if status == "completed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [*items[:-1], items[-1] | {"status": status}],
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": text.reasoning_tokens},
                "total_tokens": usage["total_tokens"],
                "fleet": usage["fleet"],
            },
            "fleet": session_summary(text),
        }

    def _head(self, status: str) -> dict[str, Any]:
        asked, settings = self.asked, self.settings
        form = asked.text.format if asked.text and asked.text.format else TextFormat(type="text")
        described = {"type": form.type}
        if form.type == "json_schema":
            described = form.model_dump(by_alias=True) | {"strict": bool(form.strict)}
        choice = asked.tool_choice or "auto"
        return {
            "id": f"resp_{self.name}",
            "object": "response",
            "created_at": self.created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self.model,
            "temperature": settings.temperature if asked.temperature is None else asked.temperature,
            "top_p": settings.top_p if asked.top_p is None else asked.top_p,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "top_logprobs": asked.top_logprobs or 0,
            "text": {"format": described, "verbosity": "medium"},
            "tools": [tool.model_dump() for tool in asked.tools or ()],
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "max_tool_calls": None,
            "reasoning": asked.reasoning and {"effort": asked.reasoning.effort, "summary": None},
            "truncation": "disabled",
            "previous_response_id": None,
            "store": asked.background,
            "background": asked.background,
            "service_tier": "default",
            "metadata": asked.metadata or {},
            "safety_identifier": asked.safety_identifier,
            "prompt_cache_key": asked.prompt_cache_key,
        }

    def _event(self, kind: str, **content: Any) -> bytes:  # noqa: ANN401 - JSON
        body = {"type": kind, "sequence_number": self._events, **content}
        self._events += 1
        return f"event: {kind}\ndata: ".encode() + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def _status(text: GeneratedText) -> str:
    return "incomplete" if text.reason is EndReason.LENGTH else "completed"


def _part(text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


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
        for sent in text.comment_or(current, reply.piece):
            yield sent
        _, current = await text.next()

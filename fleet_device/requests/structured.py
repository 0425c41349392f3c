"""Chat messages, functions and response formats in OpenAI's shapes: one grammar for an answer, and the calls in it."""

import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import to_json

from fleet_common.grammar.closing import closed
from fleet_device.errors import InvalidRequest
from fleet_device.requests.call_formats import CallFormat, NativeCalls, Schemas
from schemas.policy import MAX_GRAMMAR_BYTES, Grammar, GrammarKind

PLAIN_ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of messages, and their names in chat templates."""


NAME: Final = r"^[A-Za-z0-9_-]{1,64}$"
"""Pattern of the names of functions and formats."""

_ANY_OBJECT: Final[dict[str, Any]] = {"type": "object", "properties": {}, "additionalProperties": False}
_MAX_TOOLS: Final = 128

MAX_CALLS: Final = 8
"""Most calls in one answer: a small model may repeat itself until its tokens are used up."""


MISSING: Final = "missing_required_parameter"
"""OpenAI's code of the error."""


def unusable(param: str, what: str, *, code: str | None = None) -> InvalidRequest:
    """Return the error of a wrong parameter; `what` completes the sentence, without a full stop."""
    return InvalidRequest(f"The parameter {param!r} cannot be used: {what}.", param=param, code=code)


class StrictModel(BaseModel):
    """Base of the models of requests."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# Messages


class TextPart(BaseModel):
    """A part of a content; `refusal` and `annotations`, of an answer that is sent back, are ignored."""

    type: Literal["text", "input_text", "output_text"]
    text: str


_PARTS: Final = get_args(TextPart.model_fields["type"].annotation)


def _content(value: object) -> object:
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _PARTS or not isinstance(part.get("text"), str):
            what = f"a part of type {kind!r}" if isinstance(kind, str) else "a part that is none"
            raise ValueError(f"{what} is not supported, the model reads text only")
        texts.append(part["text"])
    return "".join(texts)


TextContent = Annotated[str, BeforeValidator(_content, json_schema_input_type=str | list[TextPart])]


class CalledFunction(StrictModel):
    """A call's function, with its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(StrictModel):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction

    @model_validator(mode="before")
    @classmethod
    def _without_place(cls, value: Any) -> Any:  # noqa: ANN401 - whatever was sent
        # Clients that put an answer together from its stream send the pieces' number back.
        return {key: inner for key, inner in value.items() if key != "index"} if isinstance(value, dict) else value


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """Message of a chat.

    Attributes:
        reasoning: The thinking before an answer.
        calls: Functions that an answer calls.
        call_id: The call whose result a message of the role `tool` is.
    """

    role: str
    content: str
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""

    def in_words(self) -> "ChatMessage":
        """Return the message with calls and results in its content, for templates without a place for them."""
        content = self.content
        for call in self.calls:
            called = f'{{"name": {to_json(call.function.name).decode()}, "arguments": {call.function.arguments}}}'
            content = f"{content}\n{called}" if content else called
        if self.role == "tool":
            return ChatMessage("user", f"The function returned: {content}")
        return ChatMessage(self.role, content, self.reasoning)


class RequestMessage(StrictModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: TextContent
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only a message of the assistant has tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("a message of the role tool has a tool_call_id, and no other has one")
        return self

    def plain(self) -> ChatMessage:
        """Return the message for a chat template."""
        role, calls = PLAIN_ROLES.get(self.role, self.role), self.tool_calls or ()
        return ChatMessage(role, self.content, self.reasoning_content or "", calls, self.tool_call_id or "")

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, value: Any) -> Any:  # noqa: ANN401 - whatever was sent
        # Applications send answers back unchanged, with empty fields.
        if not isinstance(value, dict):
            return value
        if value.get("content") is None and (value.get("tool_calls") or value.get("role") == "assistant"):
            value = value | {"content": ""}
        if "reasoning" in value:  # vLLM's newer name
            value = {**value, "reasoning_content": value.get("reasoning_content") or value["reasoning"]}
            del value["reasoning"]
        return {key: inner for key, inner in value.items() if key in cls.model_fields or inner not in (None, [])}


# Formats and functions


class NamedSchema(StrictModel):
    """A JSON schema with a name and a description for people. The text always matches it; `strict` closes objects."""

    name: str = Field(pattern=NAME)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """The form of an answer; `schema`, with the type `json_object`, is llama.cpp's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _whole(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise unusable("response_format.json_schema", "it is required", code=MISSING)
        if self.type != "json_schema" and self.json_schema is not None:
            raise unusable("response_format.json_schema", "it goes only with the type json_schema")
        if self.type != "json_object" and self.schema_ is not None:
            raise unusable("response_format.schema", "it goes only with the type json_object")
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The schema of the answer; None for any text."""
        if self.type == "text":
            return None
        if self.json_schema is None:
            return closed(self.schema_) if self.schema_ else {"type": "object"}
        return closed(self.json_schema.schema_) if self.json_schema.strict else self.json_schema.schema_


class Function(StrictModel):
    """A function that the model may call; `strict` is ignored: arguments always match the schema, closed."""

    name: str = Field(pattern=NAME)
    description: str | None = Field(default=None, max_length=10_000)
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        return self.parameters or _ANY_OBJECT


class Tool(StrictModel):
    type: Literal["function"]
    function: Function


class NamedFunction(StrictModel):
    class Name(StrictModel):
        name: str

    type: Literal["function"]
    function: Name


class AllowedTools(StrictModel):
    """Choose among some of the tools."""

    class Tools(StrictModel):
        mode: Literal["auto", "required"]
        tools: Annotated[tuple[NamedFunction, ...], Field(min_length=1, max_length=_MAX_TOOLS, fail_fast=True)]

    type: Literal["allowed_tools"]
    allowed_tools: Tools


ToolChoice = Literal["none", "auto", "required"] | NamedFunction | AllowedTools


class ToolOptions(StrictModel):
    """Functions that an answer may call: `tools`, which of them, and whether several at once."""

    tools: Annotated[tuple[Tool, ...], Field(max_length=_MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: Annotated[bool, Field(strict=True)] | None = None

    def tool_offer(self, schema: dict[str, Any] | None = None) -> "ToolOffer | None":
        """Read the tools of a request, None without any; raise InvalidRequest for a choice that none of them fits.

        `schema` is that of an answer without a call; None for any text.
        """
        tools, choice = self.tools or (), self.tool_choice or "auto"
        match choice:
            case NamedFunction():
                names = [choice.function.name]
            case AllowedTools():
                names = [each.function.name for each in choice.allowed_tools.tools]
            case _:
                names = [] if choice == "none" else [tool.function.name for tool in tools]
        if not tools and choice not in ("none", "auto"):
            raise unusable("tool_choice", "it asks for a call, and there are no tools")
        for name in names:
            if name not in {tool.function.name for tool in tools}:
                raise unusable("tool_choice", f"it names {name[:64]!r}, which is none of the tools")
        offered = tuple(tool.function for tool in tools if tool.function.name in names)
        if not offered:
            return None
        return ToolOffer(
            offered,
            schema,
            is_arguments=isinstance(choice, NamedFunction),
            may_talk=choice == "auto" or (isinstance(choice, AllowedTools) and choice.allowed_tools.mode == "auto"),
            parallel=self.parallel_tool_calls is not False,
        )


_COMPACT: Final = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""Options of a schema within another grammar: a call is on one line, and begins as `_begin` says."""


@dataclass(frozen=True, slots=True)
class ToolOffer:
    """The functions that an answer may call.

    Attributes:
        schema: Of an answer without a call; None for any text.
        is_arguments: The whole answer is the arguments of the only function.
        may_talk: The answer may be one without a call.
        parallel: The answer may have several calls, one in a line.
        native: Format of the calls that the model was trained with; None for our own, which `chat` describes.
    """

    functions: tuple[Function, ...]
    schema: dict[str, Any] | None = None
    is_arguments: bool = False
    may_talk: bool = False
    parallel: bool = True
    native: CallFormat | None = None

    def with_format(self, native: CallFormat | None) -> "ToolOffer":
        """Return the offer with a format, if that can express it: one that must call needs a grammar of calls."""
        if native is None or self.schema is not None or not (self.may_talk or native.call):
            return self
        return replace(self, native=native)

    @property
    def described(self) -> list[dict[str, Any]]:
        """The functions as chat templates get them."""
        return [
            {
                "type": "function",
                "function": {
                    "name": each.name,
                    "description": each.description or "",
                    "parameters": each.schema_of_arguments,
                },
            }
            for each in self.functions
        ]

    def shaping(self) -> Grammar | None:
        """Return the grammar of the answer in its format; None if the model itself chooses, as it was trained to."""
        if self.native is None:
            return self.grammar()
        if self.may_talk or self.native.call is None:
            return None
        before, behind, key = map(json.dumps, self.native.call)
        ways = [_call(each, f"#/anyOf/{place}", json.loads(key)) for place, each in enumerate(self.functions)]
        marks = [mark for mark in (before, "body", behind) if mark != '""']
        calls = f'calls: call ("\\n" call)~0..{MAX_CALLS - 1}' if self.parallel else "calls: call"
        body = f"body: %json {_text({'anyOf': ways, 'x-guidance': _COMPACT})}"
        return Grammar.lark("\n".join(["start: calls", calls, f"call: {' '.join(marks)}", body, ""]))

    def grammar(self) -> Grammar:
        """Return the grammar of the answer in our own format; raise InvalidRequest if it is too long."""
        try:
            if self.is_arguments:
                return schema_grammar(closed(self.functions[0].schema_of_arguments))
            return Grammar.lark(self._lark())
        except ValidationError:
            raise unusable("tools", f"its grammar has more than {MAX_GRAMMAR_BYTES} bytes") from None

    def chat(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """Return a chat whose system message describes the functions and our own format."""
        described = self._description()
        if messages[0].role == "system":
            return [ChatMessage("system", f"{messages[0].content}\n\n{described}"), *messages[1:]]
        return [ChatMessage("system", described), *messages]

    def calls(self, name: str = "") -> "ToolCalls":
        """Return a reader of answers."""
        schemas = {each.name: each.schema_of_arguments for each in self.functions}
        named = name or secrets.token_hex(12)
        return ToolCalls(
            schemas, is_arguments=self.is_arguments, may_talk=self.may_talk, parallel=self.parallel, name=named
        )

    def read(self, text: str) -> tuple[ToolCall, ...]:
        """Return the calls in a whole answer."""
        return tuple(map(ToolCall.model_validate, self.calls().message(text, self.native).get("tool_calls", ())))

    def _lark(self) -> str:
        ways = [_call(function, f"#/anyOf/{place}") for place, function in enumerate(self.functions)]
        answers, rules = ["calls"], [f"call: %json {_text({'anyOf': ways, 'x-guidance': _COMPACT})}"]
        rules.append(f'calls: call ("\\n" call)~0..{MAX_CALLS - 1}' if self.parallel else "calls: call")
        if self.may_talk and self.schema is not None:
            answers.append("answer")
            rules.append(f"answer: %json {_text(self.schema | {'x-guidance': _COMPACT})}")
        elif self.may_talk:
            # A text that begins with a brace is a call, so the model itself chooses.
            answers += ["TEXT", '""']
            rules.append(r"TEXT: /[^{](.|\n)*/")
        return "\n".join([f"start: {' | '.join(answers)}", *rules, ""])

    def _description(self) -> str:
        lines = []
        for function in self.functions:
            lines.append(f"- {function.name}: {function.description or 'no description'}")
            schema = json.dumps(function.schema_of_arguments, ensure_ascii=False)
            lines.append(f"  Arguments, as a JSON schema: {schema}")
        if self.is_arguments:
            how = "Answer with nothing but the arguments of a call of this function, as JSON."
        else:
            how = 'To call a function, answer with nothing but {"name": "its name", "arguments": {its arguments}}.'
            if self.parallel:
                how += " To call several, write one such line for each."
            if not self.may_talk:
                how += " Call one now."
            else:
                form = "in plain words" if self.schema is None else "in the required format"
                how += f" Otherwise answer {form}."
        return "\n".join(["You can call these functions:", *lines, how])


def schema_grammar(schema: dict[str, Any]) -> Grammar:
    if schema == {"type": "object"}:
        return Grammar(kind=GrammarKind.JSON_OBJECT)
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=_text(schema))


def _text(schema: object) -> str:
    return json.dumps(schema, separators=(",", ":"))


def _call(function: Function, place: str, key: str = "arguments") -> dict[str, Any]:
    arguments = _moved(closed(function.schema_of_arguments), f"{place}/properties/{key}")
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, key: arguments},
        "required": ["name", key],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:  # noqa: ANN401 - JSON
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value[1:] if key == "$ref" and isinstance(value, str) and value.startswith("#") else
        _moved(value, place)
        for key, value in schema.items()
    }  # fmt: skip


# Calls in an answer


def _begin(name: str) -> str:
    """Return the text before the arguments of a call, as the grammar has it."""
    return f'{{"name": {json.dumps(name)}, "arguments": '


@dataclass(slots=True)
class _Answer:
    """A growing answer: what is not decided or sent yet, and the number of its calls."""

    held: str = ""
    talks: bool = False
    calls: int = 0
    open: bool = False  # the arguments of the last call go on

    def arguments(self, *, whole: bool) -> str:
        """Remove and return what is held of the arguments of the last call, without the brace that ends the call.

        A call is a line, whose last brace is the call's, unless the `whole` answer is the arguments.
        """
        if whole:
            found, self.held = self.held, ""
            return found
        line, newline, rest = self.held.partition("\n")
        found = line.removesuffix("}")
        self.held, self.open = (newline + rest, False) if newline else (line[len(found) :], True)
        return found


@dataclass(slots=True)
class ToolCalls:
    """Turn the outputs of one reply into tool calls.

    `schemas` are those of the functions' arguments by name; the flags are those of a `ToolOffer`. In our own format, an
    answer without a call is one that does not begin as a call does. The ids of the calls in a stream follow from
    `name`.
    """

    schemas: Schemas
    is_arguments: bool = False
    may_talk: bool = False
    parallel: bool = True
    name: str = ""
    _native: dict[int, NativeCalls] = field(default_factory=dict)
    _answers: dict[int, _Answer] = field(default_factory=dict)

    def message(self, text: str, native: CallFormat | None = None) -> dict[str, Any]:
        """Return a message's fields for a whole text."""
        deltas = [*self.pieces(-1, text, native), *self.last(-1)]
        del self._answers[-1]
        calls: list[dict[str, Any]] = []
        for call in (call for delta in deltas for call in delta.get("tool_calls", ())):
            if "id" in call:
                calls.append({"id": call["id"], "type": call["type"], "function": call["function"]})
            else:
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        content = "".join(each.get("content", "") for each in deltas)
        return {"content": content or None, "tool_calls": calls} if calls else {"content": content}

    def called(self, number: int) -> bool:
        return number in self._answers and self._answers[number].calls > 0

    def pieces(self, number: int, text: str, native: CallFormat | None = None) -> list[dict[str, Any]]:
        """Return the deltas of a message for more text of a choice; `native` is the format of its calls, if any."""
        if native is not None:
            said = self._native.setdefault(number, NativeCalls(native, self.schemas)).feed(text)
            return [{"content": said}] if said else []
        answer = self._answers.setdefault(number, _Answer())
        answer.held += text
        if not answer.held:
            return []
        if self.may_talk and not answer.calls and not answer.talks:
            begins = map(_begin, self.schemas)
            answer.talks = not any(each.startswith(answer.held) or answer.held.startswith(each) for each in begins)
        if answer.talks:
            piece, answer.held = answer.held, ""
            return [{"content": piece}]
        deltas: list[dict[str, Any]] = []
        while answer.open or self._open_call(number, answer, deltas):
            if piece := answer.arguments(whole=self.is_arguments):
                deltas.append(_delta(answer, {"arguments": piece}))
            if answer.open:
                break
        return deltas

    def last(self, number: int) -> list[dict[str, Any]]:
        """Return the deltas at the end; the beginning of a further call, where an answer was cut off, is dropped."""
        answer = self._answers.setdefault(number, _Answer())
        if (native := self._native.pop(number, None)) is not None:
            return self._native_calls(number, native, answer)
        held, answer.held = answer.held, ""
        return [{"content": held}] if held and not answer.calls else []

    def _native_calls(self, number: int, native: NativeCalls, answer: _Answer) -> list[dict[str, Any]]:
        said, found = native.finish()
        deltas: list[dict[str, Any]] = [{"content": said}] if said else []
        for name, arguments in found[: MAX_CALLS if self.parallel else 1]:
            answer.calls += 1
            identity = self._identity(number, answer)
            deltas.append(_delta(answer, {"name": name, "arguments": arguments}, **identity))
        return deltas

    def _open_call(self, number: int, answer: _Answer, deltas: list[dict[str, Any]]) -> bool:
        """Remove the beginning of a call and add its first delta; return False if that is not complete."""
        for name in self.schemas:
            begin = "" if self.is_arguments else "\n" * (answer.calls > 0) + _begin(name)
            if answer.held.startswith(begin):
                answer.held, answer.open = answer.held[len(begin) :], True
                answer.calls += 1
                identity = self._identity(number, answer)
                deltas.append(_delta(answer, {"name": name, "arguments": ""}, **identity))
                return True
        return False

    def _identity(self, number: int, answer: _Answer) -> dict[str, str]:
        name = self.name if number >= 0 else secrets.token_hex(12)  # else several whole choices would have the same
        digest = hashlib.blake2s(f"{name} {number} {answer.calls}".encode(), digest_size=12).hexdigest()
        return {"id": f"call_{digest}", "type": "function"}


def _delta(answer: _Answer, function: dict[str, str], **identity: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": answer.calls - 1, **identity, "function": function}]}

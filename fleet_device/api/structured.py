"""Structured output: `response_format`, `tools` and `grammar` as one grammar, and tool calls in the answer."""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fleet_device.api.problems import unusable
from schemas.policy import Grammar, GrammarKind

_NAME: Final = r"^[A-Za-z0-9_-]{1,64}$"
_ANY_OBJECT: Final[dict[str, Any]] = {"type": "object", "properties": {}, "additionalProperties": False}
_MOST_TOOLS: Final = 128


class StrictModel(BaseModel):
    """Base of the models of requests' bodies."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NamedSchema(StrictModel):
    """A JSON schema with a name and a description for people; `strict` is ignored: the text always matches it."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> "ResponseFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise unusable("response_format.json_schema", "it goes with the type json_schema, and only that")
        return self


class Function(StrictModel):
    """A function that the model may call; `strict` is ignored: arguments always match the schema."""

    name: str = Field(pattern=_NAME)
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
        tools: Annotated[tuple[NamedFunction, ...], Field(min_length=1, max_length=_MOST_TOOLS, fail_fast=True)]

    type: Literal["allowed_tools"]
    allowed_tools: Tools


ToolChoice = Literal["none", "auto", "required"] | NamedFunction | AllowedTools


def offered_tools(tools: tuple[Tool, ...], choice: ToolChoice) -> tuple[Tool, ...]:
    """Return the tools that the choice leaves; raise ApiProblem if it names another one."""
    match choice:
        case "none":
            return ()
        case NamedFunction():
            names = [choice.function.name]
        case AllowedTools():
            names = [each.function.name for each in choice.allowed_tools.tools]
        case _:
            return tools
    for name in names:
        if name not in {tool.function.name for tool in tools}:
            raise unusable("tool_choice", f"it names {name[:64]!r}, which is none of the tools")
    return tuple(tool for tool in tools if tool.function.name in names)


def format_schema(asked: ResponseFormat | None) -> dict[str, Any] | None:
    """Return the schema of a response format; None for any text."""
    if asked is None or asked.type == "text":
        return None
    return {"type": "object"} if asked.json_schema is None else asked.json_schema.schema_


def schema_grammar(schema: dict[str, Any]) -> Grammar:
    if schema == {"type": "object"}:
        return Grammar(kind=GrammarKind.JSON_OBJECT)
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=_text(schema))


def tool_grammar(tools: tuple[Tool, ...], choice: ToolChoice, schema: dict[str, Any] | None) -> Grammar:
    """Return the grammar of an answer that may or must call one of the tools, at least one.

    `schema` is that of an answer without a call; None for any text.
    """
    if isinstance(choice, NamedFunction):
        return Grammar(kind=GrammarKind.JSON_SCHEMA, text=_text(tools[0].function.schema_of_arguments))
    ways = [_call(tool.function, f"#/anyOf/{place}") for place, tool in enumerate(tools)]
    if may_talk(choice) and schema is not None:
        ways.append(_moved(schema, f"#/anyOf/{len(ways)}"))
    elif may_talk(choice):
        options = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
        calls = _text({"anyOf": ways, "x-guidance": options})
        # A text that begins with a brace is a call, so the model itself chooses.
        lark = f'start: call | TEXT | ""\ncall: %json {calls}\nTEXT: /[^{{](.|\\n)*/\n'
        return Grammar(kind=GrammarKind.LARK, text=lark)
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=_text({"anyOf": ways}))


def may_talk(choice: ToolChoice) -> bool:
    """Whether the model may answer without a call."""
    return choice == "auto" or (isinstance(choice, AllowedTools) and choice.allowed_tools.mode == "auto")


def tool_prompt(tools: tuple[Tool, ...], choice: ToolChoice, schema: dict[str, Any] | None) -> str:
    lines = []
    for tool in tools:
        function = tool.function
        lines.append(f"- {function.name}: {function.description or 'no description'}")
        lines.append(f"  Arguments, as a JSON schema: {json.dumps(function.schema_of_arguments, ensure_ascii=False)}")
    if isinstance(choice, NamedFunction):
        how = "Answer with nothing but the arguments of a call of this function, as JSON."
    else:
        how = 'To call a function, answer with nothing but {"name": "its name", "arguments": {its arguments}}.'
        if not may_talk(choice):
            how += " Call one now."
        else:
            how += (
                " Otherwise answer in plain words." if schema is None else " Otherwise answer in the required format."
            )
    return "\n".join(["You can call these functions:", *lines, how])


def _text(schema: object) -> str:
    return json.dumps(schema, separators=(",", ":"))


def _call(function: Function, place: str) -> dict[str, Any]:
    arguments = _moved(function.schema_of_arguments, f"{place}/properties/arguments")
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
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


def _begin(name: str) -> str:
    """Return what the grammar puts before the arguments of a call."""
    return f'{{"name": {json.dumps(name)}, "arguments": '


@dataclass(slots=True)
class _Answer:
    """A growing answer: what is not decided or sent yet, and whether it is a call."""

    identifier: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")
    held: str = ""
    talks: bool = False
    called: bool = False


@dataclass(slots=True)
class ToolCalls:
    """Turn the outputs of one reply into tool calls.

    `names` are those of the functions. With `is_arguments` the whole output is the arguments of the only one. With
    `may_talk` it may be an answer without a call: one that does not begin as a call does.
    """

    names: Sequence[str]
    is_arguments: bool = False
    may_talk: bool = False
    _answers: dict[int, _Answer] = field(default_factory=dict)

    def message(self, text: str, *, ended: bool) -> dict[str, Any]:
        """Return a message's fields for a whole text; `ended` is False if it was cut at its longest length."""
        delta = [*self.pieces(-1, text), *self.last(-1, ended=ended)]
        answer = self._answers.pop(-1)
        if not answer.called:
            return {"content": "".join(each.get("content", "") for each in delta)}
        parts = [each["tool_calls"][0]["function"] for each in delta]
        function = {"name": parts[0]["name"], "arguments": "".join(part["arguments"] for part in parts)}
        return {"content": None, "tool_calls": [{"id": answer.identifier, "type": "function", "function": function}]}

    def calls(self, number: int) -> bool:
        return number in self._answers and self._answers[number].called

    def pieces(self, number: int, text: str) -> list[dict[str, Any]]:
        answer = self._answers.setdefault(number, _Answer())
        answer.held += text
        if not answer.held:
            return []
        if self.may_talk and not answer.called and not answer.talks:
            begins = map(_begin, self.names)
            answer.talks = not any(each.startswith(answer.held) or answer.held.startswith(each) for each in begins)
        if answer.talks:
            piece, answer.held = answer.held, ""
            return [{"content": piece}]
        deltas: list[dict[str, Any]] = []
        if not answer.called:
            if (begun := self._begun(answer)) is None:
                return []
            deltas.append(begun)
        # The last brace ends the call, not its arguments.
        keep = 0 if self.is_arguments else 1
        piece, answer.held = answer.held[: len(answer.held) - keep], answer.held[len(answer.held) - keep :]
        return [*deltas, _arguments(piece)] if piece else deltas

    def last(self, number: int, *, ended: bool) -> list[dict[str, Any]]:
        answer = self._answers.setdefault(number, _Answer())
        held, answer.held = answer.held, ""
        if not held or (answer.called and ended):
            return []
        return [_arguments(held)] if answer.called else [{"content": held}]

    def _begun(self, answer: _Answer) -> dict[str, Any] | None:
        """Return the first delta of a call and remove its beginning; None if that is not complete."""
        for name in self.names:
            begin = "" if self.is_arguments else _begin(name)
            if answer.held.startswith(begin):
                answer.called, answer.held = True, answer.held[len(begin) :]
                call = {"index": 0, "id": answer.identifier, "type": "function"}
                return {"tool_calls": [{**call, "function": {"name": name, "arguments": ""}}]}
        return None


def _arguments(text: str) -> dict[str, Any]:
    return {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}

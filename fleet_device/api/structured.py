"""Structured answers of the API: what `response_format`, `tools` and `grammar` ask for, as one grammar of the text."""

import json
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fleet_device.api.problems import unusable
from schemas.grammar import Grammar, GrammarKind

_NAME: Final = r"^[A-Za-z0-9_-]{1,64}$"
_ANY_OBJECT: Final[dict[str, Any]] = {"type": "object", "properties": {}, "additionalProperties": False}
_MOST_TOOLS: Final = 128


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NamedSchema(_Model):
    """A JSON schema with a name.

    Attributes:
        name: For people.
        description: Likewise.
        schema_: The schema.
        strict: Ignored: the text always keeps to it.
    """

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Model):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> "ResponseFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema goes with the type json_schema, and only that")
        return self


class Function(_Model):
    """A function that the model may call.

    Attributes:
        name: Its name.
        description: What it is for; the model reads it.
        parameters: A JSON schema of its arguments; none by default.
        strict: Ignored: arguments always keep to the schema.
    """

    name: str = Field(pattern=_NAME)
    description: str | None = Field(default=None, max_length=10_000)
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        return self.parameters or _ANY_OBJECT


class Tool(_Model):
    """A tool; functions are the only ones."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Model):
    """The function that is to be called."""

    class Name(_Model):
        """Its name."""

        name: str

    type: Literal["function"]
    function: Name


ToolChoice = Literal["none", "auto", "required"] | NamedFunction


def format_grammar(asked: ResponseFormat | None) -> Grammar | None:
    """Return the grammar of a response format; None where any text will do."""
    if asked is None or asked.type == "text":
        return None
    if asked.json_schema is None:
        return Grammar(kind=GrammarKind.JSON_OBJECT)
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(asked.json_schema.schema_, separators=(",", ":")))


def tool_grammar(tools: tuple[Tool, ...], choice: ToolChoice) -> Grammar | None:
    """Return the grammar of an answer that may or must call a function; None where it may call none.

    Raises:
        ApiProblem: The function that is to be called is none of the tools.
    """
    if choice == "none" or not tools:
        return None
    functions = [tool.function for tool in tools]
    if isinstance(choice, NamedFunction):
        found = next((each for each in functions if each.name == choice.function.name), None)
        if found is None:
            raise unusable("tool_choice", f"it names {choice.function.name[:64]!r}, which is none of the tools")
        return Grammar(kind=GrammarKind.JSON_SCHEMA, text=_text(found.schema_of_arguments))
    calls = {"anyOf": [_call(function, f"#/anyOf/{place}") for place, function in enumerate(functions)]}
    if choice == "required":
        return Grammar(kind=GrammarKind.JSON_SCHEMA, text=_text(calls))
    options = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
    # What begins with a brace is a call, and what does not is none: so the model itself chooses.
    lark = f'start: call | TEXT | ""\ncall: %json {_text(calls | {"x-guidance": options})}\nTEXT: /[^{{](.|\\n)*/\n'
    return Grammar(kind=GrammarKind.LARK, text=lark)


def tool_prompt(tools: tuple[Tool, ...], choice: ToolChoice) -> str:
    """Return what the model is told of its tools."""
    lines = []
    for tool in tools:
        function = tool.function
        if isinstance(choice, NamedFunction) and choice.function.name != function.name:
            continue
        lines.append(f"- {function.name}: {function.description or 'no description'}")
        lines.append(f"  Arguments, as a JSON schema: {json.dumps(function.schema_of_arguments, ensure_ascii=False)}")
    if isinstance(choice, NamedFunction):
        how = "Answer with nothing but the arguments of a call of this function, as JSON."
    else:
        how = 'To call a function, answer with nothing but {"name": "its name", "arguments": {its arguments}}.'
        how += " Call one now." if choice == "required" else " Otherwise answer in plain words."
    return "\n".join(["You can call these functions:", *lines, how])


def _text(schema: object) -> str:
    return json.dumps(schema, separators=(",", ":"))


def _call(function: Function, place: str) -> dict[str, Any]:
    """Return the schema of a call; `place` is where it stands in the whole."""
    arguments = _moved(function.schema_of_arguments, f"{place}/properties/arguments")
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:  # noqa: ANN401 - JSON
    """Return a schema whose references to itself hold where it stands within another."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value[1:] if key == "$ref" and isinstance(value, str) and value.startswith("#") else
        _moved(value, place)
        for key, value in schema.items()
    }  # fmt: skip

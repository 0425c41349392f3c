"""Tool calls in the formats that models were trained with.

Which one a chat template has shows in its rendering of a call, so that it does not depend on the name of a model.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from fleet_device.requests.thinking import overlap

PROBE: Final = "probe_function"
PROBE_ARGUMENTS: Final = {"first": "value_1"}

Found = tuple[str, str]
"""Name and arguments of a call."""

Schemas = Mapping[str, Mapping[str, Any]]
"""By the name of a function, the schema of its arguments."""


@dataclass(frozen=True, slots=True)
class CallFormat:
    """A format of calls.

    Attributes:
        shown: How a rendered call of the probe looks.
        opens: Texts that begin calls; what follows is read when the output is complete.
        control: Texts of control tokens in it.
        read: Yields the calls in a text that begins with one of `opens`.
        call: Texts before and behind the JSON of a call, and the key of its arguments, if a grammar can require it.
        first: Calls are at the beginning of an answer only.
        between: Text that follows the thinking before an answer, and is no part of it.
        closing: Text that ends the thinking whatever follows, if that is not the mark before an answer.
        short_ids: Calls have ids of nine letters.
    """

    shown: re.Pattern[str]
    opens: tuple[str, ...]
    read: Callable[[str, Schemas], Iterator[Found]]
    control: tuple[str, ...] = ()
    call: tuple[str, str, str] | None = None
    first: bool = False
    between: str = ""
    closing: str = ""
    short_ids: bool = False


_DECODER: Final = json.JSONDecoder()
_CUT: Final = re.compile(r'\s*\{\s*"name":\s*"([^"\\]+)",\s*"(?:arguments|parameters)":\s*', re.DOTALL)


def _object(text: str) -> tuple[Found | None, int]:
    """Read the JSON of a call at the beginning of a text; return it, and where it ends.

    Of one that was cut off, the arguments are what there is of them.
    """
    begin = len(text) - len(text.lstrip())
    try:
        value, end = _DECODER.raw_decode(text, begin)
    except (ValueError, RecursionError):
        cut = _CUT.match(text)
        return ((cut[1], text[cut.end() :].rstrip()), len(text)) if cut else (None, len(text))
    return _call(value), end


def _call(value: object) -> Found | None:
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _hermes(text: str, _schemas: Schemas) -> Iterator[Found]:
    for part in text.split("<tool_call>")[1:]:
        found, _ = _object(part)
        if found:
            yield found


def _llama(text: str, _schemas: Schemas) -> Iterator[Found]:
    rest = text.removeprefix("<|python_tag|>")
    while rest.lstrip(" \n;").startswith("{"):
        rest = rest.lstrip(" \n;")
        found, end = _object(rest)
        if found:
            yield found
        rest = rest[end:]


_NAMED: Final = re.compile(r"\s*([A-Za-z0-9_.-]+)(?:\[CALL_ID\][^\[]*)?\[ARGS\]")


def _mistral(text: str, _schemas: Schemas) -> Iterator[Found]:
    for part in text.split("[TOOL_CALLS]")[1:]:
        if named := _NAMED.match(part):
            arguments = part[named.end() :].strip()
            with suppress(ValueError, RecursionError):  # it may be cut off
                arguments = arguments[: _DECODER.raw_decode(arguments)[1]]
            yield named[1], arguments
            continue
        rest = part.strip().removeprefix("[")
        while rest.startswith("{"):
            found, end = _object(rest)
            if found:
                yield found
            rest = rest[end:].lstrip(", \n")


_FUNCTION: Final = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER: Final = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)(?:\n?</parameter>|\Z)", re.DOTALL)


def _qwen_coder(text: str, schemas: Schemas) -> Iterator[Found]:
    for name, inner in _FUNCTION.findall(text):
        properties = schemas.get(name, {}).get("properties", {})
        arguments = {key: _typed(value, properties.get(key)) for key, value in _PARAMETER.findall(inner)}
        yield name, json.dumps(arguments, ensure_ascii=False)


def _typed(value: str, schema: object) -> Any:  # noqa: ANN401 - JSON
    """Return a parameter, which is text unless its schema says something else."""
    kind = schema.get("type", "string") if isinstance(schema, Mapping) else "string"
    if kind == "string":
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


_TO: Final = re.compile(r"to=functions\.([A-Za-z0-9_-]+)[^{]*?<\|message\|>(.*?)(?:<\|call\|>|<\|end\|>|\Z)", re.DOTALL)


def _gpt_oss(text: str, _schemas: Schemas) -> Iterator[Found]:
    yield from _TO.findall(text)


_JSON: Final = rf'\{{\s*"name":\s*"{PROBE}",\s*'

FORMATS: Final[Mapping[str, CallFormat]] = {
    "hermes": CallFormat(
        re.compile(rf"<tool_call>\s*{_JSON}\"arguments\":\s*\{{"),
        ("<tool_call>",),
        _hermes,
        call=("<tool_call>\n", "\n</tool_call>", "arguments"),
    ),
    "qwen3-coder": CallFormat(
        re.compile(rf"<tool_call>\s*<function={PROBE}>\s*<parameter=first>"), ("<tool_call>", "<function="), _qwen_coder
    ),
    "mistral": CallFormat(
        re.compile(rf"\[TOOL_CALLS\]\s*(\[\s*{_JSON}\"arguments\":\s*\{{|{PROBE}(\[CALL_ID\]\w+)?\[ARGS\]\{{)"),
        ("[TOOL_CALLS]",),
        _mistral,
        control=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
        short_ids=True,
    ),
    "gpt-oss": CallFormat(
        re.compile(rf"to=functions\.{PROBE}"),
        ("<|channel|>commentary to=", " to=functions.", "<|channel|>analysis to="),
        _gpt_oss,
        control=("<|channel|>", "<|message|>", "<|call|>", "<|constrain|>", "<|start|>", "<|end|>"),
        between="<|channel|>final<|message|>",
        closing="<|end|><|start|>assistant",
    ),
    "llama-3": CallFormat(
        re.compile(rf"{_JSON}\"parameters\":\s*\{{"),
        ("<|python_tag|>", "{"),
        _llama,
        control=("<|python_tag|>",),
        call=("", "", "parameters"),
        first=True,
    ),
}
"""Hermes's is that of Qwen 2.5 and 3, and of many others; Mistral has an older and a newer one."""


def recognise(rendered: str) -> CallFormat | None:
    """Return the format of a rendered call of the probe."""
    return next((each for each in FORMATS.values() if each.shown.search(rendered)), None)


class NativeCalls:
    """A growing answer with calls in a format: the text before them at once, and the calls at the end."""

    def __init__(self, call_format: CallFormat, schemas: Schemas) -> None:
        self._format, self._schemas = call_format, schemas
        self._held = ""
        self._said = False
        self._begun = False

    def feed(self, text: str) -> str:
        """Return more of the text before the calls; what may begin one is held back."""
        self._held += text
        if self._begun:
            return ""
        between = self._format.between
        if between and not self._said:
            if self._held.startswith(between):
                self._held, self._said = self._held[len(between) :], True
            elif between.startswith(self._held):
                return ""
        place, keep = self._opening()
        self._begun = place is not None
        said = self._held[: len(self._held) - keep if place is None else place]
        self._held = self._held[len(said) :]
        self._said = self._said or bool(said)
        return said

    def _opening(self) -> tuple[int | None, int]:
        """Return where calls begin in the held text; if nowhere, the length of its end with which they may begin."""
        if self._format.first:
            if self._said:
                return None, 0
            begin = self._held.lstrip()
            if any(begin.startswith(each) for each in self._format.opens):
                return 0, 0
            return None, len(self._held) if any(each.startswith(begin) for each in self._format.opens) else 0
        places = [place for each in self._format.opens if (place := self._held.find(each)) >= 0]
        if places:
            return min(places), 0
        return None, max(overlap(self._held, each) for each in self._format.opens)

    def finish(self) -> tuple[str, list[Found]]:
        """Return the rest of the text, and the calls; an output that only looks like some is text."""
        held, self._held = self._held, ""
        if not self._begun:
            return held, []
        calls = [found for found in self._format.read(held, self._schemas) if found[0] in self._schemas]
        return ("", calls) if calls else (held, [])

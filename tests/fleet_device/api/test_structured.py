import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, strategies as st

from fleet_device.api.requests import ChatRequest, read_request
from fleet_device.requests.structured import MAX_CALLS, ToolCalls
from schemas.policy import Grammar
from tests.fleet_device.api.client import described
from tests.support.compiled_grammar import takes

WEATHER = {
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"city": {"enum": ["Bonn", "Köln"]}},
    },
}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "stop"}}]
SCHEMAS: dict[str, Any] = {"weather": WEATHER["parameters"], "stop": {}}
NAMED = {"type": "function", "function": {"name": "weather"}}


CALL = '{"name": "weather", "arguments": {"city": "Bonn"}}'
STOP = {"type": "function", "function": {"name": "stop"}}
ONLY_STOP, MUST_STOP = (
    {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [STOP]}} for mode in ("auto", "required")
)
REPORT = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$defs": {"warm": {"type": "boolean"}},
    "type": "object",
    "properties": {"warm": {"$ref": "#/$defs/warm"}},
    "required": ["warm"],
    "additionalProperties": False,
}
FORMATS = {
    "json_object": {"type": "json_object"},
    "json_schema": {"type": "json_schema", "json_schema": {"name": "report", "schema": REPORT}},
}


def chat(**fields: Any) -> ChatRequest:
    return read_request(
        ChatRequest, json.dumps({"model": "m", "messages": [{"role": "user", "content": "t1"}], **fields}).encode()
    )


def test_a_response_format_is_a_grammar() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    of_schema = chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert of_schema.text_grammar() == Grammar.json_schema(schema)
    assert chat(response_format={"type": "json_object"}).text_grammar() == Grammar.json_object()
    assert chat(response_format={"type": "text"}).text_grammar() is None
    assert chat(grammar={"kind": "regex", "text": "a+"}).text_grammar() == Grammar.regex("a+")
    assert chat(tools=TOOLS, tool_choice="none").text_grammar() is None
    assert chat(tools=TOOLS, tool_choice="none").tool_calls() is None


INVENTED = '{"city": "Bonn", "maxLength": 8}'
OPEN = {"type": "object", "properties": {"city": {"enum": ["Bonn"]}}, "required": ["city"]}
OPEN_TOOL = {"type": "function", "function": {"name": "weather", "parameters": OPEN}}


def format_of(**fields: bool) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "city", "schema": OPEN, **fields}}


@pytest.mark.parametrize(
    ("fields", "text", "taken"),
    [
        ({"tools": [OPEN_TOOL], "tool_choice": NAMED}, INVENTED, False),
        ({"tools": [OPEN_TOOL]}, f'{{"name": "weather", "arguments": {INVENTED}}}', False),
        ({"response_format": format_of(strict=True)}, INVENTED, False),
        ({"response_format": format_of()}, INVENTED, True),
        ({"response_format": {"type": "json_object", "schema": OPEN}}, INVENTED, False),
        ({"response_format": {"type": "json_object", "schema": OPEN}}, '{"city": "Bonn"}', True),
        ({"response_format": {"type": "json_object", "schema": OPEN | {"additionalProperties": True}}}, INVENTED, True),
    ],
)
def test_objects_are_closed_unless_a_schema_is_not_strict(fields: dict[str, Any], text: str, *, taken: bool) -> None:
    assert takes(chat(**fields).text_grammar(), text) is taken


@pytest.mark.parametrize(
    ("choice", "text", "taken"),
    [
        ("required", CALL, True),
        ("required", '{"name": "stop", "arguments": {}}', True),
        ("required", '{"name": "weather", "arguments": {}}', False),
        ("required", '{"name": "weather", "arguments": {"city": "Rom"}}', False),
        ("required", '{"name": "other", "arguments": {}}', False),
        ("required", "Bonn", False),
        ("required", f"{CALL}\n{CALL}", True),
        ("required", "\n".join([CALL] * MAX_CALLS), True),
        ("required", "\n".join([CALL] * (MAX_CALLS + 1)), False),
        ("required", f"{CALL}\n", False),
        ("required", f"{CALL} {CALL}", False),
        ("auto", f'{CALL}\n{{"name": "stop", "arguments": {{}}}}', True),
        ("auto", f"{CALL}\nIt is warm.", False),
        ("auto", CALL, True),
        ("auto", "It is warm in {Bonn}.", True),
        ("auto", "", True),
        ("auto", '{"warm": true}', False),
        (ONLY_STOP, '{"name": "stop", "arguments": {}}', True),
        (ONLY_STOP, CALL, False),
        (ONLY_STOP, "It is warm.", True),
        (MUST_STOP, '{"name": "stop", "arguments": {}}', True),
        (MUST_STOP, "It is warm.", False),
        (NAMED, '{"city": "Köln"}', True),
        (NAMED, CALL, False),
    ],
)
def test_an_answer_with_tools_is_a_call_or_plain_words(choice: Any, text: str, *, taken: bool) -> None:
    assert takes(chat(tools=TOOLS, tool_choice=choice).text_grammar(), text) is taken


@pytest.mark.parametrize(
    ("form", "choice", "text", "taken"),
    [
        ("json_schema", "auto", CALL, True),
        ("json_schema", "auto", f"{CALL}\n{CALL}", True),
        ("json_schema", "auto", '{"warm": true}', True),
        ("json_schema", "auto", f'{{"warm": true}}\n{CALL}', False),
        ("json_schema", "auto", "It is warm.", False),
        ("json_schema", "auto", '{"name": "weather", "arguments": {"city": "Rom"}}', False),
        ("json_schema", "required", '{"warm": true}', False),
        ("json_schema", "none", CALL, False),
        ("json_schema", "none", '{"warm": true}', True),
        ("json_object", "auto", '{"cold": 1}', True),
        ("json_object", "auto", "It is warm.", False),
    ],
)
def test_an_answer_with_tools_and_a_format_is_a_call_or_follows_the_format(
    form: str, choice: str, text: str, *, taken: bool
) -> None:
    asked = chat(tools=TOOLS, tool_choice=choice, response_format=FORMATS[form])
    assert takes(asked.text_grammar(), text) is taken
    calls = asked.tool_calls()
    if taken and calls is not None:
        assert ("tool_calls" in calls.message(text)) is text.startswith(CALL)


def test_an_object_without_a_call_is_streamed_as_it_comes() -> None:
    calls = chat(tools=TOOLS, response_format=FORMATS["json_schema"]).tool_calls()
    assert calls is not None
    text = '{"warm": {"name": 1}}'
    assert [calls.pieces(0, character) for character in text[:3]] == [[], [], [{"content": '{"w'}]]
    assert calls.pieces(0, text[3:]) == [{"content": text[3:]}]


def test_the_model_is_told_of_its_tools_and_of_what_they_returned() -> None:
    asked = chat(
        tools=TOOLS,
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "How is it in Bonn?"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
            ]},
            {"role": "tool", "tool_call_id": "1", "content": "warm"},
        ],
    )  # fmt: skip
    system, _, call, result = described(asked)
    assert system.content.startswith("Be brief.\n\n")  # type: ignore[union-attr]
    assert "Tells the weather." in system.content  # type: ignore[union-attr]
    assert (call.role, call.content) == ("assistant", CALL)  # type: ignore[union-attr]
    assert (result.role, result.content) == ("user", "The function returned: warm")  # type: ignore[union-attr]
    assert "weather" not in str(chat(tools=TOOLS, tool_choice="none").text_prompt())


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_one_call_at_a_time_is_one(choice: str) -> None:
    grammar = chat(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False).text_grammar()
    assert takes(grammar, CALL)
    assert not takes(grammar, f"{CALL}\n{CALL}")


def joined(deltas: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Assemble calls as clients do, by index; all deltas must be of calls."""
    found: dict[int, dict[str, str]] = {}
    for [call] in (delta["tool_calls"] for delta in deltas):
        function = found.setdefault(call["index"], {"id": call.get("id", ""), "name": "", "arguments": ""})
        function["name"] += call["function"].get("name", "")
        function["arguments"] += call["function"]["arguments"]
    assert sorted(found) == list(range(len(found)))
    assert len({each["id"] for each in found.values()} - {""}) == len(found)
    return [found[index] for index in sorted(found)]


QUOTED = '{"name": "stop", "arguments": {"why": "}\\"}{\\\\", "at": [{}, [1]]}}'
SEVERAL = f"{CALL}\n{QUOTED}\n{CALL}"


@given(cuts=st.sets(st.integers(1, len(SEVERAL) - 1)), may_talk=st.booleans(), count=st.integers(1, 3))
def test_calls_are_the_same_whole_and_however_they_are_cut(cuts: set[int], *, may_talk: bool, count: int) -> None:
    lines = SEVERAL.split("\n")[:count]
    text = "\n".join(lines)
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    calls = ToolCalls(SCHEMAS, may_talk=may_talk)
    deltas = [delta for begin, end in pairwise(places) for delta in calls.pieces(0, text[begin:end])]
    found = joined([*deltas, *calls.last(0)])
    assert calls.called(0)
    expected = [(json.loads(line)["name"], json.loads(line)["arguments"]) for line in lines]
    assert [(each["name"], json.loads(each["arguments"])) for each in found] == expected
    whole = calls.message(text)
    assert whole["content"] is None
    functions = [each["function"] for each in whole["tool_calls"]]
    assert [(each["name"], json.loads(each["arguments"])) for each in functions] == expected


def test_a_call_that_was_cut_short_is_given_out_as_far_as_it_came() -> None:
    cut = ToolCalls(SCHEMAS).message(CALL[:-4])["tool_calls"][0]["function"]
    assert cut == {"name": "weather", "arguments": '{"city": "Bon'}
    assert ToolCalls(SCHEMAS).message('{"name": "wea') == {"content": '{"name": "wea'}
    for rest in ("\n", '\n{"name": "wea'):
        [whole] = ToolCalls(SCHEMAS).message(CALL + rest)["tool_calls"]
        assert json.loads(whole["function"]["arguments"]) == {"city": "Bonn"}

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_common.grammar.compiler import compile_grammar
from fleet_common.grammar.errors import OutsideGrammar
from fleet_common.grammar.process import GrammarTokenizer
from fleet_device.api.requests import ChatRequest, read_request
from fleet_device.api.structured import ToolCalls
from schemas.policy import Grammar, GrammarKind

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
NAMES = ["weather", "stop"]
NAMED = {"type": "function", "function": {"name": "weather"}}

WORDS = [*(chr(code) for code in range(32, 127)), "\n", "ö", "end"]
CHARACTERS = GrammarTokenizer.of_words(WORDS, end_tokens=[len(WORDS) - 1])

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


def takes(grammar: Grammar | None, text: str) -> bool:
    assert grammar is not None
    matcher, ids = compile_grammar(grammar, CHARACTERS), [WORDS.index(character) for character in text]
    try:
        matcher.check([*ids, len(WORDS) - 1])
    except OutsideGrammar:
        return False
    return True


def test_a_response_format_is_a_grammar() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    of_schema = chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert of_schema.text_grammar() == Grammar.json_schema(schema)
    assert chat(response_format={"type": "json_object"}).text_grammar() == Grammar.json_object()
    assert chat(response_format={"type": "text"}).text_grammar() is None
    assert chat(grammar={"kind": "regex", "text": "a+"}).text_grammar() == Grammar.regex("a+")
    assert chat(tools=TOOLS, tool_choice="none").text_grammar() is None
    assert chat(tools=TOOLS, tool_choice="none").tool_calls() is None


@pytest.mark.parametrize(
    ("choice", "text", "taken"),
    [
        ("required", CALL, True),
        ("required", '{"name": "stop", "arguments": {}}', True),
        ("required", '{"name": "weather", "arguments": {}}', False),
        ("required", '{"name": "weather", "arguments": {"city": "Rom"}}', False),
        ("required", '{"name": "other", "arguments": {}}', False),
        ("required", "Bonn", False),
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
        ("json_schema", "auto", '{"warm": true}', True),
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
        assert ("tool_calls" in calls.message(text, ended=True)) is (text == CALL)


def test_an_object_without_a_call_is_streamed_as_it_comes() -> None:
    calls = chat(tools=TOOLS, response_format=FORMATS["json_schema"]).tool_calls()
    assert calls is not None
    text = '{"warm": {"name": 1}}'
    assert [calls.pieces(0, character) for character in text[:3]] == [[], [], [{"content": '{"w'}]]
    assert calls.pieces(0, text[3:]) == [{"content": text[3:]}]


def test_auto_is_the_choice_that_is_made_where_there_are_tools() -> None:
    assert chat(tools=TOOLS).text_grammar() == chat(tools=TOOLS, tool_choice="auto").text_grammar()


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
    system, _, call, result = asked.text_prompt()
    assert system.content.startswith("Be brief.\n\n")  # type: ignore[union-attr]
    assert "Tells the weather." in system.content  # type: ignore[union-attr]
    assert (call.role, call.content) == ("assistant", CALL)  # type: ignore[union-attr]
    assert (result.role, result.content) == ("user", "The function returned: warm")  # type: ignore[union-attr]
    assert "weather" not in str(chat(tools=TOOLS, tool_choice="none").text_prompt())


def joined(deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for delta in deltas:
        if "content" in delta:
            found["content"] = found.get("content", "") + delta["content"]
        for call in delta.get("tool_calls", ()):
            function = found.setdefault("function", {"name": None, "arguments": "", "id": call.get("id")})
            function["name"] = call["function"].get("name", function["name"])
            function["arguments"] += call["function"]["arguments"]
    return found


@given(cuts=st.sets(st.integers(1, len(CALL) - 1)), may_talk=st.booleans())
def test_a_call_is_the_same_whole_and_however_it_is_cut(cuts: set[int], *, may_talk: bool) -> None:
    calls, places = ToolCalls(NAMES, may_talk=may_talk), [0, *sorted(cuts), len(CALL)]
    deltas = [delta for begin, end in pairwise(places) for delta in calls.pieces(0, CALL[begin:end])]
    found = joined([*deltas, *calls.last(0, ended=True)])
    assert calls.calls(0)
    assert "content" not in found
    assert (found["function"]["name"], json.loads(found["function"]["arguments"])) == ("weather", {"city": "Bonn"})
    whole = calls.message(CALL, ended=True)
    assert whole["content"] is None
    assert whole["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Bonn"}'}


def test_plain_words_stay_words_and_the_arguments_of_a_named_function_are_the_text() -> None:
    assert ToolCalls(NAMES, may_talk=True).message("Warm {Bonn}", ended=True) == {"content": "Warm {Bonn}"}
    assert ToolCalls(NAMES, may_talk=True).message("", ended=True) == {"content": ""}
    named = ToolCalls(NAMES[:1], is_arguments=True).message('{"city": "Bonn"}', ended=True)["tool_calls"][0]
    assert named["function"] == {"name": "weather", "arguments": '{"city": "Bonn"}'}


def test_a_call_that_was_cut_short_is_given_out_as_far_as_it_came() -> None:
    cut = ToolCalls(NAMES).message(CALL[:-4], ended=False)["tool_calls"][0]["function"]
    assert cut == {"name": "weather", "arguments": '{"city": "Bon'}
    assert ToolCalls(NAMES).message('{"name": "wea', ended=False) == {"content": '{"name": "wea'}


def test_a_grammar_is_part_of_what_is_asked_of_the_edge() -> None:
    from tests.support.memory_device import TalkingDrafter, settings  # noqa: PLC0415

    request = chat(response_format={"type": "json_object"}).generate_request(TalkingDrafter().codec, settings())
    assert request.policy.grammar == Grammar(kind=GrammarKind.JSON_OBJECT)

"""Tool calls in a template's own format, in the shapes of the three APIs."""

import json
from typing import Any

import pytest
from starlette.applications import Starlette

from tests.fleet_device.api.client import ask, chat, chunks, respond
from tests.fleet_device.api.conftest import Make
from tests.support.letter_codec import LetterCodec, in_pieces
from tests.support.memory_device import ScriptedAgent

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}"
    '{% for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}{% endfor %}<think>{{ '' }}{# </think> #}"
)
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": FUNCTION}]
OUTPUT = f"I must look.</think>\n\nI look. {CALL}"


def caller(make: Make, output: str = OUTPUT) -> tuple[Starlette, ScriptedAgent]:
    agent = ScriptedAgent(in_pieces(output))
    return make(agent, codec=LetterCodec(TEMPLATE))[0], agent


def expected(calls: list[dict[str, Any]]) -> bool:
    return [(each["name"], json.loads(each["arguments"])) for each in calls] == [("weather", {"city": "Bonn"})]


def test_a_chat_has_the_thinking_the_text_and_the_call(make: Make) -> None:
    app, agent = caller(make)
    [choice] = chat(app, tools=TOOLS).json()["choices"]
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("I must look.", "I look. ")
    assert expected([each["function"] for each in message["tool_calls"]])
    assert choice["finish_reason"] == "tool_calls"
    assert agent.asked[0]["policy"].grammar is None


def test_a_stream_has_the_same(make: Make) -> None:
    app, _ = caller(make)
    found = [each["choices"][0] for each in chunks(chat(app, tools=TOOLS, stream=True))]
    deltas = [each["delta"] for each in found]
    assert "".join(each.get("content") or "" for each in deltas) == "I look. "
    assert expected([call["function"] for each in deltas for call in each.get("tool_calls", ())])
    assert found[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_has_an_item_for_each(make: Make, stream: bool) -> None:
    app, _ = caller(make)
    answer = respond(app, tools=[{"type": "function", **FUNCTION}], stream=stream)
    if stream:
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
        output = json.loads(lines[-1])["response"]["output"]
    else:
        output = answer.json()["output"]
    assert [each["type"] for each in output] == ["reasoning", "message", "function_call"]
    assert expected(output[2:])


@pytest.mark.parametrize("stream", [False, True])
def test_ollama_has_the_call_as_a_whole(make: Make, stream: bool) -> None:
    app, _ = caller(make)
    body = {"model": "fleet", "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS, "stream": stream}
    lines = [json.loads(line) for line in ask(app, "POST", "/api/chat", body=body).text.splitlines()]
    assert "".join(each["message"]["content"] for each in lines) == "I look. "
    assert [each["function"] for each in lines[-1]["message"]["tool_calls"]] == [
        {"name": "weather", "arguments": {"city": "Bonn"}}
    ]


def test_a_call_that_must_come_is_required_behind_the_thinking(make: Make) -> None:
    app, agent = caller(make, f"I must.</think>{CALL}")
    message = chat(app, tools=TOOLS, tool_choice="required").json()["choices"][0]["message"]
    assert expected([each["function"] for each in message["tool_calls"]])
    grammar = agent.asked[0]["policy"].grammar
    assert "thinking" in grammar.text
    assert "<tool_call>" in grammar.text

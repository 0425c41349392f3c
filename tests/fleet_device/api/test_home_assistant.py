"""Requests as Home Assistant 2026.11 sends them, with its prompt cut short; `tests/system` runs it."""

import copy
import json
from typing import Any

import pytest

from tests.fleet_device.api.client import ask, chunks
from tests.fleet_device.api.conftest import Make
from tests.fleet_device.api.test_native_calls import CALL, caller

SYSTEM = {
    "role": "system",
    "content": "You are a voice assistant for Home Assistant.\n- names: Desk lamp\n  domain: light",
}
ASKED = {"role": "user", "content": "Please make the desk lamp shine"}
RESULT = (
    '{"data":{"speech":{},"response_type":"action_done","data":{"success":[{"name":"Desk lamp","type":"entity",'
    '"id":"light.desk_lamp"}],"failed":[]}},"error":false}'
)
STRINGS = {"type": "array", "items": {"type": "string"}}
NAMED = {"name": {"type": "string"}, "area": {"type": "string"}, "floor": {"type": "string"}}
TURN_ON = {
    "name": "intent__HassTurnOn",
    "parameters": {
        "type": "object",
        "properties": {**NAMED, "domain": STRINGS, "device_class": {**STRINGS, "items": {"enum": ["door", "switch"]}}},
        "additionalProperties": False,
    },
    "description": "Turns on/opens/presses a device or entity.",
}
LIVE_CONTEXT = {
    "name": "homeassistant__GetLiveContext",
    "parameters": {
        "type": "object",
        "properties": {"domain": {"anyOf": [{"type": "string"}, STRINGS], "description": "Filter entities by domain."}},
        "additionalProperties": False,
    },
    "description": "Provides real-time information.",
}
NOTHING = {
    "name": "llm__GetDateTime",
    "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS = [{"type": "function", "function": each} for each in (TURN_ON, LIVE_CONTEXT, NOTHING)]
ARGUMENTS = {"name": "Desk lamp"}
ON = CALL.replace('"weather"', '"intent__HassTurnOn"').replace(json.dumps({"city": "Bonn"}), json.dumps(ARGUMENTS))


def llama_cpp(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    fixed = {"model": "toy", "stream": True, "max_tokens": 3000, "temperature": 0.7, "tools": TOOLS, "top_p": 1.0}
    return {**fixed, "messages": [SYSTEM, *messages], "user": "01M8W015TGENSQCB09J7CA66YV", **fields}


def ollama(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    fixed = {"model": "toy", "stream": True, "options": {"num_ctx": 8192}, "keep_alive": -1.0, "think": True}
    tools = copy.deepcopy(TOOLS)
    for tool in tools:  # its client drops what it does not know
        del tool["function"]["parameters"]["additionalProperties"]  # type: ignore[attr-defined]
    del tools[1]["function"]["parameters"]["properties"]["domain"]["anyOf"]  # type: ignore[index]
    return {**fixed, "tools": tools, "messages": [SYSTEM, *messages], **fields}


@pytest.mark.parametrize("stream", [False, True])
def test_the_model_is_tried_when_the_integration_is_added(make: Make, stream: bool) -> None:
    app, _ = caller(make, "The capital")
    tool = {
        "name": "test_function",
        "description": "Test function.",
        "parameters": {"type": "object", "properties": {}},
    }
    body = {"model": "toy", "stream": stream, "messages": [SYSTEM, ASKED], "max_tokens": 3}
    body["tools"] = [{"type": "function", "function": tool}]
    assert ask(app, "POST", "/v1/chat/completions", body=body).status_code == 200


def test_llama_cpp_calls_and_returns_the_result(make: Make) -> None:
    app, _ = caller(make, f"I think.</think>{ON}")
    first, *deltas = [
        each["choices"][0]["delta"] for each in chunks(ask(app, "POST", "/v1/chat/completions", body=llama_cpp(ASKED)))
    ]
    assert first["role"] == "assistant"
    assert not any(each.get("content") for each in deltas)
    [call] = [call for each in deltas for call in each.get("tool_calls", ())]
    assert (call["index"], json.loads(call["function"]["arguments"])) == (0, ARGUMENTS)
    said = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{key: call[key] for key in ("id", "function", "type")}],
    }
    result = {"role": "tool", "tool_call_id": call["id"], "content": RESULT}
    app, _ = caller(make, "I know.</think>The lamp is on.")
    answer = chunks(ask(app, "POST", "/v1/chat/completions", body=llama_cpp(ASKED, said, result)))
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in answer) == "The lamp is on."


def test_llama_cpp_goes_on_after_an_answer_that_was_all_thinking(make: Make) -> None:
    app, _ = caller(make, "I know.</think>It is on.")
    body = llama_cpp(ASKED, {"role": "assistant", "content": None}, ASKED)
    assert ask(app, "POST", "/v1/chat/completions", body=body).status_code == 200


def test_ollama_calls_and_returns_the_results(make: Make) -> None:
    app, _ = caller(make, f"I think.</think>{ON}\n{ON}")
    lines = [json.loads(each) for each in ask(app, "POST", "/api/chat", body=ollama(ASKED)).text.splitlines()]
    assert "".join(each["message"]["content"] for each in lines) == ""
    calls = [{"function": {"name": "intent__HassTurnOn", "arguments": ARGUMENTS}}] * 2
    assert lines[-1]["message"]["tool_calls"] == calls
    said = {"role": "assistant", "thinking": "I think.", "tool_calls": calls}
    result = {"role": "tool", "content": RESULT}
    app, _ = caller(make, "I know.</think>The lamp is on.")
    answer = ask(app, "POST", "/api/chat", body=ollama(ASKED, said, result, result))
    assert answer.status_code == 200
    found = [json.loads(each)["message"] for each in answer.text.splitlines()]
    assert "".join(each["content"] for each in found) == "The lamp is on."
    assert "".join(each.get("thinking", "") for each in found) == "I know."

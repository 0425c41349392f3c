import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from fleet_device.api.requests import ChatRequest, read_request
from fleet_device.api.responses import ResponseReply, ResponsesRequest
from fleet_device.errors import SessionFailed
from fleet_device.requests.generate import GeneratedText, GenerateRequest, Piece, generate_text
from fleet_device.requests.structured import ChatMessage
from schemas.policy import SamplingPolicy
from schemas.reasons import EndReason
from tests.fleet_device.api.client import described, error, respond
from tests.fleet_device.api.conftest import Make
from tests.support.memory_device import ScriptedAgent, TalkingDrafter, settings


def events(response: httpx.Response) -> list[dict[str, Any]]:
    parts = [part.split("\ndata: ") for part in response.text.split("\n\n") if part.startswith("event: ")]
    bodies = [json.loads(body) for _, body in parts]
    assert [kind.removeprefix("event: ") for kind, _ in parts] == [body["type"] for body in bodies]
    assert [body["sequence_number"] for body in bodies] == list(range(len(bodies)))
    return bodies


def test_a_stream_has_its_events_in_order(app: Starlette) -> None:
    bodies = events(respond(app, stream=True))
    assert [body["type"] for body in bodies] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(body.get("delta", "") for body in bodies) == "t1 t2 t3 "
    assert bodies[-1]["response"]["output"][0]["content"][0]["text"] == "t1 t2 t3 "


def test_a_stream_that_fails_says_so(make: Make) -> None:
    *_, last = events(respond(make(ScriptedAgent(error=SessionFailed("Lost.")))[0], stream=True))
    assert (last["type"], last["message"], last["code"]) == ("error", "Lost.", "session_failed")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"store": True}, "store"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"input": [{"type": "item_reference", "id": "1"}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f"}]}, "input[0].arguments"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": ""}]}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_object"}}, "grammar": {"kind": "json-object"}}, "text"),
        ({"model": None}, "model"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning"}]}, "input"),
        ({"input": None}, "input"),
        ({"instructions": 5}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
    ],
)
def test_what_is_not_served_is_refused(app: Starlette, fields: dict[str, Any], param: str) -> None:
    response = respond(app, **fields)
    assert (response.status_code, error(response)["param"]) == (400, param)


TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
CALL = '{"name": "weather", "arguments": {"city": "Bonn"}}'


def generated(text: str, reason: EndReason = EndReason.STOP) -> GeneratedText:
    request = GenerateRequest((1,), SamplingPolicy(seed=1), max_new_tokens=9)
    return replace(generate_text(ScriptedAgent(reason=reason), TalkingDrafter(), request), text=text)


def reply_to(**fields: Any) -> ResponseReply:
    asked = read_request(ResponsesRequest, json.dumps({"model": "m", "input": "t1", **fields}).encode())
    return ResponseReply("1", 1, "toy", asked, settings(), lambda: 2.0, asked.chat().tool_calls())


@pytest.mark.parametrize(
    ("choice", "text", "reason", "item"),
    [
        ("required", CALL, EndReason.STOP, ("function_call", "weather", '{"city": "Bonn"}', "completed")),
        ("auto", CALL, EndReason.STOP, ("function_call", "weather", '{"city": "Bonn"}', "completed")),
        ("auto", CALL[:-6], EndReason.LENGTH, ("function_call", "weather", '{"city": "B', "incomplete")),
        ("auto", "Warm.", EndReason.STOP, ("message", None, "Warm.", "completed")),
        ("auto", "", EndReason.STOP, ("message", None, "", "completed")),
        ("required", CALL[:12], EndReason.LENGTH, ("message", None, CALL[:12], "incomplete")),
        (
            {"type": "function", "name": "weather"},
            "{}",
            EndReason.STOP,
            ("function_call", "weather", "{}", "completed"),
        ),
    ],
)
def test_an_answer_is_text_or_a_call_whole_and_in_pieces(choice: Any, text: str, reason: EndReason, item: Any) -> None:
    ended = generated(text, reason)
    stream = reply_to(tools=[TOOL], tool_choice=choice)
    sent = [*stream.first(), *(each for place in range(len(text)) for each in stream.piece(Piece(text[place], 1)))]
    bodies = [json.loads(each.partition(b"data: ")[2]) for each in [*sent, *stream.last(ended)]]
    assert [body["sequence_number"] for body in bodies] == list(range(len(bodies)))
    assert "".join(body.get("delta", "") for body in bodies) == item[2]
    assert bodies[-1]["type"] == f"response.{item[3]}"
    for body in (reply_to(tools=[TOOL], tool_choice=choice).whole(ended), bodies[-1]["response"]):
        [found] = body["output"]
        said = found["arguments"] if found["type"] == "function_call" else found["content"][0]["text"]
        assert (found["type"], found.get("name"), said, found["status"]) == item


def test_several_calls_are_items_of_their_own_whole_and_in_pieces() -> None:
    text = f'{CALL}\n{{"name": "weather", "arguments": {{}}}}\n{CALL[:-6]}'
    ended = generated(text, EndReason.LENGTH)
    stream = reply_to(tools=[TOOL])
    sent = [*stream.first(), *(each for place in range(len(text)) for each in stream.piece(Piece(text[place], 1)))]
    bodies = [json.loads(each.partition(b"data: ")[2]) for each in [*sent, *stream.last(ended)]]
    grown: dict[int, str] = {}
    for body in bodies:
        if body["type"] == "response.function_call_arguments.delta":
            grown[body["output_index"]] = grown.get(body["output_index"], "") + body["delta"]
    items = [body["item"] for body in bodies if body["type"] == "response.output_item.done"]
    expected = [('{"city": "Bonn"}', "completed"), ("{}", "completed"), ('{"city": "B', "incomplete")]
    assert [grown[index] for index in range(3)] == [arguments for arguments, _ in expected]
    whole = reply_to(tools=[TOOL]).whole(ended)
    for output in (items, bodies[-1]["response"]["output"], whole["output"]):
        assert [(item["arguments"], item["status"]) for item in output] == expected
        assert len({item["id"] for item in output}) == len({item["call_id"] for item in output}) == 3
    assert whole["parallel_tool_calls"]
    assert not reply_to(tools=[TOOL], parallel_tool_calls=False).whole(generated(CALL))["parallel_tool_calls"]


def test_log_probabilities_come_with_the_text_whole_and_in_pieces(app: Starlette) -> None:
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    body = respond(app, **fields).json()
    [part] = body["output"][0]["content"]
    assert body["top_logprobs"] == 2
    assert [each["token"] for each in part["logprobs"]] == ["t1 ", "t2 ", "t3 "]
    assert [len(each["top_logprobs"]) for each in part["logprobs"]] == [2, 2, 2]
    *others, done, _, _, last = events(respond(app, stream=True, **fields))
    deltas = [each for body in others for each in body.get("logprobs", ())]
    assert deltas == done["logprobs"] == last["response"]["output"][0]["content"][0]["logprobs"] == part["logprobs"]
    assert not respond(app).json()["output"][0]["content"][0]["logprobs"]


def test_some_of_the_tools_may_be_allowed() -> None:
    tools = [TOOL, TOOL | {"name": "stop"}]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "stop"}]}
    calls = read_chat(input="t1", tools=tools, tool_choice=choice).tool_calls()
    assert calls is not None
    assert (list(calls.schemas), calls.may_talk) == (["stop"], False)


def test_what_has_no_effect_is_ignored(app: Starlette) -> None:
    assert respond(app, reasoning={"effort": "high"}, text={"verbosity": "low"}).status_code == 200


def test_calls_and_their_results_are_messages() -> None:
    call = {"type": "function_call", "id": "fc_1", "status": "completed", "name": "weather", "arguments": "{}"}
    asked = read_chat(
        input=[
            {"role": "user", "content": "t1"},
            {"type": "message", "role": "assistant", "phase": "commentary", "content": "t2"},
            call | {"call_id": "1"},
            call | {"call_id": "2"},
            {"type": "function_call_output", "call_id": "1", "output": "warm"},
            {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "cold"}]},
        ],
        tools=[TOOL],
    )
    _, user, assistant, *results = described(asked)
    assert (user, assistant.content.count("weather"), assistant.role) == (ChatMessage("user", "t1"), 2, "assistant")
    assert [result.content.split()[-1] for result in results] == ["warm", "cold"]


def read_chat(**fields: Any) -> ChatRequest:
    return read_request(ResponsesRequest, json.dumps({"model": "fleet", **fields}).encode()).chat()


def test_input_is_a_chat_with_instructions_first() -> None:
    given = [
        {"role": "user", "content": [{"type": "input_text", "text": "t1"}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "content": [{"type": "output_text", "text": "t2"}]},
        {"role": "user", "content": "t3"},
    ]
    asked = read_chat(input=given, instructions="t4", seed=5)
    assert [(each.role, each.content) for each in asked.messages] == [
        ("system", "t4"),
        ("user", "t1"),
        ("assistant", "t2"),
        ("user", "t3"),
    ]
    assert asked.seed == 5

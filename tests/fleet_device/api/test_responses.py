import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from fleet_device.api.app import create_app
from fleet_device.api.problems import ApiProblem
from fleet_device.api.requests import ChatRequest, read_request
from fleet_device.api.responses import ResponsesRequest
from fleet_device.errors import SessionFailed
from schemas.reasons import EndReason
from tests.fleet_device.api.client import ask, error
from tests.support.memory_device import ScriptedAgent, ScriptedBackend, TalkingDrafter, settings


@pytest.fixture
def make() -> Iterator[Callable[..., Starlette]]:
    made: list[ScriptedBackend] = []

    def build(agent: ScriptedAgent | None = None) -> Starlette:
        made.append(ScriptedBackend(agent or ScriptedAgent(), TalkingDrafter(context=64)))
        return create_app(made[-1], settings(), wall_clock=lambda: 1234.5)

    yield build
    for backend in made:
        backend.close()


def respond(app: Starlette, **fields: Any) -> httpx.Response:
    return ask(app, "POST", "/v1/responses", body={"model": "fleet", "input": "t1 t2", **fields})


def events(response: httpx.Response) -> list[dict[str, Any]]:
    parts = [part.split("\ndata: ") for part in response.text.split("\n\n") if part.startswith("event: ")]
    bodies = [json.loads(body) for _, body in parts]
    assert [kind.removeprefix("event: ") for kind, _ in parts] == [body["type"] for body in bodies]
    assert [body["sequence_number"] for body in bodies] == list(range(len(bodies)))
    return bodies


def test_a_response_has_its_text_and_its_usage(make: Callable[..., Starlette]) -> None:
    body = respond(make(), max_output_tokens=9).json()
    assert (body["object"], body["status"], body["incomplete_details"]) == ("response", "completed", None)
    [item] = body["output"]
    assert (item["type"], item["role"], item["content"][0]["text"]) == ("message", "assistant", "t1 t2 t3 ")
    assert (body["usage"]["input_tokens"], body["usage"]["output_tokens"]) == (3, 3)


def test_a_text_that_is_cut_off_is_incomplete(make: Callable[..., Starlette]) -> None:
    body = respond(make(ScriptedAgent(reason=EndReason.LENGTH))).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_a_stream_has_its_events_in_order(make: Callable[..., Starlette]) -> None:
    bodies = events(respond(make(), stream=True))
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


def test_a_stream_that_fails_says_so(make: Callable[..., Starlette]) -> None:
    *_, last = events(respond(make(ScriptedAgent(error=SessionFailed("Lost."))), stream=True))
    assert (last["type"], last["message"], last["code"]) == ("error", "Lost.", "session_failed")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"store": True}, "store"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"input": [{"type": "item_reference", "id": "1"}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f"}]}, "input.0.arguments"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content"),
        ({"input": [{"role": "user", "content": ""}]}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format"),
        ({"text": {"format": {"type": "json_object"}}, "grammar": {"kind": "json-object"}}, "text"),
        ({"model": None}, "model"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"instructions": 5}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    make: Callable[..., Starlette], fields: dict[str, Any], param: str
) -> None:
    response = respond(make(), **fields)
    assert (response.status_code, error(response)["param"]) == (400, param)


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


def test_a_format_is_a_chat_s_response_format() -> None:
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    assert read_chat(input="t1", text={"format": form}).response_format is not None
    with pytest.raises(ApiProblem, match="JSON"):
        read_request(ResponsesRequest, b"{")

import json
from typing import Any

import httpx2
import pytest
from openai import OpenAI

from benchmarks.tools import ToolAnswer, ToolCase, ask, judge, tool

PLAY: dict[str, Any] = {
    "name": "music.play",
    "description": "Play a song.",
    "parameters": {
        "type": "dict",
        "properties": {
            "artist": {"type": "string", "description": "Whose."},
            "minutes": {"type": "float", "optional": True},
            "type": {"type": "tuple", "items": {"type": "any"}},
        },
        "required": ["artist"],
    },
}
RIGHT = [{"music.play": {"artist": ["A"]}}, {"music.play": {"artist": ["B"]}}]


def call(arguments: str, name: str = "music_play") -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def answered(calls: list[dict[str, Any]], *, right: Any = RIGHT, finish: str = "tool_calls") -> ToolAnswer:
    seen: list[Any] = []

    def serve(request: httpx2.Request) -> httpx2.Response:
        asked = json.loads(request.content)
        assert asked["tool_choice"] == ("auto" if right is None else "required")
        assert asked.get("parallel_tool_calls", True)
        message = {"role": "assistant", "content": None, "tool_calls": calls}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        return httpx2.Response(200, json={"id": "1", "object": "chat.completion", "choices": [choice]})

    def check(_functions: Any, called: Any, _right: Any, category: str) -> bool:
        seen.append((called, category))
        return len(called) == len(RIGHT)

    http = httpx2.Client(transport=httpx2.MockTransport(serve))
    with OpenAI(base_url="http://device/v1", api_key="unused", http_client=http) as client:
        case = ToolCase("parallel", "parallel_0", [{"role": "user", "content": "Play."}], [PLAY], right)
        return ask(client, case, check, tokens=10)


def test_a_function_becomes_a_tool_with_json_schemas_types() -> None:
    function = tool(PLAY)["function"]
    assert function["name"] == "music_play"
    properties = function["parameters"]["properties"]
    assert function["parameters"]["type"] == "object"
    assert [properties[name]["type"] for name in ("artist", "minutes", "type")] == ["string", "number", "array"]
    assert properties["type"]["items"] == {"type": "string"}


@pytest.mark.parametrize(
    ("calls", "counts"),
    [
        ([call('{"artist": "A"}'), call('{"artist": "B"}')], (2, True, True, True)),
        ([call('{"artist": "A", "minutes": 5}')], (1, True, True, False)),
        ([call('{"minutes": 5}')], (1, True, False, False)),
        ([call("{}", "other")], (1, True, False, False)),
        ([call('{"artist"')], (1, False, False, False)),
    ],
)
def test_calls_are_parsed_validated_and_compared(
    calls: list[dict[str, Any]], counts: tuple[int, bool, bool, bool]
) -> None:
    found = answered(calls)
    assert (found.calls, found.parsed, found.valid, found.right) == counts


@pytest.mark.parametrize(("calls", "right"), [([], True), ([call('{"artist": "A"}')], False)])
def test_where_no_function_fits_no_call_is_right(calls: list[dict[str, Any]], right: bool) -> None:
    assert answered(calls, right=None).right is right


@pytest.mark.parametrize(("finish", "sound"), [("tool_calls", False), ("length", True)])
def test_only_an_answer_that_was_cut_off_may_be_wrong(finish: str, sound: bool) -> None:
    assert judge([answered([call("{")], finish=finish)]).sound is sound

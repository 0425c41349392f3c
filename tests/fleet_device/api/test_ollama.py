import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from fleet_common.grammar.closing import closed
from fleet_device.api.ollama import OllamaChatRequest, OllamaGenerateRequest, OllamaReply
from fleet_device.api.requests import ChatRequest, read_request
from fleet_device.errors import SessionFailed
from fleet_device.requests.generate import Piece
from fleet_device.requests.structured import ChatMessage
from schemas.policy import Grammar
from schemas.reasons import EndReason
from tests.fleet_device.api.client import ask, described
from tests.fleet_device.api.conftest import Make
from tests.fleet_device.api.test_responses import CALL, generated
from tests.support.keys_file import keys_file
from tests.support.memory_device import ScriptedAgent

USER = [{"role": "user", "content": "t1 t2"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def chat(app: Starlette, **fields: Any) -> httpx.Response:
    return ask(app, "POST", "/api/chat", body={"model": "toy", "messages": USER, **fields})


def generate(app: Starlette, **fields: Any) -> httpx.Response:
    return ask(app, "POST", "/api/generate", body={"model": "toy", "prompt": "t1 t2", **fields})


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def test_a_chat_whole_and_in_lines(app: Starlette) -> None:
    body = chat(app, stream=False).json()
    assert body["message"] == {"role": "assistant", "content": "t1 t2 t3 "}
    assert (body["model"], body["done"], body["done_reason"]) == ("toy", True, "stop")
    assert (body["prompt_eval_count"], body["eval_count"]) == (3, 3)
    assert body["total_duration"] == body["prompt_eval_duration"] + body["eval_duration"] == 100_000_000
    *pieces, last = lines(chat(app))
    assert "".join(each["message"]["content"] for each in pieces) == "t1 t2 t3 "
    assert len(pieces) > 1
    assert not any(each["done"] for each in pieces)
    assert last == body | {"message": {"role": "assistant", "content": ""}}


def test_a_prompt_is_a_chat_unless_it_is_raw(make: Make) -> None:
    agent = ScriptedAgent()
    app, backend = make(agent)
    assert generate(app, stream=False).json()["response"] == "t1 t2 t3 "
    assert "".join(each["response"] for each in lines(generate(app, system="t3"))) == "t1 t2 t3 "
    assert generate(app, stream=False, raw=True).status_code == 200
    encode = backend.codec.encode
    expected = [encode("user: t1 t2 "), encode("system: t3 user: t1 t2 "), encode("t1 t2")]
    assert [list(each["prompt"]) for each in agent.asked] == expected


def test_options_are_those_of_a_request(make: Make) -> None:
    agent = ScriptedAgent()
    app, _ = make(agent)
    options = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "seed": 3, "num_predict": 5, "num_ctx": 8192, "min_p": 0}
    assert chat(app, options=options, keep_alive="5m", think=False).status_code == 200
    assert chat(app, options={"num_predict": -1, "seed": -1}).status_code == 200
    first, second = agent.asked
    policy = first["policy"]
    assert (policy.temperature, policy.top_k, policy.top_p, policy.seed) == (0.5, 7, 0.9, 3)
    assert (first["max_new_tokens"], second["policy"].seed) == (5, 5)
    assert second["max_new_tokens"] > 5


@pytest.mark.parametrize(
    ("think", "effort", "budget"),
    [(None, None, None), (False, "none", None), (True, "medium", None), ("low", "low", 1024), ("high", "high", None)],
)
def test_a_level_of_thinking_is_an_effort_and_a_budget(think: Any, effort: str | None, budget: int | None) -> None:
    request = read_request(OllamaChatRequest, json.dumps({"model": "x", "messages": USER, "think": think}).encode())
    asked = request.openai()
    assert isinstance(asked, ChatRequest)
    assert (asked.effort, asked.thinking_budget) == (effort, budget)


@pytest.mark.parametrize("fields", [{"messages": []}, {"messages": [], "stream": False}])
def test_without_a_text_the_model_is_there(app: Starlette, fields: Any) -> None:
    body = chat(app, **fields).json()
    assert (body["done"], body["done_reason"], body["message"]["content"]) == (True, "load", "")
    assert generate(app, prompt="").json()["response"] == ""


@pytest.mark.parametrize(
    "fields",
    [
        {"options": {"repeat_penalty": 0}},
        {"options": {"mirostat": 2}},
        {"options": {"temperature": 9}},
        {"options": {"num_predict": "many"}},
        {"think": True},
        {"format": "xml"},
        {"logprobs": True},
        {"messages": [{"role": "user", "content": "t1", "images": ["AAAA"]}]},
        {"messages": [{"role": "usr", "content": "t1"}]},
        {"tools": [{"type": "function"}]},
        {"model": ""},
    ],
)
def test_what_is_not_served_is_refused_in_a_sentence(app: Starlette, fields: Any) -> None:
    response = chat(app, **fields)
    assert response.status_code == 400
    assert set(response.json()) == {"error"}
    assert response.json()["error"].endswith(".")


def test_errors_have_ollamas_shape(make: Make, tmp_path: Path) -> None:
    app, _ = make(ScriptedAgent(error=SessionFailed("Lost.")), applications=keys_file(tmp_path))
    assert set(ask(app, "GET", "/api/tags").json()) == {"error"}
    assert ask(app, "GET", "/api/tags").status_code == 401
    key = {"Authorization": "Bearer sesame"}
    assert isinstance(ask(app, "POST", "/api/pull", headers=key).json()["error"], str)
    body = {"model": "toy", "messages": USER}
    failed = ask(app, "POST", "/api/chat", body=body | {"stream": False}, headers=key)
    assert (failed.status_code, failed.json()) == (502, {"error": "Lost."})
    assert lines(ask(app, "POST", "/api/chat", body=body, headers=key))[-1] == {"error": "Lost."}


def test_models_are_those_of_the_edges(app: Starlette) -> None:
    for path in ("/api/tags", "/api/ps"):
        assert [each["model"] for each in ask(app, "GET", path).json()["models"]] == ["toy-target"]
    for asked in ({"model": "toy-target"}, {"name": "toy-target:latest"}, {"model": "fleet", "verbose": True}):
        shown = ask(app, "POST", "/api/show", body=asked).json()
        info = shown["model_info"]
        assert info[f"{info['general.architecture']}.context_length"] == 64
        assert shown["capabilities"] == ["completion", "tools"]
    for unknown in ({"model": "other"}, {}):
        response = ask(app, "POST", "/api/show", body=unknown)
        assert (response.status_code, set(response.json())) == (404, {"error"})


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/api/chat", {}, 200),
        ("/api/chat", {"Content-Type": "application/x-www-form-urlencoded"}, 200),  # as curl sends it
        ("/api/chat", {"Origin": "http://127.0.0.1:8321", "Content-Type": "application/json"}, 200),
        ("/api/chat", {"Origin": "https://page.example"}, 415),
        ("/api/chat", {"Origin": "null", "Content-Type": "text/plain"}, 415),
        ("/api/show", {"Origin": "https://page.example", "Content-Type": "text/plain"}, 415),
        ("/v1/chat/completions", {}, 415),
    ],
)
def test_a_body_needs_no_type_unless_a_page_may_have_sent_it(
    app: Starlette, path: str, headers: dict[str, str], status: int
) -> None:
    content = json.dumps({"model": "fleet", "messages": USER}).encode()
    assert ask(app, "POST", path, content=content, headers=headers).status_code == status


def read(**fields: Any) -> ChatRequest:
    raw = json.dumps({"model": "toy", "messages": USER, **fields}).encode()
    asked = read_request(OllamaChatRequest, raw).openai()
    assert isinstance(asked, ChatRequest)
    return asked


def test_formats_are_grammars() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    shut = Grammar.json_schema(closed(schema))
    assert read(format="json").text_grammar() == Grammar.json_object()
    assert read(format=schema).text_grammar() == shut
    assert read(format="").text_grammar() is None
    raw = json.dumps({"model": "toy", "prompt": "t1", "raw": True, "format": schema}).encode()
    asked = read_request(OllamaGenerateRequest, raw).openai()
    assert asked is not None
    assert asked.text_grammar() == shut


def test_calls_and_their_results_are_messages() -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    messages = [
        *USER,
        {"role": "assistant", "content": "", "thinking": None, "tool_calls": [call, call]},
        {"role": "tool", "tool_name": "weather", "content": "warm"},
    ]
    _, _, assistant, result = described(read(messages=messages, tools=[TOOL]))
    assert assistant == ChatMessage("assistant", f"{CALL}\n{CALL}")
    assert result == ChatMessage("user", "The function returned: warm")  # type: ignore[comparison-overlap]


def reply() -> OllamaReply:
    return OllamaReply(chat=True, model="toy", created_at="2026-01-02", tools=read(tools=[TOOL]).tool_calls())


@pytest.mark.parametrize("reason", [EndReason.STOP, EndReason.LENGTH])
def test_calls_come_whole_and_one_that_was_cut_off_does_not(reason: EndReason) -> None:
    text = f"{CALL}\n{CALL if reason is EndReason.STOP else CALL[:-6]}"
    ended = generated(text, reason)
    expected = [{"function": {"name": "weather", "arguments": {"city": "Bonn"}}}] * (2 if "stop" in reason else 1)
    assert reply().whole(ended)["message"] == {"role": "assistant", "content": "", "tool_calls": expected}
    stream = reply()
    assert not [line for character in text for line in stream.pieces(Piece(character, 1))]
    [last] = stream.last(ended)
    assert (last["message"]["tool_calls"], last["done"], last["done_reason"]) == (expected, True, reason.value)


def test_words_come_as_they_are_and_a_line_shows_that_the_connection_lives() -> None:
    stream = reply()
    said = [line["message"]["content"] for word in ("War", "m.") for line in stream.pieces(Piece(word, 1))]
    assert said == ["War", "m."]
    assert "tool_calls" not in stream.last(generated("Warm."))[-1]["message"]
    assert [line["message"]["content"] for line in stream.pieces(None)] == [""]

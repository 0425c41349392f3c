import asyncio
import threading
from typing import Any

import pytest

from fleet_device.api.app import MAX_BODY_BYTES
from fleet_device.drafters.contract import DrafterError
from fleet_device.errors import EdgeUnavailable, SessionFailed, SessionRefused
from schemas.policy import Mode
from schemas.reasons import EndReason, RefusalCode
from tests.fleet_device.api.client import Sent, ask, ask_and_leave, chat, chunks, complete, error, exchange
from tests.fleet_device.api.conftest import Make
from tests.support.memory_device import SESSION, ScriptedAgent
from tests.support.memory_fleet import START
from tests.support.waiting import until


def test_a_chat_is_answered_in_openai_shape(make: Make) -> None:
    app, _ = make()
    response = chat(app, model="whatever")
    assert response.status_code == 200
    body = response.json()
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["created"], body["model"]) == ("chat.completion", 1234, "toy-target")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "t1 t2 t3 ", "refusal": None, "annotations": []},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 3,
            "rejected_prediction_tokens": 1,
            "reasoning_tokens": 0,
            "audio_tokens": 0,
        },
        "fleet": {
            "cached": 0,
            "drafted": 4,
            "accepted": 3,
            "edge_only": 0,
            "forced": 0,
            "unverified": 0,
            "suffix_drafted": 0,
            "suffix_accepted": 0,
        },
    }
    assert body["fleet"]["session"] == SESSION.hex()
    assert body["fleet"]["acceptance"] == 0.75


def test_a_chat_streams_role_pieces_and_end(make: Make) -> None:
    app, _ = make()
    got = chunks(chat(app, stream=True))
    assert {chunk["object"] for chunk in got} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in got}) == 1
    assert [chunk["choices"][0]["delta"] for chunk in got] == [
        {"role": "assistant", "content": ""},
        {"content": "t1 t2 "},
        {"content": "t3 "},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in got] == [None, None, None, "stop"]
    assert all("usage" not in chunk for chunk in got)


def test_several_choices_are_written_with_a_seed_each(make: Make) -> None:
    agent = ScriptedAgent()
    app, _ = make(agent)
    body = chat(app, n=3, seed=7).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in body["choices"]} == {"t1 t2 t3 "}
    assert sorted(asked["policy"].seed for asked in agent.asked) == [7, 8, 9]
    assert [own["seed"] for own in body["fleet"]["choices"]] == [7, 8, 9]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (3, 9)


def test_several_choices_are_streamed_each_under_its_number(make: Make) -> None:
    app, _ = make()
    *got, last = chunks(chat(app, n=2, stream=True, stream_options={"include_usage": True}))
    for number in (0, 1):
        own = [chunk["choices"][0] for chunk in got if chunk["choices"][0]["index"] == number]
        assert "".join(choice["delta"].get("content", "") for choice in own) == "t1 t2 t3 "
        assert [choice["finish_reason"] for choice in own].count("stop") == 1
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 6)


def test_where_one_choice_has_no_place_in_the_queue_none_is_written(make: Make) -> None:
    agent = ScriptedAgent(gate=threading.Semaphore(0))
    app, backend = make(agent, waiting=1)
    response = chat(app, n=3)
    assert (response.status_code, error(response)["code"]) == (429, "queue_full")
    assert error(response)["type"] == "rate_limit_error"
    assert int(response.headers["retry-after"]) >= 1
    until(lambda: (backend.queue.running, backend.queue.waiting) == (0, 0))
    assert len(backend.cancelled) == 2


def test_parameters_reach_the_agent_and_the_settings_fill_in_the_rest(make: Make) -> None:
    agent = ScriptedAgent()
    app, _ = make(agent, top_p=0.5, max_new_tokens=17)
    chat(app, temperature=0.2, seed=99, top_k=7, mode="coupled")
    chat(app, max_completion_tokens=4)
    first, second = agent.asked
    policy = first["policy"]
    assert (policy.mode, policy.temperature, policy.top_k, policy.top_p, policy.seed) == (Mode.COUPLED, 0.2, 7, 0.5, 99)
    assert first["max_new_tokens"] == 17
    assert (second["max_new_tokens"], second["policy"].mode, second["policy"].seed) == (4, Mode.RESIDUAL, 5)


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (EdgeUnavailable("No edge."), 503, "edge_unavailable"),
        (SessionRefused(RefusalCode.PROMPT_TOO_LONG, "Too long."), 400, "context_length_exceeded"),
        (SessionRefused(RefusalCode.BUSY, "Busy."), 503, "busy"),
        (SessionRefused(RefusalCode.VOCABULARY, "Other family."), 502, "vocabulary-mismatch"),
        (SessionRefused(RefusalCode.OTHER, "A newer edge's reason."), 502, "other"),
        (SessionFailed("Lost."), 502, "session_failed"),
        (DrafterError("Broken."), 502, "draft_model_failed"),
    ],
)
def test_an_early_failure_has_a_status(make: Make, failure: Exception, status: int, code: str) -> None:
    app, _ = make(ScriptedAgent(batches=[], error=failure))
    for stream in (False, True):
        response = complete(app, stream=stream)
        assert response.status_code == status
        assert error(response)["code"] == code
        assert error(response)["message"] == str(failure)
        assert ("retry-after" in response.headers) == (status == 503)


@pytest.mark.parametrize("code", [RefusalCode.QUOTA, RefusalCode.QUARANTINED])
@pytest.mark.parametrize(("retry_s", "header"), [(0.0, "1"), (41.2, "42"), (1e300, "86400")])
def test_a_device_that_waits_answers_429(make: Make, code: RefusalCode, retry_s: float, header: str) -> None:
    app, _ = make(ScriptedAgent(batches=[], error=SessionRefused(code, "Not now.", retry_s=retry_s)))
    for stream in (False, True):
        response = complete(app, stream=stream)
        assert (response.status_code, response.headers["retry-after"]) == (429, header)
        assert (error(response)["code"], error(response)["type"]) == (code.value, "rate_limit_error")


def test_what_is_over_a_quota_at_any_time_is_the_requests_fault(make: Make) -> None:
    app, _ = make(ScriptedAgent(batches=[], error=SessionRefused(RefusalCode.QUOTA, "Its top_k is too large.")))
    response = complete(app, top_k=5000)
    assert (response.status_code, "retry-after" in response.headers) == (400, False)
    assert error(response)["message"] == "Its top_k is too large."


def test_what_should_not_happen_is_not_told_to_the_application(make: Make) -> None:
    app, _ = make(ScriptedAgent(batches=[], error=ZeroDivisionError("secret detail")))
    response = complete(app)
    assert response.status_code == 500
    assert "secret" not in response.text


def test_without_broker_or_edge_the_answer_is_503_at_once(make: Make) -> None:
    agent = ScriptedAgent()
    app, backend = make(agent)
    backend.missing = "The broker cannot be reached."
    response = complete(app)
    assert response.status_code == 503
    assert error(response)["message"] == "The broker cannot be reached."
    assert response.headers["retry-after"] == "2"
    assert not agent.asked
    for path in ("/healthz", "/health"):
        health = ask(app, "GET", path)
        assert (health.status_code, health.json()["status"]) == (503, "waiting")


def test_a_device_that_can_write_alone_is_healthy_without_an_edge(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    app, backend = make(ScriptedAgent())
    monkeypatch.setattr(backend, "health", lambda: {"status": "local", "reason": "No edge is online."})
    health = ask(app, "GET", "/healthz")
    assert (health.status_code, health.json()["reason"]) == (200, "No edge is online.")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_before_any_text_ends_its_session(make: Make, stream: bool) -> None:
    agent = ScriptedAgent(gate=threading.Semaphore(0))
    app, backend = make(agent)

    async def begun(_sent: Sent) -> None:
        await asyncio.to_thread(agent.started.wait, 10.0)

    ask_and_leave(app, {"prompt": "t1", "stream": stream}, begun)
    until(lambda: backend.queue.done == 1)
    assert agent.ended == [EndReason.CANCELLED]


def test_a_client_that_goes_in_the_middle_of_a_stream_ends_its_session(make: Make) -> None:
    agent = ScriptedAgent(gate=threading.Semaphore(1))
    app, backend = make(agent)

    async def first_piece(sent: Sent) -> None:
        while not any(b"t1 t2" in message.get("body", b"") for message in sent):  # noqa: ASYNC110 - a list has no event
            await asyncio.sleep(0)

    sent = ask_and_leave(app, {"prompt": "t1", "stream": True}, first_piece)
    until(lambda: backend.queue.done == 1)
    assert agent.ended == [EndReason.CANCELLED]
    assert not any(b"[DONE]" in message.get("body", b"") for message in sent)


def test_a_client_that_goes_before_its_body_has_come_is_no_fault_of_the_api(make: Make) -> None:
    app, backend = make()
    parts = [{"type": "http.request", "body": b'{"pro', "more_body": True}, {"type": "http.disconnect"}]
    sent = exchange(app, parts)
    assert sent[0]["status"] == 400
    assert backend.queue.done == 0


def test_models_are_those_of_the_edges_that_are_there(make: Make) -> None:
    app, backend = make()
    model = {"id": "toy-target", "object": "model", "created": int(START.timestamp()), "owned_by": "fleet"}
    assert ask(app, "GET", "/v1/models").json() == {"object": "list", "data": [model]}
    assert ask(app, "GET", "/v1/models/toy-target").json() == model
    assert ask(app, "GET", "/v1/models/fleet").json() == model | {"id": "fleet"}
    assert error(ask(app, "GET", "/v1/models/other"))["code"] == "model_not_found"
    backend.missing = "Nobody."
    assert ask(app, "GET", "/v1/models").json()["data"] == []


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({"Content-Type": "text/plain"}, b"{}", 415),
        ({}, b"{}", 415),
        ({"Content-Type": "application/json; charset=utf-8"}, b"{", 400),
        ({"Content-Type": "application/json"}, b" " * (MAX_BODY_BYTES + 1), 413),
        ({"Content-Type": "application/json"}, b"[" * 100_000, 400),
        ({"Content-Type": "application/json"}, b'{"prompt": "t1", "temperature": NaN}', 400),
        ({"Content-Type": "application/json"}, b"\xff\xfe", 400),
    ],
)
def test_a_body_that_is_no_json_is_refused(make: Make, headers: dict[str, str], content: bytes, status: int) -> None:
    app, _ = make()
    response = ask(app, "POST", "/v1/completions", content=content, headers=headers)
    assert response.status_code == status
    error(response)


SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"response_format": SCHEMA}, "response_format"),
        ({"tools": TOOLS}, "tools"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tools"),
        ({"grammar": {"kind": "regex", "text": "("}}, "grammar"),
    ],
)
def test_an_unusable_grammar_is_refused_at_once(make: Make, asked: dict[str, Any], param: str) -> None:
    """The refusal does not depend on the queue or on an edge."""
    agent = ScriptedAgent(gate=threading.Semaphore(0))
    app, backend = make(agent, waiting=0)
    backend.unusable = True
    for missing in (None, "No edge."):
        backend.missing = missing
        for stream in (False, True):
            response = chat(app, stream=stream, **asked)
            assert (response.status_code, error(response)["code"], error(response)["param"]) == (400, "grammar", param)
    assert agent.asked == []


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_says_how_long_its_request_waited(make: Make, stream: bool) -> None:
    app, _ = make()
    assert int(chat(app, stream=stream).headers["X-Fleet-Queue-Ms"]) >= 0


def test_a_stream_counts_its_tokens_in_each_chunk_if_asked(make: Make) -> None:
    app, _ = make()
    options = {"include_usage": True, "continuous_usage_stats": True}
    first, *got, last = chunks(chat(app, stream=True, stream_options=options))
    assert first["usage"] is None
    assert [chunk["usage"]["completion_tokens"] for chunk in got] == [2, 3, 3]
    assert {chunk["usage"]["prompt_tokens"] for chunk in got} == {last["usage"]["prompt_tokens"]}
    alone = chunks(chat(app, stream=True, stream_options={"continuous_usage_stats": True}))
    assert all("usage" not in chunk for chunk in alone)


@pytest.mark.parametrize("edge_only", [None, False, True])
def test_a_request_may_switch_drafting_off(make: Make, edge_only: bool | None) -> None:
    agent = ScriptedAgent()
    assert chat(make(agent)[0], edge_only=edge_only).status_code == 200
    assert agent.edge_only == [bool(edge_only)]


def test_a_chat_needs_a_model(make: Make) -> None:
    app, _ = make()
    for model in (None, ""):
        assert error(chat(app, model=model))["param"] == "model"
    assert complete(app, model=None).status_code == 200


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"prompt": "t1 t2"}, [1, 2]),
        ({"prompt": "t1 t2", "add_special_tokens": False, "model": "m"}, [1, 2]),
        ({"prompt": ""}, []),
        ({"messages": [{"role": "user", "content": "t3"}]}, [1, 3]),
    ],
)
def test_a_text_is_tokenized_as_by_vllm(make: Make, fields: dict[str, Any], tokens: list[int]) -> None:
    app, _ = make()
    body = ask(app, "POST", "/tokenize", body={**fields, "return_token_strs": True}).json()
    strings = [f"t{token} " for token in tokens]
    assert body == {"count": len(tokens), "max_model_len": 64, "tokens": tokens, "token_strs": strings}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "t1", "messages": [{"role": "user", "content": "t3"}]}, "prompt"),
        ({"messages": []}, "messages"),
        ({"prompt": 5}, "prompt"),
    ],
)
def test_what_cannot_be_tokenized_is_named(make: Make, fields: dict[str, Any], param: str) -> None:
    answer = ask(make()[0], "POST", "/tokenize", body=fields)
    assert (answer.status_code, error(answer)["param"]) == (400, param)


@pytest.mark.parametrize(
    ("model", "target"), [("fleet", ""), ("toy-target", "toy-target"), ("toy-target:latest", "toy-target"), ("m", "m")]
)
def test_the_model_names_a_target(make: Make, model: str, target: str) -> None:
    app, backend = make()
    said = chat(app, model=model).json()
    assert backend.targeted == [target]
    assert said["model"] == "toy-target"


def test_a_request_without_a_model_has_the_settings_target(make: Make) -> None:
    app, backend = make(target="large")
    assert complete(app, model="fleet").status_code == 200
    assert backend.targeted == ["large"]

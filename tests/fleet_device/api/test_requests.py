import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, strategies as st
from pydantic import ValidationError

from fleet_device.api.problems import ApiProblem
from fleet_device.api.requests import IGNORED, ChatRequest, CompletionRequest, read_request
from schemas.fields import MAX_TOKENS
from schemas.policy import MAX_SEED, Mode
from tests.support.memory_device import TalkingCodec, TalkingDrafter, settings

USER = {"role": "user", "content": "t1"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def allowed(*names: str, mode: str = "auto") -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def chat(**fields: Any) -> ChatRequest:
    return read_request(ChatRequest, json.dumps({"model": "fleet", "messages": [USER], **fields}).encode())


def completion(**fields: Any) -> CompletionRequest:
    return read_request(CompletionRequest, json.dumps({"prompt": "t1 t2", **fields}).encode())


def test_controls_of_sampling_reach_the_policy() -> None:
    given = {"presence_penalty": 1.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1, "min_p": 0.05}
    asked = chat(**given, logit_bias={"7": -100, "3": 1}, min_tokens=4, logprobs=True)
    policy = asked.generate_request(TalkingCodec(("a", "t1", "t2")), settings()).policy
    assert {name: getattr(policy, name) for name in given} == given
    assert (policy.logit_bias, policy.min_tokens) == (((3, 1.0), (7, -100.0)), 4)
    assert policy.mode is Mode.COUPLED, "only the edge knows the log-probabilities of adjusted logits"
    endless = chat(ignore_eos=True).generate_request(TalkingCodec(("a", "t1", "t2")), settings()).policy
    assert endless.min_tokens >= settings().max_new_tokens


def test_each_choice_has_the_next_seed() -> None:
    assert [choice.seed for choice in chat(n=3, seed=7).choices(settings())] == [7, 8, 9]
    assert [choice.seed for choice in chat(n=2).choices(settings(seed=40))] == [40, 41]
    assert [choice.seed for choice in chat(n=2, seed=MAX_SEED).choices(settings())] == [MAX_SEED, 0]
    drawn = [choice.seed for choice in chat(n=2).choices(settings(seed=None))]
    assert drawn[0] is not None
    assert drawn[1] == (drawn[0] + 1) % (MAX_SEED + 1)
    alone = chat(seed=7)
    assert alone.choices(settings()) == [alone]


def test_what_asks_for_nothing_is_taken() -> None:
    chat(
        n=1, logprobs=False, top_logprobs=None, tools=[], tool_choice="none", frequency_penalty=0, presence_penalty=0.0,
        response_format={"type": "text"}, user="me", metadata={"a": "b"}, store=False, logit_bias={},
    )  # fmt: skip


@pytest.mark.parametrize("value", [True, 3, -1, "x", {"a": 1}])
def test_what_does_no_harm_is_taken_whatever_its_value(value: Any) -> None:
    assert chat(**dict.fromkeys(IGNORED, value)) == chat()
    assert completion(**dict.fromkeys(IGNORED, value)) == completion()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"mode": "fast"}, "mode"),
        ({"seed": -1}, "seed"),
        ({"stop": ""}, "stop[0]"),
        ({"stream_options": {"x": 1}}, "stream_options.x"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{**USER, "tool_call_id": "1"}]}, "messages[0]"),
        ({"messages": [{**USER, "tool_calls": [CALL]}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content"),
        ({"messages": [{**USER, "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].function"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TOOL], "grammar": {"kind": "regex", "text": "x"}}, "tools"),
        ({"tools": [TOOL], "tool_choice": allowed("g")}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"grammar": {"kind": "gbnf", "text": "x"}}, "grammar.kind"),
        ({"grammar": {"kind": "regex", "text": "x" * 70_000}}, "grammar.text"),
        ({"grammar": {"kind": "regex", "text": "é" * 40_000}}, "grammar.text"),
        (
            {"response_format": {"type": "json_object", "schema": {"const": "x" * 70_000}}},
            "response_format",
        ),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"logpobs": True}, "logpobs"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"length_penalty": 0.5}, "length_penalty"),
        ({"audio": {"voice": "a"}}, "audio"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"min_p": 1.5}, "min_p"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        *(({"thinking_token_budget": each}, "thinking_token_budget") for each in (-1, 1.5, "5", True, 1 << 40)),
        ({"thinking_token_budget": 5, "logprobs": True}, "thinking_token_budget"),
        ({"n": 0}, "n"),
        ({"logprobs": 0}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"n": True}, "n"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiProblem) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert str(caught.value).endswith(".")


RESULT = {"role": "tool", "content": "x", "tool_call_id": "1"}
NAMELESS = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [USER, RESULT]}, "messages[1].role", None),
        ({"messages": [RESULT, {"role": "assistant", "tool_calls": [CALL]}]}, "messages[0].role", None),
        ({"messages": "x"}, "messages", "invalid_type"),
        ({"model": None}, "model", "missing_required_parameter"),
        ({"response_format": NAMELESS}, "response_format.json_schema.name", "missing_required_parameter"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema", None),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"temperature": 9}, "temperature", "decimal_above_max_value"),
        ({"top_p": 0}, "top_p", "decimal_below_min_value"),
        ({"n": 9}, "n", "integer_above_max_value"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"stop": ["a"] * 5}, "stop", "array_above_max_length"),
        ({"stop": "a" * 300}, "stop[0]", "string_above_max_length"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "invalid_value"),
        ({"tools": [{**TOOL, "x": 1}]}, "tools[0].x", "unknown_parameter"),
        ({"grammar": 'root ::= "a"'}, "grammar", "invalid_value"),
        ({"grammar": {"type": "regex", "value": "a"}}, "grammar", "invalid_value"),
    ],
)
def test_errors_have_openais_codes(fields: dict[str, Any], param: str, code: str | None) -> None:
    with pytest.raises(ApiProblem) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)
    assert str(caught.value).endswith(".")


def test_the_result_of_a_call_is_taken_with_the_call() -> None:
    called = {"role": "assistant", "tool_calls": [CALL, {**CALL, "id": "2"}]}
    chat(messages=[USER, called, RESULT, {**RESULT, "tool_call_id": "2"}, USER])
    chat(messages=[USER, {**called, "tool_calls": [{**CALL, "index": 0}]}, RESULT])
    chat(messages=[{**USER, "name": "me"}], stream=True, stream_options={"include_usage": True})


def test_content_may_come_in_parts_of_text() -> None:
    parts = [{"type": "text", "text": "t1 "}, {"type": "text", "text": "t2"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].content == "t1 t2"


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    answer = {"role": "assistant", "content": "t3", "refusal": None, "tool_calls": None, "annotations": []}
    assert chat(messages=[USER, answer, USER]).messages[1].content == "t3"


@pytest.mark.parametrize(
    ("prompt", "tokens"), [("t1 t2", [1, 2]), (["t3"], [3]), ([1, 2, 3], [1, 2, 3]), ([[4, 5]], [4, 5])]
)
def test_a_prompt_is_text_or_tokens(prompt: object, tokens: list[int]) -> None:
    assert list(completion(prompt=prompt).generate_request(TalkingDrafter().codec, settings()).prompt) == tokens


@pytest.mark.parametrize("prompt", [[-1], {"a": 1}, None, [1, "a"], "", [], [""], [[]], ["a", [-1]], ["a"] * 300])
def test_other_prompts_are_refused(prompt: object) -> None:
    with pytest.raises(ApiProblem) as caught:
        completion(prompt=prompt)
    assert (caught.value.status, caught.value.param) == (400, "prompt")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("stop", [""] * 300_000, id="stop"),
        pytest.param("prompt", [1] * (MAX_TOKENS + 1), id="prompt"),
        pytest.param("messages", [{}] * 300_000, id="messages"),
    ],
)
def test_of_very_many_faults_one_is_found(field: str, value: list[object]) -> None:
    """Describing each of them blocked the event loop for a second."""
    model = ChatRequest if field == "messages" else CompletionRequest
    fields = {"prompt": "t1"} if field == "stop" else {}
    with pytest.raises(ApiProblem, match=field) as caught:
        read_request(model, json.dumps({**fields, field: value}).encode())
    cause = caught.value.__cause__
    assert isinstance(cause, ValidationError)
    assert cause.error_count() <= 3  # a message lacks two fields, and then there is no message


NAMES = st.sampled_from(["messages", "prompt", "stop", "n", "seed", "role", "content"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_whatever_comes_is_a_request_or_a_problem(body: bytes) -> None:
    for model in (ChatRequest, CompletionRequest):
        with contextlib.suppress(ApiProblem):
            assert read_request(model, body).temperature is None  # none of the names above

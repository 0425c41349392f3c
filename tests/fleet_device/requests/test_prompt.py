import itertools
from pathlib import Path
from typing import Any

import pytest

from fleet_device.api.requests import ChatRequest
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.errors import InvalidRequest
from fleet_device.requests.generate import GenerateRequest, generate_text
from fleet_device.requests.prompt import Prompt, TextOptions, prepare_request
from fleet_device.requests.structured import ChatMessage
from fleet_device.requests.template import ChatError
from fleet_device.settings import DeviceSettings
from schemas.policy import Grammar, Mode, SamplingPolicy
from tests.support.memory_device import ScriptedAgent, TalkingDrafter, settings
from tests.support.tiny_gguf import tiny_gguf

CODEC = TalkingDrafter().codec


def prepare(prompt: Any = "t1", **options: Any) -> GenerateRequest:
    defaults = settings(temperature=0.5, top_k=7, top_p=0.9, max_new_tokens=20, seed=4)
    return prepare_request(prompt, defaults, **options).encode(CODEC)


@pytest.mark.parametrize(
    ("prompt", "raw", "meant"),
    [
        ("t1 t2", False, "user: t1 t2 "),
        ("t1 t2", True, "t1 t2"),
        ([{"role": "system", "content": "t3"}, {"role": "user", "content": "t1"}], False, "system: t3 user: t1 "),
        ([{"role": "developer", "content": "t3"}, {"role": "user", "content": "t1"}], False, "system: t3 user: t1 "),
        ((ChatMessage("user", "t1"),), True, "user: t1 "),
    ],
)
def test_a_prompt_is_a_text_or_a_chat(prompt: Prompt, raw: bool, meant: str) -> None:
    assert list(prepare(prompt, raw=raw).prompt) == CODEC.encode(meant)


def test_options_that_are_given_override_the_settings() -> None:
    request = prepare(
        max_new_tokens=0, temperature=0, top_k=0, top_p=1.0, mode="coupled", seed=2**64 - 1, stop=["a", "b"]
    )
    policy = request.policy
    assert (policy.temperature, policy.top_k, policy.top_p, policy.seed) == (0.0, 0, 1.0, 2**64 - 1)
    assert (policy.mode, request.max_new_tokens, request.stop) == (Mode.COUPLED, 0, ("a", "b"))
    assert prepare(stop="end").stop == ("end",)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 9}, "temperature"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"mode": "greedy"}, "mode"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": 1}, "stop"),
        ({"stop": "x" * 257}, "stop"),
        ({"stop": ["x"] * 5}, "stop"),
        ({"truncate": "start"}, "truncate"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": True}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": float("inf")}, "timeout"),
        ({"timeout": "5"}, "timeout"),
        ({"logit_bias": {1 << 31: 1.0}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: -101}}, "logit_bias"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(options: TextOptions, named: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{named}") as caught:
        prepare(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        3,
        b"t1",
        {"role": "user"},
        [{"role": "tool", "content": "warm"}],
        [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
        [-1],
        [1, "t1"],
        [True],
        [{"role": "user"}],
        [{"role": 1, "content": "x"}],
        [{"role": "usr", "content": "x"}],
        [ChatMessage("usr", "x")],
        [ChatMessage("tool", "x")],
        "",
        [],
        [{"role": "user", "content": ""}],
    ],
)
def test_a_prompt_that_is_none_is_refused_in_a_sentence(prompt: object) -> None:
    with pytest.raises(InvalidRequest):
        prepare(prompt)


WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALLED = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}


def test_functions_are_offered_as_by_the_http_api() -> None:
    messages = [
        {"role": "user", "content": "t1"},
        {"role": "assistant", "content": None, "tool_calls": [CALLED | {"id": "1"}]},
        {"role": "tool", "tool_call_id": "1", "content": "t2"},
    ]
    for choice in ("auto", "required", {"type": "function", "function": {"name": "weather"}}):
        fields: Any = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False}
        prepared = prepare_request(messages, settings(), **fields)
        asked = ChatRequest.model_validate({"model": "m", "messages": messages, **fields})
        assert prepared.policy.grammar == asked.text_grammar()
        assert prepared.encode(CODEC).prompt == asked.generate_request(CODEC, settings()).prompt
    assert prepare_request(messages, settings(), tools=[WEATHER], tool_choice="none").policy.grammar is None


def test_a_request_reads_the_calls_in_its_text() -> None:
    request = prepare(tools=[WEATHER])
    assert request.offer is not None
    one = '{"name": "weather", "arguments": {"city": "Bonn"}}'
    calls = request.offer.read(f"{one}\n{one}")
    assert [(call.function.name, call.function.arguments) for call in calls] == [("weather", '{"city": "Bonn"}')] * 2
    assert len({call.id for call in calls}) == 2
    assert request.offer.read("Warm.") == ()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [WEATHER | {"more": 1}]}, "tools"),
        ({"tools": "weather"}, "tools"),
        ({"tools": [WEATHER], "tool_choice": "all"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"tools": [WEATHER], "grammar": Grammar.json_object()}, "grammar"),
        ({"tools": [WEATHER], "raw": True}, "tools"),
    ],
)
def test_functions_that_cannot_be_offered_are_refused(options: TextOptions, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named) as caught:
        prepare(**options)
    assert "\n" not in str(caught.value)


def test_a_chat_is_rendered_only_when_its_turn_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(CODEC), "chat_template", None)
    prepared = prepare_request("t1", settings())
    with pytest.raises(ChatError):
        prepared.encode(CODEC)
    assert prepare("t1", raw=True).prompt == (1,)


POLICY = SamplingPolicy(temperature=1.0, top_k=0, top_p=1.0, seed=1)


@pytest.mark.parametrize("context", [1, 2, 3, 16, 17, 100, 257])
def test_no_size_of_prompt_and_context_breaks_a_device(tmp_path: Path, context: int) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf", context=4096)
    drafter = LlamaCppDrafter(LlamaCppSettings(path, threads=1, context=context))
    agent = ScriptedAgent()
    lengths = {1, 2, context // 2, context - 1, context, context + 1, 3 * context, 1000} - {0}
    for length, most in itertools.product(sorted(lengths), (0, 1, 10_000)):
        prompts = ("th e" * (length // 4) + "x" * (length % 4), [3 + index % 200 for index in range(length)])
        for prompt, raw in ((prompts[0], True), (prompts[0], False), (prompts[1], True)):
            request = prepare_request(prompt, DeviceSettings(), raw=raw, max_new_tokens=most).encode(drafter.codec)
            generate_text(agent, drafter, request)
            if len(request.prompt) < context:
                drafter.reset(request.prompt)
                drafter.next(POLICY)
    drafter.reset([3])
    for _ in range(context - 1):
        drafter.next(POLICY)
        drafter.extend([4])
    drafter.next(POLICY)
    drafter.close()

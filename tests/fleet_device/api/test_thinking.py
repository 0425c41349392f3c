import json
from typing import Any

import pytest
from starlette.applications import Starlette

from tests.fleet_device.api.client import ask, chat, chunks, respond
from tests.fleet_device.api.conftest import Make
from tests.support.letter_codec import LetterCodec, in_pieces
from tests.support.memory_device import ScriptedAgent, ScriptedBackend

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }};{% endfor %}{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% elif starts %}<think>{% endif %}{{ extra }}"
)
OUTPUT = "<think>\nWell, {}.\n</think>\n\nIt is 4."


def thinker(make: Make, output: str = OUTPUT, **more: Any) -> tuple[Starlette, ScriptedBackend, ScriptedAgent]:
    agent = ScriptedAgent(in_pieces(output))
    app, backend = make(agent, codec=LetterCodec(TEMPLATE, more.pop("control", ())), **more)
    return app, backend, agent


def prompt_of(agent: ScriptedAgent) -> str:
    return "".join(map(chr, agent.asked[-1]["prompt"]))


def test_a_chat_has_the_thinking_beside_the_answer(make: Make) -> None:
    app, *_ = thinker(make)
    body = chat(app).json()
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Well, {}.", "It is 4.")
    details = body["usage"]["completion_tokens_details"]
    assert 0 < details["reasoning_tokens"] < body["usage"]["completion_tokens"]


def test_thinking_that_is_off_or_begun_in_the_prompt(make: Make) -> None:
    app, _, agent = thinker(make, "It is 4.")
    for off in ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}):
        assert "reasoning_content" not in chat(app, **off).json()["choices"][0]["message"]
        assert prompt_of(agent).endswith("<think></think>")
    app, *_ = thinker(make, "Well.</think>It is 4.")
    message = chat(app, chat_template_kwargs={"starts": True}).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Well.", "It is 4.")


def test_a_variable_writes_no_control_token(make: Make) -> None:
    app, _, agent = thinker(make, "4", control=("<|end|>",))
    chat(app, chat_template_kwargs={"extra": "<|end|>"})
    assert prompt_of(agent).endswith("<|end|>")  # its letters
    app, _, agent = thinker(make, "4")
    chat(app, chat_template_kwargs={"extra": [{"a": "b"}, 1]})
    assert prompt_of(agent).endswith("[{'a': 'b'}, 1]")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_the_thinking_of_earlier_answers_reaches_the_template(make: Make, name: str) -> None:
    app, _, agent = thinker(make)
    earlier = {"role": "assistant", "content": "4", name: "2 + 2"}
    chat(app, messages=[{"role": "user", "content": "?"}, earlier, {"role": "user", "content": "!"}])
    assert "<think>2 + 2</think>4;" in prompt_of(agent)


def test_a_stop_string_counts_in_the_answer_alone(make: Make) -> None:
    app, *_ = thinker(make)
    message = chat(app, stop="{}").json()["choices"][0]["message"]
    assert message["content"] == "It is 4."
    assert chat(app, stop=" 4").json()["choices"][0]["message"]["content"] == "It is"


def test_the_log_probabilities_reach_to_the_end_of_the_answer(make: Make) -> None:
    app, *_ = thinker(make)
    body = chat(app, stop=" 4", logprobs=True).json()
    choice = body["choices"][0]
    letters = "".join(entry["token"] for entry in choice["logprobs"]["content"])
    assert letters == OUTPUT.removesuffix(" 4.")
    thought = OUTPUT.index("</think>") + len("</think>")
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == thought


# Responses


def test_a_response_has_an_item_of_reasoning(make: Make) -> None:
    app, _, agent = thinker(make)
    body = respond(app, reasoning={"effort": "high", "summary": "auto"}).json()
    thought, said = body["output"]
    assert (thought["type"], thought["content"][0]["text"]) == ("reasoning", "Well, {}.")
    assert said["content"][0]["text"] == "It is 4."
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert body["reasoning"]["effort"] == "high"
    respond(app, input=[{"role": "user", "content": "?"}, thought, said, {"role": "user", "content": "!"}])
    assert "<think>Well, {}.</think>It is 4." in prompt_of(agent)


def test_a_streamed_response_ends_one_item_before_the_next(make: Make) -> None:
    app, *_ = thinker(make)
    parts = [part for part in respond(app, stream=True).text.split("\n\n") if part]
    events = [json.loads(part.split("data: ", 1)[1]) for part in parts]
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert [kind for kind in dict.fromkeys(kinds) if kind.startswith("reasoning")] == [
        "reasoning_text.delta",
        "reasoning_text.done",
    ]
    assert kinds.index("output_item.done") < kinds.index("output_text.delta")
    assert "".join(event["delta"] for event in events if event["type"].endswith("reasoning_text.delta")) == "Well, {}."
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["reasoning", "message"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


# Ollama


def ollama(app: Starlette, **fields: Any) -> Any:
    body = {"model": "fleet", "messages": [{"role": "user", "content": "Hi"}], **fields}
    return ask(app, "POST", "/api/chat", body=body)


def test_ollamas_messages_have_thinking(make: Make) -> None:
    app, _, agent = thinker(make)
    message = ollama(app, stream=False, think=True).json()["message"]
    assert (message["thinking"], message["content"]) == ("Well, {}.", "It is 4.")
    lines = [json.loads(line)["message"] for line in ollama(app).text.splitlines()]
    assert "".join(each.get("thinking", "") for each in lines) == "Well, {}."
    assert "".join(each["content"] for each in lines) == "It is 4."
    ollama(app, think=False)
    assert prompt_of(agent).endswith("<think></think>")
    shown = ask(app, "POST", "/api/show", body={"model": "fleet"})
    assert "thinking" in shown.json()["capabilities"]


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_budget_ends_the_thinking_with_the_closing_mark(make: Make, starts: bool, stream: bool) -> None:
    opening = "" if starts else "<think>"
    outputs = [f"{opening}Well, on and on.</think>never", "It is 4."]
    agent = ScriptedAgent()
    first = agent.generate

    def generate(request: Any, context: Any) -> Any:
        agent.batches = in_pieces(outputs[len(agent.asked)])
        return first(request, context)

    agent.generate = generate  # type: ignore[method-assign]
    app, *_ = make(agent, codec=LetterCodec(TEMPLATE))
    options = {"thinking_token_budget": len(f"{opening}Well,"), "seed": 7, "chat_template_kwargs": {"starts": starts}}
    if stream:
        deltas = [each["choices"][0]["delta"] for each in chunks(chat(app, stream=True, **options)) if each["choices"]]
        said = {key: "".join(each.get(key) or "" for each in deltas) for key in ("reasoning_content", "content")}
    else:
        body = chat(app, max_tokens=100, **options).json()
        said = body["choices"][0]["message"]
        assert body["usage"]["completion_tokens"] == len(f"{opening}Well,</think>It is 4.")
    assert (said["reasoning_content"], said["content"]) == ("Well,", "It is 4.")
    before, after = agent.asked
    assert after["prompt"] == (*before["prompt"], *map(ord, f"{opening}Well,</think>"))
    assert (before["policy"].seed, after["policy"].seed != 7) == (7, True)
    assert stream or after["max_new_tokens"] == 100 - len(f"{opening}Well,</think>")


def test_a_budget_of_nothing_asks_for_the_answer_alone(make: Make) -> None:
    app, _, agent = thinker(make, "It is 4.")
    options = {"thinking_token_budget": 0, "chat_template_kwargs": {"starts": True}}
    message = chat(app, **options).json()["choices"][0]["message"]
    assert message["content"] == "It is 4."
    assert "reasoning_content" not in message
    assert len(agent.asked) == 1
    assert prompt_of(agent).endswith("<think></think>")


@pytest.mark.parametrize(
    ("output", "options"),
    [
        (OUTPUT, {"thinking_token_budget": 100}),
        ("It is 4.", {"thinking_token_budget": 0}),
        (OUTPUT, {"thinking_token_budget": 8, "max_tokens": 10}),  # no room for an answer
        ("<think>abc\0", {"thinking_token_budget": 11}),  # it ended by itself
    ],
    ids=["short", "none", "no-room", "ended"],
)
def test_a_thinking_within_its_budget_is_left_alone(make: Make, output: str, options: dict[str, int]) -> None:
    app, _, agent = thinker(make, output)
    assert chat(app, **options).status_code == 200
    assert len(agent.asked) == 1


def test_after_a_cut_thinking_the_constraint_is_the_answers_alone(make: Make) -> None:
    app, _, agent = thinker(make, "<think>Well, on and on.")
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    chat(app, response_format=schema, thinking_token_budget=6)
    before, after = (asked["policy"].grammar for asked in agent.asked)
    assert before.kind.value == "lark"
    assert after.kind.value.startswith("json")

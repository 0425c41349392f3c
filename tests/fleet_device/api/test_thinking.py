import json
from typing import Any

import pytest
from starlette.applications import Starlette

from tests.fleet_device.api.client import ask, chat, chunks
from tests.fleet_device.api.conftest import Make
from tests.support.letter_codec import LetterCodec
from tests.support.memory_device import ScriptedAgent, ScriptedBackend

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }};{% endfor %}{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% elif starts %}<think>{% endif %}{{ extra }}"
)
OUTPUT = "<think>\nWell, {}.\n</think>\n\nIt is 4."


def thinker(make: Make, output: str = OUTPUT, **more: Any) -> tuple[Starlette, ScriptedBackend, ScriptedAgent]:
    agent = ScriptedAgent(batches=[[ord(letter) for letter in output[at : at + 3]] for at in range(0, len(output), 3)])
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


def test_a_stream_has_the_same_in_pieces(make: Make) -> None:
    app, *_ = thinker(make)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks(chat(app, stream=True))]
    assert "".join(each.get("reasoning_content") or "" for each in deltas) == "Well, {}."
    assert "".join(each.get("content") or "" for each in deltas) == "It is 4."


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


@pytest.mark.parametrize("fields", [{"reasoning_effort": "much"}, {"chat_template_kwargs": {"messages": []}}])
def test_what_cannot_be_set_is_refused(make: Make, fields: dict[str, Any]) -> None:
    app, *_ = thinker(make)
    response = chat(app, **fields)
    assert (response.status_code, response.json()["error"]["param"].split(".")[0]) == (400, next(iter(fields)))


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


# Responses


def respond(app: Starlette, **fields: Any) -> Any:
    return ask(app, "POST", "/v1/responses", body={"model": "fleet", "input": "Hi", **fields})


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

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from fleet_device.applications import Application, ApplicationsFile, new_key
from fleet_edge import SessionLog
from schemas.policy import Mode, SamplingPolicy
from tests.support.scripted_language import LANGUAGE, reference_text
from tests.support.served_device import ReadingDrafter, Served, served_device
from tests.support.waiting import PATIENCE_S, until

pytestmark = [pytest.mark.broker]

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "t1 t2 t3"}]
COUPLED: Any = {"mode": "coupled", "top_k": 20}
LENGTH = 24
ASKED: Any = {"model": "fleet", "messages": MESSAGES, "max_tokens": LENGTH, "seed": 5, "extra_body": COUPLED}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_device(tmp_path_factory.mktemp("served"), state_dir=tmp_path_factory.mktemp("state")) as served:
        yield served


def client_of(served: Served, key: str = "unused") -> OpenAI:
    return OpenAI(base_url=served.url, api_key=key, max_retries=0, timeout=PATIENCE_S)


@pytest.fixture
def client(served: Served) -> OpenAI:
    return client_of(served)


def expected(seed: int, length: int = LENGTH) -> str:
    codec = ReadingDrafter().codec
    policy = SamplingPolicy(mode=Mode.COUPLED, temperature=0.7, top_k=20, top_p=0.95, seed=seed)
    tokens = reference_text(codec.encode("user: t1 t2 t3 "), policy, length)
    return b"".join(map(codec.piece, tokens)).decode()


def test_a_chat_is_the_targets_own_text(client: OpenAI) -> None:
    reply = client.chat.completions.create(**ASKED)
    assert reply.choices[0].message.content == expected(5)
    assert reply.choices[0].finish_reason == "length"
    assert reply.model == "scripted-target"
    usage = reply.usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.completion_tokens_details is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (4, LENGTH, 4 + LENGTH)
    told: Any = usage.model_extra
    written = told["fleet"]["edge_only"] + told["fleet"]["accepted"]
    assert 0 < written <= LENGTH
    assert usage.completion_tokens_details.accepted_prediction_tokens == told["fleet"]["accepted"]


def test_a_stream_is_the_same_text_in_pieces_with_its_usage(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == expected(5)
    assert sum(bool(piece) for piece in pieces) > 1
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [LENGTH]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"


def test_a_stop_string_ends_the_count_of_tokens_whatever_was_drafted(client: OpenAI) -> None:
    words = expected(5).split()
    stop = next(word for place, word in enumerate(words) if place > 4 and word not in words[:place])
    found = set()
    for edge_only in (False, True, None):
        asked = ASKED | {"stop": f"{stop} ", "extra_body": COUPLED | {"edge_only": edge_only}}
        reply = client.chat.completions.create(**asked)
        assert reply.usage is not None
        found.add((reply.choices[0].finish_reason, reply.usage.completion_tokens))
    assert found == {("stop", words.index(stop) + 1)}


def test_what_openai_refuses_is_refused_with_its_code(client: OpenAI) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fleet", messages=MESSAGES, response_format=schema)
    assert (caught.value.param, caught.value.code) == (
        "response_format.json_schema.name",
        "missing_required_parameter",
    )
    result: Any = {"role": "tool", "tool_call_id": "call_1", "content": "7"}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fleet", messages=[*MESSAGES, result])
    assert caught.value.param == "messages[1].role"
    assert client.models.retrieve("fleet").id == "fleet"


def test_a_completion_goes_on_from_a_prompt(client: OpenAI) -> None:
    reply = client.completions.create(
        model="fleet", prompt="user: t1 t2 t3", max_tokens=LENGTH, seed=5, extra_body=COUPLED
    )
    assert reply.choices[0].text == expected(5)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"n": 99}, "n"),
        ({"temperature": -1.0}, "temperature"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"extra_body": {"max_token": 5}}, "max_token"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
def test_what_is_not_served_is_an_error_that_names_it(client: OpenAI, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fleet", messages=MESSAGES, **fields)
    assert caught.value.param == param
    assert param in str(caught.value)


def test_curl_gets_the_same(served: Served) -> None:
    body = {"model": "fleet", "messages": MESSAGES, "max_tokens": LENGTH, "seed": 5, **COUPLED}
    command = [
        "curl", "--silent", "--show-error", "--no-buffer", "--max-time", "60", f"{served.url}/chat/completions",
        "-H", "Content-Type: application/json", "-d",
    ]  # fmt: skip
    plain = subprocess.run([*command, json.dumps(body)], capture_output=True, text=True, check=True).stdout
    assert json.loads(plain)["choices"][0]["message"]["content"] == expected(5)
    stream = subprocess.run(
        [*command, json.dumps({**body, "stream": True})], capture_output=True, text=True, check=True
    ).stdout
    lines = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    deltas = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1]]
    assert "".join(deltas) == expected(5)


def exact_logprobs(tokens: list[int]) -> np.ndarray:
    """Return the target's log-probabilities of a sequence, before shaping: `[tokens, vocabulary]`."""
    prefix = ReadingDrafter().codec.encode("user: t1 t2 t3 ")
    rows = []
    for place in range(len(tokens)):
        logits = LANGUAGE.logits([*prefix, *tokens[:place]]).astype(np.float64)
        rows.append(logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
    return np.array(rows)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_logprobs_are_the_targets_before_shaping(client: OpenAI, stream: bool) -> None:
    asked = ASKED | {"logprobs": True, "top_logprobs": 3, "stream": stream}
    reply = client.chat.completions.create(**asked)
    choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
    told = [each for choice in choices if choice.logprobs for each in choice.logprobs.content or ()]
    assert len(told) == LENGTH
    words = list(LANGUAGE.words)
    tokens = [words.index(each.token.strip()) for each in told]
    exact = exact_logprobs(tokens)
    for place, (each, token) in enumerate(zip(told, tokens, strict=True)):
        assert each.logprob == pytest.approx(exact[place, token], abs=1e-4)
        assert each.bytes == list(f"{words[token]} ".encode())
        likeliest = sorted(exact[place], reverse=True)[:3]
        assert [top.logprob for top in each.top_logprobs] == pytest.approx(likeliest, abs=1e-4)


def test_a_completion_has_logprobs_in_its_own_shape(client: OpenAI) -> None:
    reply = client.completions.create(
        model="fleet", prompt="user: t1 t2 t3", max_tokens=8, seed=5, logprobs=2, extra_body=COUPLED
    )
    told = reply.choices[0].logprobs
    assert told is not None
    assert "".join(told.tokens or ()) == reply.choices[0].text == expected(5, 8)
    assert [len(top) for top in told.top_logprobs or ()] == [2] * 8
    assert told.text_offset is not None
    assert [reply.choices[0].text[place:].split()[0] for place in told.text_offset] == expected(5, 8).split()


def test_an_application_is_known_by_its_key_and_its_usage_is_in_the_log(tmp_path: Path) -> None:
    file = ApplicationsFile(tmp_path / "applications.json")
    key, digest = new_key()
    with file.changing() as applications:
        applications.append(Application(name="alarms", sha256=digest, tokens_per_min=1))
    with served_device(tmp_path, applications=file.path) as served:
        with pytest.raises(openai.AuthenticationError, match="app"):
            client_of(served, "wrong").models.list()
        client = client_of(served, key)
        reply = client.chat.completions.create(**ASKED)
        assert reply.choices[0].message.content == expected(5)
        with pytest.raises(openai.RateLimitError, match="alarms"):
            client.chat.completions.create(model="fleet", messages=MESSAGES)
    assert served.whole.rows("SELECT app, tokens FROM segments") == [{"app": "alarms", "tokens": LENGTH}]
    [usage] = SessionLog(served.whole.db).usage(by=["device", "app"])
    assert (usage.device, usage.app, usage.counted.tokens) == ("device-1", "alarms", LENGTH)


def test_a_response_whole_and_streamed(client: OpenAI) -> None:
    body = {**COUPLED, "seed": 5}
    asked: Any = {"model": "fleet", "input": "t1 t2 t3", "max_output_tokens": LENGTH, "extra_body": body}
    whole = client.responses.create(**asked)
    assert whole.output_text == expected(5)
    assert whole.usage is not None
    assert whole.usage.output_tokens == LENGTH
    with client.responses.stream(**asked) as stream:
        pieces = [each.delta for each in stream if each.type == "response.output_text.delta"]
    assert "".join(pieces) == expected(5)
    assert len(pieces) > 1
    with pytest.raises(openai.BadRequestError, match="response"):
        client.responses.create(model="fleet", input="t1", previous_response_id=whole.id)


# In the background


def test_a_response_in_the_background_is_retrieved_streamed_and_deleted(client: OpenAI) -> None:
    response = client.responses.create(
        model="fleet", input="t1 t2 t3", max_output_tokens=LENGTH, background=True, extra_body={**COUPLED, "seed": 5}
    )
    until(lambda: client.responses.retrieve(response.id).status not in ("queued", "in_progress"))
    ended = client.responses.retrieve(response.id)
    assert (ended.status, ended.output_text) == ("incomplete", expected(5))
    whole = list(client.responses.retrieve(response.id, stream=True))
    assert [each.sequence_number for each in whole] == list(range(len(whole)))
    rest = list(client.responses.retrieve(response.id, stream=True, starting_after=4))
    assert rest == whole[5:]
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_a_stream_in_the_background_is_cancelled(client: OpenAI) -> None:
    with client.responses.create(model="fleet", input="t1", background=True, stream=True) as stream:
        first = next(iter(stream))
    assert first.type == "response.created"
    assert client.responses.cancel(first.response.id).status in ("cancelled", "incomplete")

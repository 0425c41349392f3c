"""The clients of OpenAI, Ollama and LangChain with a model that thinks and calls functions."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from openai import OpenAI

from broker_config.broker import Broker
from broker_config.processes import MosquittoProcess
from tests.support.edge_thread import NO_QUOTAS
from tests.support.prepared_models import prepared
from tests.support.scripted_verifier import ScriptedVerifier
from tests.support.served_device import Served, device_at
from tests.support.thinking_model import CONTEXT, DONE, PARIS, THOUGHT, Answers, Draft, ScriptedModel
from tests.support.waiting import PATIENCE_S
from tests.support.whole import FLEET, Whole

pytestmark = [pytest.mark.broker, pytest.mark.models]

NAME, RESULT = "intent__HassTurnOn", "it is on"
FUNCTION = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
TOOL: Any = {"type": "function", "function": {"name": NAME, "parameters": FUNCTION}}
QUESTION: Any = {"role": "user", "content": "What is the capital of France?"}
ORDER: Any = {"role": "user", "content": "Please make the desk lamp shine"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with closing(ScriptedModel(prepared("Q4_0.gguf"), vocabulary_only=True)) as file:
        verifier = ScriptedVerifier(
            Answers(file), file.strings, context=CONTEXT, end_tokens=file.end_tokens, name="thinker"
        )
        with MosquittoProcess(Broker(fleet=FLEET)) as broker:
            whole = Whole(broker.port, tmp_path_factory.mktemp("fleet"), verifier, {"quotas": NO_QUOTAS})
            with whole.edge(), device_at(whole, Draft(file), max_new_tokens=200) as served:
                yield served


@pytest.fixture
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=served.url, api_key="unused", max_retries=0, timeout=PATIENCE_S) as client:
        yield client


def test_a_chat_of_openai(client: OpenAI) -> None:
    reply = client.chat.completions.create(model="fleet", messages=[QUESTION], temperature=0)
    message: Any = reply.choices[0].message
    assert (message.content, message.reasoning_content, reply.choices[0].finish_reason) == (PARIS, THOUGHT, "stop")
    usage: Any = reply.usage
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    brief: Any = client.chat.completions.create(
        model="fleet", messages=[QUESTION], temperature=0, reasoning_effort="none"
    )
    assert brief.choices[0].message.content == PARIS
    assert brief.usage.completion_tokens_details.reasoning_tokens == 0


def test_a_call_put_together_from_a_stream_is_sent_back_with_its_result(client: OpenAI) -> None:
    asked: Any = {"model": "fleet", "tools": [TOOL], "temperature": 0}
    with client.chat.completions.stream(messages=[ORDER], **asked) as stream:
        message: Any = stream.until_done().get_final_completion().choices[0].message
    assert message.reasoning_content == THOUGHT
    [call] = message.tool_calls
    assert (call.function.name, call.function.arguments) == (NAME, '{"name": "Desk lamp"}')
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": RESULT}
    reply = client.chat.completions.create(messages=[ORDER, message.model_dump(exclude_none=True), result], **asked)
    assert reply.choices[0].message.content == DONE


def test_a_response_with_a_call_is_sent_back_with_its_result(client: OpenAI) -> None:
    tool: Any = {"type": "function", "name": NAME, "parameters": FUNCTION, "strict": False}
    asked: Any = {"model": "fleet", "tools": [tool], "temperature": 0}
    first = client.responses.create(input=[ORDER], **asked)
    thought, call = first.output
    assert (thought.type, call.type) == ("reasoning", "function_call")
    assert first.usage is not None
    assert first.usage.output_tokens_details.reasoning_tokens > 0
    result = {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}
    sent: Any = [ORDER, *(each.model_dump(exclude_none=True) for each in first.output), result]
    assert client.responses.create(input=sent, **asked).output_text == DONE


def test_a_chat_and_a_call_of_ollama(served: Served) -> None:
    ollama = pytest.importorskip("ollama")
    with closing(ollama.Client(host=served.url.removesuffix("/v1"))) as client:
        asked: Any = {"model": "fleet", "think": True, "options": {"temperature": 0}}
        pieces = [part.message for part in client.chat(messages=[QUESTION], stream=True, **asked)]
        assert "".join(each.content or "" for each in pieces) == PARIS
        assert "".join(each.thinking or "" for each in pieces) == THOUGHT
        message = client.chat(messages=[ORDER], tools=[TOOL], **asked).message
        assert (message.thinking, message.tool_calls[0].function.arguments) == (THOUGHT, {"name": "Desk lamp"})
        result = {"role": "tool", "tool_name": NAME, "content": RESULT}
        assert client.chat(messages=[ORDER, message, result], tools=[TOOL], **asked).message.content == DONE


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_an_agent_of_langchain(served: Served, responses: bool) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    model = langchain_openai.ChatOpenAI(
        base_url=served.url, api_key="unused", model="fleet", temperature=0, use_responses_api=responses
    )
    agent = model.bind_tools([TOOL])
    asked = agent.invoke([("user", ORDER["content"])])
    [call] = asked.tool_calls
    assert (call["name"], call["args"]) == (NAME, {"name": "Desk lamp"})
    assert asked.usage_metadata["output_token_details"]["reasoning"] > 0
    result = {"role": "tool", "tool_call_id": call["id"], "content": RESULT}
    assert agent.invoke([("user", ORDER["content"]), asked, result]).text == DONE

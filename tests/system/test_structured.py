"""Structured output through a real mosquitto, with a real vocabulary and a random language.

The target's logits are random, so that only the grammar makes an output follow its schema.
"""

import asyncio
import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from benchmarks.applications.structured import SCHEMAS
from broker_config.broker import Broker
from fleet_common.grammar.tokenizer import GrammarTokenizer
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import BrokerSettings
from fleet_device import AsyncDevice, DeviceSettings
from fleet_device.client.agent import Agent
from fleet_device.drafters.model_file import GgufModel
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.pacing.contract import FixedPacing, Pacing
from fleet_device.requests.generate import GeneratedText, GenerateRequest, generate_text
from fleet_device.session.sequence import TokenOrigin
from fleet_edge.settings import EdgeSettings
from schemas.policy import Grammar, Mode, SamplingPolicy
from schemas.reasons import EndReason
from tests.support.brokers import StartBroker
from tests.support.edge_thread import NO_QUOTAS, edge_thread
from tests.support.prepared_models import prepared
from tests.support.scripted_verifier import ScriptedVerifier
from tests.support.served_device import device_at
from tests.support.toy_devices import PATIENT, PATIENT_OUTAGES
from tests.support.waiting import PATIENCE_S
from tests.support.whole import FLEET, Whole

pytestmark = [pytest.mark.broker, pytest.mark.models]


class Lots:
    """A random language: each prefix has its own logits. Line feeds are likely, so that there are several calls."""

    def __init__(self, file: GgufModel) -> None:
        self.size = file.vocabulary.size
        [self._line_feed] = file.encode("\n")

    def logits(self, prefix: Sequence[int]) -> NDArray[Any]:
        seed = hash((len(prefix), *prefix[-3:])) % (1 << 32)
        logits = np.random.default_rng(seed).standard_normal(self.size, dtype=np.float32) * 3
        logits[self._line_feed] += 4
        return logits


class Target(ScriptedVerifier):
    def __init__(self, file: GgufModel) -> None:
        super().__init__(Lots(file), file.strings, end_tokens=file.end_tokens)
        self._file = file

    def grammar_tokenizer(self) -> GrammarTokenizer:
        return self._file.grammar_tokenizer()


class Draft(ScriptedDrafter):
    def __init__(self, file: GgufModel) -> None:
        super().__init__(Lots(file), file.strings, end_tokens=file.end_tokens)
        self.codec = file  # type: ignore[assignment]
        self.owns_file = False

    def another(self) -> "Draft":
        return Draft(self.codec)  # type: ignore[arg-type]


class Vocabulary(GgufModel):
    @functools.cache  # noqa: B019 - there is one
    def grammar_tokenizer(self) -> GrammarTokenizer:
        return super().grammar_tokenizer()


@pytest.fixture(scope="module")
def file() -> Iterator[GgufModel]:
    model = Vocabulary(prepared("Q4_0.gguf"), vocabulary_only=True)
    yield model
    model.close()


@pytest.fixture
def agents(file: GgufModel, start_mosquitto: StartBroker) -> Iterator[Any]:
    broker = start_mosquitto(Broker(fleet="structured"))
    settings = EdgeSettings(
        fleet="structured", edge="edge-1", broker=BrokerSettings(port=broker.port), quotas=NO_QUOTAS
    )
    links: list[PahoLink] = []

    def make(pacing: Pacing) -> Agent:
        link = PahoLink(BrokerSettings(port=broker.port).link("structured", f"device-{len(links)}", will=None))
        agent = Agent(link, "structured", f"device-{len(links)}", Draft(file), pacing, time.monotonic, PATIENT)
        agent.attach()
        link.start(timeout_s=PATIENCE_S)
        links.append(link)
        return agent

    with edge_thread(settings, Target(file)):
        yield make
        for link in links:
            link.stop()


def write(agent: Agent, grammar: Grammar | None, *, mode: Mode = Mode.RESIDUAL, seed: int = 1) -> GeneratedText:
    policy = SamplingPolicy(mode=mode, temperature=0.8, top_k=40, top_p=0.95, seed=seed, grammar=grammar)
    return generate_text(agent, agent.drafter, GenerateRequest((1, 2, 3), policy, 600, outages=PATIENT_OUTAGES))


PLANS = {"drafted": FixedPacing(4), "edge-only": FixedPacing(32, edge_only=True), "ahead": FixedPacing(2, ahead=True)}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_whatever_the_model_says_each_text_keeps_to_its_schema(agents: Any, plan: Pacing) -> None:
    agent = agents(plan)
    for number, (name, (_, schema)) in enumerate(SCHEMAS.items()):
        mode = Mode.COUPLED if number % 2 else Mode.RESIDUAL
        text = write(agent, Grammar.json_schema(schema), mode=mode, seed=number)
        assert text.reason is EndReason.STOP, name
        jsonschema.validate(json.loads(text.text), schema)
        assert (text.origins.count(TokenOrigin.FORCED) > 0) != (plan == PLANS["edge-only"]), name


def test_with_the_same_seed_a_coupled_text_is_the_same_whoever_writes_it(agents: Any) -> None:
    schema = Grammar.json_schema(SCHEMAS["reading"][1])
    texts = {write(agents(plan), schema, mode=Mode.COUPLED, seed=5).text for plan in PLANS.values()}
    assert len(texts) == 1


def test_regular_expressions_and_lark_are_kept_to(agents: Any) -> None:
    agent = agents(FixedPacing(4))
    assert write(agent, Grammar.regex("(yes|no), [0-9]{3} times")).text[:4] in ("yes,", "no, ")
    lark = 'start: "<" WORD ("," WORD)~1..2 ">"\nWORD: /[a-z]{1,6}/\n'
    text = write(agent, Grammar.lark(lark)).text
    assert text[0] + text[-1] == "<>"
    assert 1 <= text.count(",") <= 2


@pytest.fixture
def client(file: GgufModel, start_mosquitto: StartBroker, tmp_path: Path) -> Iterator[openai.OpenAI]:
    broker = start_mosquitto(Broker(fleet=FLEET))
    whole = Whole(broker.port, tmp_path, Target(file), {"quotas": NO_QUOTAS})
    with whole.edge(), device_at(whole, Draft(file), draft_length=4) as served:
        yield openai.OpenAI(base_url=served.url, api_key="unused", max_retries=0, timeout=PATIENCE_S)


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bonn", "Rom"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
ASKED: Any = {"model": "fleet", "messages": [{"role": "user", "content": "How is the weather?"}], "max_tokens": 200}


def test_openais_client_gets_what_it_asks_for(client: openai.OpenAI) -> None:
    schema = SCHEMAS["reading"][1]
    format_: Any = {"type": "json_schema", "json_schema": {"name": "reading", "schema": schema, "strict": True}}
    reply = client.chat.completions.create(**ASKED, response_format=format_)
    jsonschema.validate(json.loads(reply.choices[0].message.content or ""), schema)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    told: Any = reply.usage.model_extra
    assert told["fleet"]["forced"] > 0


def test_openais_client_is_called_back(client: openai.OpenAI) -> None:
    weather, other = WEATHER, {"type": "function", "function": {"name": "other"}}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        tools = [weather] if choice == "required" else [weather, other]
        reply = client.chat.completions.create(**ASKED, tools=tools, tool_choice=choice, parallel_tool_calls=False)
        (call,) = reply.choices[0].message.tool_calls or ()
        assert (reply.choices[0].finish_reason, reply.choices[0].message.content) == ("tool_calls", None)
        jsonschema.validate(json.loads(call.function.arguments), weather["function"]["parameters"])
        assert call.function.name == "weather"


def test_openais_client_assembles_several_calls_whole_and_streamed(client: openai.OpenAI) -> None:
    other: Any = {"type": "function", "function": {"name": "other", "parameters": SCHEMAS["reading"][1]}}
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (WEATHER, other)}
    counts = list[int]()
    for seed in range(6):  # by lot: the model's logits are random
        coupled = {"mode": "coupled", "seed": seed}
        asked: Any = ASKED | {"max_tokens": 1000, "tools": [WEATHER, other], "tool_choice": "required"}
        reply = client.chat.completions.create(**asked, extra_body=coupled)
        calls = [(each.function.name, each.function.arguments) for each in reply.choices[0].message.tool_calls or ()]
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), schemas[name])
        assert reply.choices[0].finish_reason == "tool_calls"
        assert reply.usage is not None
        told: Any = reply.usage.model_extra
        assert told["fleet"]["drafted"] > 0
        with client.chat.completions.stream(**asked, extra_body=coupled) as stream:
            message = stream.get_final_completion().choices[0].message
        assert [(each.function.name, each.function.arguments) for each in message.tool_calls or ()] == calls
        flat: Any = [{"type": "function", **tool["function"]} for tool in (WEATHER, other)]
        fixed: Any = {"model": "fleet", "input": "How is the weather?", "max_output_tokens": 1000}
        fixed |= {"tools": flat, "tool_choice": "required", "extra_body": coupled}
        whole = client.responses.create(**fixed).output
        with client.responses.stream(**fixed) as responses:
            streamed = responses.get_final_response().output
        for output in (whole, streamed):
            assert [(item.name, item.arguments) for item in output if item.type == "function_call"] == calls
        counts.append(len(calls))
    assert max(counts) > 1, counts


def test_python_gets_several_calls(file: GgufModel, start_mosquitto: StartBroker, tmp_path: Path) -> None:
    broker = start_mosquitto(Broker(fleet=FLEET))
    settings = DeviceSettings(
        fleet=FLEET, device="device-1", broker=BrokerSettings(port=broker.port), draft_length=4, mode=Mode.COUPLED
    )

    async def answers() -> list[GeneratedText]:
        async with AsyncDevice(settings, load=lambda _settings: Draft(file)) as device:
            assert await device.wait_for_edge(10.0)
            asked: Any = {"tools": [WEATHER], "tool_choice": "required", "max_new_tokens": 500}
            return await asyncio.gather(*(device.generate("How is it?", seed=seed, **asked) for seed in range(6)))

    with Whole(broker.port, tmp_path, Target(file), {"quotas": NO_QUOTAS}).edge():
        texts = asyncio.run(answers())
    for text in texts:
        assert text.reason is EndReason.STOP
        assert text.tool_calls
        for call in text.tool_calls:
            jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    assert max(len(text.tool_calls) for text in texts) > 1


class Reading(BaseModel):
    """A meter's reading."""

    sensor: Literal["inlet", "outlet"]
    celsius: Annotated[int, Field(ge=-40, le=120)]
    alarm: bool


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gets_objects(client: openai.OpenAI, method: str) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    found = []
    for seed in range(4):  # in coupled mode the output depends only on the seed: a random one might be endless blanks
        given = {"model": "fleet", "max_tokens": 1000, "seed": seed, "extra_body": {"mode": "coupled"}}
        model = langchain_openai.ChatOpenAI(base_url=str(client.base_url), api_key="unused", **given)
        found.append(model.with_structured_output(Reading, method=method).invoke("What does the sensor say?"))
    assert all(isinstance(each, Reading) for each in found)
    assert len({each.celsius for each in found}) > 1  # by lot: nothing but the schema says what there is


def test_a_response_is_structured_too(client: openai.OpenAI) -> None:
    fixed: Any = {"max_output_tokens": 1000, "extra_body": {"mode": "coupled", "seed": 1}}
    parsed = client.responses.parse(model="fleet", input="How is the weather?", text_format=Reading, **fixed)
    assert isinstance(parsed.output_parsed, Reading)

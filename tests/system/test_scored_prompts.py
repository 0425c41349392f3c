"""Prompts scored through the whole system are scored as by transformers, in float32."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from openai import OpenAI

from broker_config.broker import Broker
from broker_config.processes import MosquittoProcess
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_edge.verifiers.torch_engine.verifier import TorchVerifier
from tests.fleet_edge.verifiers.oracle import VOCABULARY, target_of, tiny_model
from tests.support.edge_thread import NO_QUOTAS
from tests.support.markov import MarkovScript
from tests.support.memory_device import TalkingCodec
from tests.support.served_device import device_at
from tests.support.whole import FLEET, Whole

pytestmark = [pytest.mark.broker]

WORDS = [f"t{token}" for token in range(VOCABULARY)]
KV_BYTES = 1 << 24
PROMPTS = [[3 + (place * place + number) % 50 for place in range(length)] for number, length in enumerate((130, 7, 1))]


class TalkingDrafter(ScriptedDrafter):
    def __init__(self) -> None:
        super().__init__(MarkovScript(size=VOCABULARY, seed=1), WORDS, context=256, name="scripted")
        self.codec = TalkingCodec(WORDS)

    def another(self) -> "TalkingDrafter":
        return TalkingDrafter()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    verifier = TorchVerifier(target_of(tiny_model("llama")), budget_bytes=KV_BYTES)
    with MosquittoProcess(Broker(fleet=FLEET)) as broker:
        whole = Whole(broker.port, tmp_path_factory.mktemp("scored"), verifier, {"quotas": NO_QUOTAS})
        with whole.edge(), device_at(whole, TalkingDrafter()) as served:
            yield OpenAI(base_url=served.url, api_key="unused", max_retries=0)


@torch.inference_mode()
def exact(model: Any, tokens: list[int]) -> torch.Tensor:
    """Return transformers' log-probabilities of the token after each: `[tokens, vocabulary]`."""
    return model(input_ids=torch.tensor([tokens])).logits[0, :, :VOCABULARY].log_softmax(-1)


@pytest.mark.parametrize("most", [0, 1, 4])
def test_scores_are_those_of_transformers(client: OpenAI, model: Any, most: int) -> None:
    reply = client.completions.create(
        model="fleet", prompt=PROMPTS, max_tokens=most, temperature=0, echo=True, logprobs=3
    )
    usage = reply.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (sum(map(len, PROMPTS)), most * len(PROMPTS))
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    for prompt, choice in zip(PROMPTS, reply.choices, strict=True):
        told = choice.logprobs
        assert told is not None
        assert told.tokens is not None
        tokens = [WORDS.index(name.strip()) for name in told.tokens]
        assert tokens[: len(prompt)] == prompt
        assert len(tokens) == len(prompt) + most
        assert choice.text == "".join(told.tokens)
        rows = exact(model, tokens)
        own = [float(rows[place, token]) for place, token in enumerate(tokens[1:])]
        assert told.token_logprobs == [None, *(pytest.approx(each, abs=1e-4) for each in own)]
        first, *others = told.top_logprobs or ()
        assert first is None
        for top, row in zip(others, rows, strict=False):
            assert list(top.values()) == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert [row.argmax() for row in rows[len(prompt) - 1 : -1]] == tokens[len(prompt) :]


def test_several_prompts_are_answered_in_their_order(client: OpenAI) -> None:
    several = client.completions.create(model="fleet", prompt=PROMPTS, max_tokens=4, temperature=0, n=2)
    alone = [
        client.completions.create(model="fleet", prompt=prompt, max_tokens=4, temperature=0).choices[0].text
        for prompt in PROMPTS
    ]
    assert [choice.text for choice in several.choices] == [text for text in alone for _ in range(2)]

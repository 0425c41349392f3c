"""Greedy texts of the real model through the whole system are those that the engine under the edge writes by itself."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from broker_config.processes.runner import MosquittoProcess
from fleet_device.drafters.gguf import GgufModel
from fleet_device.drafters.llama_cpp import LlamaCppDrafter
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import RunsElsewhere, Verifier
from fleet_edge.verifiers.llama_cpp.target import open_target
from fleet_edge.verifiers.llama_cpp.verifier import LlamaCppVerifier
from fleet_edge.verifiers.registry import load_verifier
from fleet_edge.verifiers.remote.settings import RemoteSettings
from fleet_edge.verifiers.remote.tokenizer import load_local
from fleet_testing.inference_server import InferenceServer
from schemas.policy import Mode, SamplingPolicy
from tests.fleet_edge.verifiers.llama_cpp.test_verifier import Engine
from tests.support.prepared_models import prepared
from tests.support.whole import Whole
from tests.system.test_law_of_the_models import prompt_ids

pytestmark = [pytest.mark.broker, pytest.mark.models]

Load = Callable[[str], LlamaCppDrafter]

TARGET = "target-Q8_0.gguf"
DRAFT = "Q4_0"
LENGTH = 64
PROMPTS = 2
# Up to here llama.cpp computes single tokens as it computes several, so that its rows are ours to the bit.
CONTEXT = 256


class Writer(Engine):
    """llama.cpp itself, which goes on from what it has computed."""

    def write(self, prompt: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
        """Write a text greedily, a token at a time, in one sequence."""
        text, row = list(prompt), self.rows(list(prompt), 1)[0]
        while len(text) < len(prompt) + LENGTH:
            text.append(int(np.argmax(row)))
            if text[-1] in ends:
                break
            one = (llama_cpp.llama_token * 1)(text[-1])
            assert llama_cpp.llama_decode(self._native, llama_cpp.llama_batch_get_one(one, 1)) == 0
            row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._native, -1), (len(row),))
        return tuple(text[len(prompt) :])


def in_process() -> LlamaCppVerifier:
    target = open_target(prepared(TARGET), gpu_layers=0)
    return LlamaCppVerifier(target, budget_bytes=1 << 28, context=CONTEXT, threads=2)


@contextmanager
def local() -> Iterator[Verifier]:
    yield in_process()


@contextmanager
def remote(api: str) -> Iterator[Verifier]:
    """Ask a server that computes with llama.cpp, and answers as vLLM or SGLang does."""
    path: Path = prepared(TARGET)
    model = GgufModel(path, vocabulary_only=True)
    stored = load_local(str(path)).strings  # control tokens read as they are stored
    words = [model.piece(token).decode("utf-8", "replace") or stored[token] for token in range(len(stored))]
    model.close()
    with InferenceServer(in_process(), words, api=api) as server:
        settings = RemoteSettings.model_validate({"endpoints": server.url, "api": api, "request_s": 60, "step_s": 60})
        verifier = load_verifier(EdgeSettings(engine="remote", target=str(path), remote=settings))
        yield verifier
        assert isinstance(verifier, RunsElsewhere)
        verifier.shut_down()


@pytest.mark.parametrize("mode", [Mode.RESIDUAL, pytest.param(Mode.COUPLED, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("engine", ["llama.cpp", "vllm", "sglang"])
def test_greedy_text_is_the_engine_s_own(
    engine: str, mode: Mode, mosquitto: MosquittoProcess, tmp_path: Path, drafters: Load
) -> None:
    policy = SamplingPolicy(mode=mode, temperature=0.0, seed=1)
    drafter = drafters(DRAFT)
    prompts = prompt_ids(drafter)[:PROMPTS]
    accepted = 0
    with local() if engine == "llama.cpp" else remote(engine) as verifier:
        whole = Whole(mosquitto.port, tmp_path, verifier)
        with whole.edge(), whole.device(drafter, draft_length=4) as device:
            done = [device.agent.generate(ids, policy=policy, max_new_tokens=LENGTH) for ids in prompts]
        ends = verifier.info.end_tokens
    engine_alone = Writer(prepared(TARGET), CONTEXT)
    for ids, text in zip(prompts, done, strict=True):
        assert len(ids) + LENGTH < CONTEXT
        assert text.tokens == engine_alone.write(ids, ends)
        accepted += text.counters.accepted
    engine_alone.close()
    assert accepted > 0  # or no draft would have been verified

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from broker_config.processes import MosquittoProcess
from fleet_device.drafters.llama_cpp import LlamaCppDrafter
from fleet_device.drafters.model_file import GgufModel
from fleet_device.requests.generate import GenerateRequest
from fleet_edge.settings import EdgeSettings, InferenceServerSettings
from fleet_edge.verifiers.contract import Item, RunsElsewhere, Verifier
from fleet_edge.verifiers.llama_cpp.target import open_target
from fleet_edge.verifiers.llama_cpp.verifier import LlamaCppVerifier
from fleet_edge.verifiers.registry import load_verifier
from fleet_edge.verifiers.remote.local import load_local
from schemas.policy import Mode, SamplingPolicy
from tests.fleet_edge.verifiers.llama_cpp.test_verifier import Engine
from tests.support.inference_server import InferenceServer
from tests.support.prepared_models import prepared
from tests.support.whole import Whole
from tests.system.test_law_of_the_models import prompt_ids

pytestmark = [pytest.mark.broker, pytest.mark.models]

Load = Callable[[str], LlamaCppDrafter]

TARGET = "target-Q8_0.gguf"
DRAFT = "Q4_0"
LENGTH = 40
PROMPTS = 2
NEAR_TIE = 0.25
"""Gap between logits near 20: kernels differ for one and several tokens, and activations are quantized."""
CONTEXT = 256


class Alone:
    """llama.cpp itself: one sequence, a token at a time, never rolled back."""

    def __init__(self) -> None:
        self._model = open_target(prepared(TARGET), gpu_layers=0)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = CONTEXT
        parameters.n_threads = parameters.n_threads_batch = 2
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._native = llama_cpp.llama_init_from_model(self._model.handle, parameters)

    def write(self, prompt: Sequence[int], ends: Sequence[int]) -> tuple[tuple[int, ...], list[float]]:
        """Decode greedily; return the tokens, and the gap between the two best logits at each of them."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._native), True)  # noqa: FBT003 - a C function
        text, gaps, row = [], [], self._decode(prompt)
        while len(text) < LENGTH and (not text or text[-1] not in ends):
            text.append(int(np.argmax(row)))
            second, best = np.sort(row)[-2:]
            gaps.append(float(best - second))
            row = self._decode(text[-1:])
        return tuple(text), gaps

    def close(self) -> None:
        llama_cpp.llama_free(self._native)
        self._model.close()

    def _decode(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        batch = (llama_cpp.llama_token * len(tokens))(*tokens)
        call = llama_cpp.llama_batch_get_one(batch, len(tokens))
        assert self._model.thread.call(llama_cpp.llama_decode, self._native, call) == 0
        row = llama_cpp.llama_get_logits_ith(self._native, -1)
        return np.ctypeslib.as_array(row, (self._model.rows,))[: self._model.vocabulary.size]


def in_process() -> LlamaCppVerifier:
    target = open_target(prepared(TARGET), gpu_layers=0)
    return LlamaCppVerifier(target, budget_bytes=1 << 28, context=CONTEXT, threads=2)


@contextmanager
def local() -> Iterator[Verifier]:
    yield in_process()


@contextmanager
def remote() -> Iterator[Verifier]:
    path: Path = prepared(TARGET)
    model = GgufModel(path, vocabulary_only=True)
    stored = load_local(str(path)).strings  # control tokens read as they are stored
    words = [model.piece(token).decode("utf-8", "replace") or stored[token] for token in range(len(stored))]
    model.close()
    with InferenceServer(in_process(), words) as server:
        settings = InferenceServerSettings.model_validate({"endpoint": server.url, "request_s": 60})
        verifier = load_verifier(EdgeSettings(engine="remote", target=str(path), remote=settings))
        yield verifier
        assert isinstance(verifier, RunsElsewhere)
        verifier.shut_down()


@pytest.mark.parametrize(
    ("engine", "mode"),
    [
        ("llama.cpp", Mode.RESIDUAL),
        pytest.param("llama.cpp", Mode.COUPLED, marks=pytest.mark.exhaustive),
        pytest.param("vllm", Mode.RESIDUAL, marks=pytest.mark.exhaustive),
        pytest.param("vllm", Mode.COUPLED, marks=pytest.mark.exhaustive),
    ],
)
def test_greedy_text_is_the_engine_s_own(
    engine: str, mode: Mode, mosquitto: MosquittoProcess, tmp_path: Path, drafters: Load
) -> None:
    policy = SamplingPolicy(mode=mode, temperature=0.0, seed=1)
    drafter = drafters(DRAFT)
    prompts = prompt_ids(drafter)[:PROMPTS]
    accepted = 0
    with local() if engine == "llama.cpp" else remote() as verifier:
        whole = Whole(mosquitto.port, tmp_path, verifier)
        with whole.edge(), whole.device(drafter, draft_length=4) as device:
            done = [
                device.agent.generate(GenerateRequest(ids, policy=policy, max_new_tokens=LENGTH)) for ids in prompts
            ]
        ends = verifier.info.end_tokens
    at_once, alone = Engine(prepared(TARGET), CONTEXT), Alone()
    for ids, text in zip(prompts, done, strict=True):
        # Given the tokens so far, each token is bit-identical to the engine's own, with the verifying kernels.
        rows = at_once.rows([*ids, *text.tokens[:-1]], len(text.tokens))
        assert tuple(np.argmax(rows, axis=1).tolist()) == text.tokens
        # Token by token it is the same, as far as the engine is consistent.
        own, gaps = alone.write(ids, ends)
        if text.tokens != own:
            at = next(place for place, pair in enumerate(zip(text.tokens, own, strict=False)) if len(set(pair)) > 1)
            print(f"texts part at token {at}, where the two best logits lie {gaps[at]:.2g} apart")
            assert gaps[at] < NEAR_TIE
        accepted += text.counters.accepted
    alone.close()
    at_once.close()
    assert accepted > 0  # or no draft would have been verified


@pytest.mark.parametrize("mode", [Mode.RESIDUAL, pytest.param(Mode.COUPLED, marks=pytest.mark.exhaustive)])
def test_greedy_text_in_blocks_is_the_engine_s_own_to_the_bit(
    mode: Mode, mosquitto: MosquittoProcess, tmp_path: Path, drafters: Load
) -> None:
    settings = EdgeSettings(engine="blocks", target=str(prepared("target-Q8_0.gguf")), kv_bytes=1 << 28)
    verifier = load_verifier(settings)
    policy = SamplingPolicy(mode=mode, temperature=0.0, seed=1)
    drafter = drafters(DRAFT)
    prompts = prompt_ids(drafter)[:PROMPTS]
    whole = Whole(mosquitto.port, tmp_path, verifier)
    with whole.edge(), whole.device(drafter, draft_length=4) as device:
        done = [device.agent.generate(GenerateRequest(ids, policy=policy, max_new_tokens=LENGTH)) for ids in prompts]
    for ids, text in zip(prompts, done, strict=True):
        verifier.open(-1)
        row = verifier.score([Item(-1, ids, 1)])[0]
        own: list[int] = []
        while len(own) < LENGTH and (not own or own[-1] not in verifier.info.end_tokens):
            own.append(int(row.argmax()))
            row = verifier.score([Item(-1, own[-1:], 1)])[0]
        verifier.close(-1)
        assert text.tokens == tuple(own)
    assert sum(text.counters.accepted for text in done) > 0

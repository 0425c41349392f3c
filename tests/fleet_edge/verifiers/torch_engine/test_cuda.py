import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from fleet_edge.batching.judging import Case, judge_batch
from fleet_edge.batching.torch_shaping import top_k
from fleet_edge.verifiers.contract import Item
from fleet_edge.verifiers.torch_engine.verifier import TorchVerifier
from schemas.policy import SamplingPolicy
from tests.fleet_edge.verifiers.oracle import VOCABULARY, target_of, tiny_model
from tests.support.needs import require_marker

pytestmark = pytest.mark.cuda

BUDGET = 1 << 24


@pytest.fixture
def gpu() -> torch.device:
    require_marker("cuda")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device on this machine")
    return torch.device("cuda")


@contextmanager
def nothing_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def verifier(name: str, device: torch.device) -> TorchVerifier:
    return TorchVerifier(target_of(tiny_model(name).to(device)), budget_bytes=BUDGET)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2-softcap-window", "gemma3-window", "phi3"])
def test_rows_on_a_gpu_are_those_on_a_processor(gpu: torch.device, name: str) -> None:
    rng = random.Random(name)
    both = [verifier(name, torch.device("cpu")), verifier(name, gpu)]
    lengths = [0] * 5
    for each in both:
        for key in range(5):
            each.open(key)
    for _ in range(20):
        items = []
        for key in rng.sample(range(5), rng.randrange(1, 6)):
            lengths[key] = rng.randint(0, lengths[key])
            tokens = [rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 2, 5, 40]))]
            items.append(Item(key, tokens, rng.randint(0, len(tokens))))
        for each in both:
            for item in items:
                each.truncate(item.sequence, lengths[item.sequence])
        mine, theirs = (each.score(items).cpu() for each in both)
        torch.testing.assert_close(theirs, mine, atol=1e-3, rtol=0)
        for item in items:
            lengths[item.sequence] += len(item.tokens)


def test_a_step_and_its_shaping_wait_for_the_gpu_once(gpu: torch.device) -> None:
    each = verifier("mistral-window", gpu)
    for key in range(3):
        each.open(key)
    items = [Item(0, [5] * 30, 3), Item(1, [6, 7], 2), Item(2, [8], 1)]
    each.score(items)  # what is made once may wait
    for key in range(3):
        each.truncate(key, 0)
    with nothing_waits():
        logits = each.score(items)
        top_k(logits, 1)
    policies = [SamplingPolicy(top_k=5, seed=1), SamplingPolicy(top_k=0, seed=1), SamplingPolicy(temperature=0, seed=1)]
    cases = [
        Case((1,) * (item.rows - 1), (65536,) * (item.rows - 1), policy, 0, bonus=True)
        for item, policy in zip(items, policies, strict=True)
    ]
    waits: list[None] = []
    stream = torch.cuda.Stream.synchronize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.Stream, "synchronize", lambda self: (waits.append(None), stream(self)))
        on_gpu = judge_batch(logits, cases)
    assert len(waits) == 1
    by_processor = judge_batch(logits.cpu().numpy(), cases)
    for mine, theirs in zip(on_gpu, by_processor, strict=True):
        assert (mine.accepted, mine.rejected, mine.token) == (theirs.accepted, theirs.rejected, theirs.token)


@pytest.mark.parametrize("size", [49_152, 151_665])
@pytest.mark.parametrize("k", [1, 50, 300])
def test_the_largest_on_a_gpu_are_those_of_a_stable_sort(gpu: torch.device, size: int, k: int) -> None:
    logits = np.round(4 * np.random.default_rng(size + k).standard_normal((3, size), dtype=np.float32), 1)
    values, ids = top_k(torch.from_numpy(logits).to(gpu), k)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    assert ids.cpu().numpy().tolist() == expected.tolist()
    assert values.cpu().numpy().tolist() == np.take_along_axis(logits, expected, axis=1).tolist()

import itertools
from pathlib import Path

import numpy as np
import pytest

from benchmarks.exactness.cases import LENGTH
from fleet_edge.verifiers.contract import Item
from fleet_edge.verifiers.llama_cpp.target import open_target
from fleet_edge.verifiers.llama_cpp.verifier import LlamaCppVerifier
from sampling.distribution import shape
from schemas.policy import Mode
from schemas.vocabulary import Vocabulary
from tests.support.toy_pair import END_TOKENS, PROMPT, ToyPair, policy
from tests.support.toy_transformer import ToyTransformer

POLICY = policy(Mode.RESIDUAL, 0)
ROUNDING = 0.01
"""Keys and values are rounded to float16, and kernels depend on the number of rows."""


@pytest.fixture
def toy() -> ToyTransformer:
    target = ToyPair.transformer().target
    assert isinstance(target, ToyTransformer)
    return target


@pytest.fixture
def engine(toy: ToyTransformer, tmp_path: Path) -> LlamaCppVerifier:
    path = toy.write_gguf(tmp_path / "toy.gguf", end_token=END_TOKENS[0])
    return LlamaCppVerifier(open_target(path, gpu_layers=0), budget_bytes=1 << 22, threads=1)


def test_llama_cpp_computes_the_same_rows(toy: ToyTransformer, engine: LlamaCppVerifier) -> None:
    assert engine.info.vocabulary == Vocabulary.of(toy.words)
    assert engine.info.end_tokens == END_TOKENS
    for length in range(LENGTH):
        for head in itertools.product(range(1, toy.size), repeat=length):
            engine.open(1)
            (row,) = engine.score([Item(1, (*PROMPT, *head), 1)])
            np.testing.assert_allclose(row, toy.logits((*PROMPT, *head)), atol=ROUNDING)
            # Otherwise the two distributions would differ, however similar the logits are.
            assert shape(row, POLICY).ids.tolist() == shape(toy.logits((*PROMPT, *head)), POLICY).ids.tolist()
            engine.close(1)


def test_llama_cpp_computes_the_same_rows_of_a_long_text(toy: ToyTransformer, engine: LlamaCppVerifier) -> None:
    text = np.random.default_rng(1).integers(1, toy.size, 60).tolist()
    engine.open(1)
    rows = engine.score([Item(1, text, 60)])
    np.testing.assert_allclose(rows, [toy.logits(text[: end + 1]) for end in range(60)], atol=ROUNDING)

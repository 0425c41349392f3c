import itertools
from pathlib import Path

import numpy as np
import pytest

from benchmarks.exactness.cases import LENGTH
from dssd.distribution import shape
from fleet_edge.verifiers.contract import Item
from fleet_edge.verifiers.llama_cpp.slab import open_target
from fleet_edge.verifiers.llama_cpp.verifier import LlamaCppVerifier
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


def test_llama_cpp_computes_the_same_rows_of_every_text_of_the_proof(
    toy: ToyTransformer, engine: LlamaCppVerifier
) -> None:
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


def test_a_row_depends_on_the_whole_text(toy: ToyTransformer) -> None:
    rows = [toy.logits((first, 2, 3)) for first in range(toy.size)]
    assert min(float(np.abs(one - other).max()) for one, other in itertools.combinations(rows, 2)) > 0.1


def test_the_joint_law_is_the_product_of_its_rows(toy: ToyTransformer) -> None:
    law = toy.joint(PROMPT, length=LENGTH, policy=POLICY)
    assert law.sum() == pytest.approx(1.0, abs=1e-6)
    for text in ((1, 2, 3), (5, 0, 4), (3, 3, 3)):
        wanted = 1.0
        for position, token in enumerate(text):
            wanted *= shape(toy.logits((*PROMPT, *text[:position])), POLICY).probability(token)
        assert law[text] == pytest.approx(wanted, rel=1e-6)


def test_a_law_too_large_to_hold_and_an_empty_text_are_refused(toy: ToyTransformer) -> None:
    with pytest.raises(ValueError, match="exceeds"):
        toy.joint(PROMPT, length=30, policy=POLICY)
    with pytest.raises(ValueError, match="empty text"):
        toy.logits(())

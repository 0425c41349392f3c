import random
import threading
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from fleet_edge.verifiers.contract import Item, UnsupportedModel, VerifierError
from fleet_edge.verifiers.llama_cpp.context import NativeContext
from fleet_edge.verifiers.llama_cpp.target import GgufTarget, open_target
from fleet_edge.verifiers.llama_cpp.verifier import LlamaCppVerifier
from tests.fleet_edge.verifiers.oracle import tiny_target_gguf
from tests.support.prepared_models import prepared

BUDGET = 1 << 20
TOLERANCE = 0.02
"""Kernels depend on the number of rows in float32, and keys and values are rounded to float16."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")


class Engine:
    """llama.cpp itself: one sequence, computed at once, never rolled back."""

    def __init__(self, path: Path, context: int) -> None:
        self._model = GgufTarget(path)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = context
        parameters.n_threads = parameters.n_threads_batch = 1
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.swa_full = True
        self._native = llama_cpp.llama_init_from_model(self._model.handle, parameters)
        self._batch = llama_cpp.llama_batch_init(context, 0, 1)

    def rows(self, tokens: list[int], count: int) -> NDArray[np.float32]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._native), True)  # noqa: FBT003
        text = [*tokens, 0]  # a single token would be computed in another way
        self._batch.n_tokens = len(text)
        for place, token in enumerate(text):
            self._batch.token[place], self._batch.pos[place] = token, place
            self._batch.n_seq_id[place], self._batch.seq_id[place][0] = 1, 0
            self._batch.logits[place] = len(tokens) - count <= place < len(tokens)
        assert self._model.thread.call(llama_cpp.llama_decode, self._native, self._batch) == 0
        found = llama_cpp.llama_get_logits(self._native)
        return np.ctypeslib.as_array(found, (count, self._model.rows))[:, : self._model.vocabulary.size].copy()

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._native)
        self._model.close()


def load(path: Path, *, budget: int = BUDGET, **options: Any) -> LlamaCppVerifier:
    return LlamaCppVerifier(open_target(path, gpu_layers=0), budget_bytes=budget, **({"threads": 1} | options))


def random_work(  # noqa: C901 - all that may happen to sequences
    verifier: LlamaCppVerifier, engine: Engine, *, steps: int, longest: int, seed: str, keys: int = 9
) -> float:
    """Prefill, verify, roll back, fork and evict at random; return the largest deviation from the engine."""
    rng, worst = random.Random(seed), 0.0
    size = verifier.info.vocabulary.size
    texts = {key: rng.choices(range(size), k=rng.randrange(1, longest)) for key in range(keys)}
    for key in texts:
        verifier.open(key)
    for step in range(steps):
        items, checks = [], []
        chosen = rng.sample(sorted(texts), rng.randrange(1, len(texts) + 1))
        for key in chosen:
            computed = verifier.computed(key)
            if rng.random() < 0.1:
                verifier.close(key)
                verifier.open(key)
                computed = 0
            elif computed > 4 and rng.random() < 0.4:
                computed -= rng.randrange(1, 4)
                verifier.truncate(key, computed)
                del texts[key][computed:]
            if len(texts[key]) > 240:
                verifier.truncate(key, 0)
                del texts[key][5:]
                computed = 0
            if len(texts[key]) == computed or rng.random() < 0.5:
                texts[key] += rng.choices(range(size), k=rng.randrange(1, 9))
            new = texts[key][computed : computed + rng.choice((1, 5, 40, 100))]
            items.append(Item(key, new, rng.randrange(min(len(new), 3) + 1)))
            checks.append(texts[key][: computed + len(new)])
        logits = verifier.score(items).copy()
        start = 0
        for item, text in zip(items, checks, strict=True):
            if item.rows:
                own = engine.rows(text, item.rows)
                worst = max(worst, float(np.abs(own - logits[start : start + item.rows]).max()))
            start += item.rows
        assert start == len(logits)
        if step % 3 == 2:
            old, new = rng.sample(sorted(texts), 2)
            verifier.close(new)
            length = rng.randrange(verifier.computed(old) + 1)
            verifier.fork(new, old, length)
            texts[new] = texts[old][:length] + rng.choices(range(size), k=3)
    return worst


def test_random_work_over_several_sequences_equals_the_engine_alone(path: Path) -> None:
    engine, verifier = Engine(path, 512), load(path)
    worst = random_work(verifier, engine, steps=40, longest=150, seed="tiny")
    assert worst < TOLERANCE
    engine.close()


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["Q4_0.gguf", *(pytest.param(f"{name}.gguf", marks=pytest.mark.exhaustive) for name in ("Q4_1", "target-Q8_0"))],
)
def test_rows_of_the_real_model_are_the_engine_s_own_to_the_bit(name: str) -> None:
    engine, verifier = Engine(prepared(name), 512), load(prepared(name), budget=1 << 28, context=300, threads=2)
    assert random_work(verifier, engine, steps=4, longest=40, seed=name, keys=5) == 0.0
    engine.close()


@pytest.mark.models
@pytest.mark.slow
def test_with_batch_invariant_a_long_text_has_the_same_logits_in_every_batch() -> None:
    verifier = load(prepared("Q4_0.gguf"), budget=1 << 28, context=700, threads=2)
    text = random.Random(5).choices(range(100, 40_000), k=600)
    for key in range(3):
        verifier.open(key)
    for key, chunk in enumerate((600, 7, 131)):
        for at in range(0, 590, chunk):
            verifier.score([Item(key, text[at : min(at + chunk, 590)], 0)])
    one_by_one = np.concatenate([verifier.score([Item(0, [token], 1)]).copy() for token in text[590:]])
    beside = np.concatenate([verifier.score([Item(2, [token], 1)]).copy() for token in text[590:]])
    np.testing.assert_array_equal(one_by_one, beside)
    verifier.truncate(2, 590)
    together = verifier.score([Item(2, text[590:], 10), Item(1, text[590:], 10)]).copy()
    np.testing.assert_array_equal(one_by_one, together[:10])
    np.testing.assert_array_equal(one_by_one, together[10:])


def test_a_budget_that_serves_nothing_is_refused_with_what_is_needed(path: Path) -> None:
    with pytest.raises(VerifierError, match="kv_bytes"):
        load(path, budget=256 * 128 - 1)


def test_a_failed_step_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = load(path)
    verifier.open(1)
    verifier.score([Item(1, [3, 4], 0)])
    verifier.open(2)
    room = verifier.capacity()
    decode = llama_cpp.llama_decode
    calls: list[int] = []

    def fail_later(*arguments: Any) -> int:
        calls.append(1)
        return decode(*arguments) if len(calls) == 1 else -3

    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "llama_decode", fail_later)
        with pytest.raises(VerifierError):
            verifier.score([Item(1, [5] * 100, 1), Item(2, [6] * 100, 1)])
    assert len(calls) == 2
    assert (verifier.computed(1), verifier.computed(2), verifier.capacity()) == (2, 0, room)
    rows = verifier.score([Item(1, [7], 1), Item(2, [3, 4, 7], 1)]).copy()
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-4)


def test_every_pass_comes_from_one_thread_that_is_not_the_caller_s(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    decode = llama_cpp.llama_decode

    def noted(*arguments: Any) -> int:
        names.add(threading.current_thread().name)
        return int(decode(*arguments))

    monkeypatch.setattr(llama_cpp, "llama_decode", noted)
    verifier = load(path)
    verifier.open(1)
    verifier.score([Item(1, [3, 4], 1)])
    assert names == {"llama.cpp_0"}


@pytest.mark.parametrize(
    ("batch_invariant", "stable", "computed"), [(True, True, 2), (True, False, 1), (False, True, 1)]
)
def test_a_single_token_has_company_only_where_its_row_is_to_be_stable(
    path: Path, monkeypatch: pytest.MonkeyPatch, batch_invariant: bool, stable: bool, computed: int
) -> None:
    verifier = load(path, batch_invariant=batch_invariant)
    verifier.open(1)
    decode, sizes = llama_cpp.llama_decode, []

    def noted(context: object, batch: llama_cpp.llama_batch) -> int:
        sizes.append(batch.n_tokens)
        return int(decode(context, batch))

    monkeypatch.setattr(llama_cpp, "llama_decode", noted)
    verifier.score([Item(1, [3], 1, stable=stable)])
    assert sizes == [computed]


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("llama_model_is_recurrent", "recurrent"),
        ("llama_model_has_encoder", "encoder"),
    ],
)
def test_recurrent_models_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch, question: str, kind: str) -> None:
    monkeypatch.setattr(llama_cpp, question, lambda _: True)
    with pytest.raises(UnsupportedModel, match=f"{kind}"):
        load(path)


def test_a_model_that_takes_no_tokens_back_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "llama_memory_seq_rm", lambda *_: False)
    with pytest.raises(UnsupportedModel):
        load(path)


def test_a_broken_rollback_is_noticed_at_the_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeContext, "cut", lambda *_: None)
    with pytest.raises(VerifierError):
        load(path)

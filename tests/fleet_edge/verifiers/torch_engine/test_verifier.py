import random
from typing import Any

import pytest
import torch

from fleet_edge.verifiers.contract import Item, UnsupportedModel, VerifierError
from fleet_edge.verifiers.torch_engine.verifier import _GATHERED_BYTES, TorchVerifier
from tests.fleet_edge.verifiers.oracle import (
    CONFIGS,
    VOCABULARY,
    Oracle,
    random_model,
    target_of,
    tiny_target,
)
from tests.support.no_waiting import waits_counted

TOLERANCE = 1e-4
BUDGET = 64 << 20
TOKEN_BYTES = 4 * 2 * 2 * 12 * 4  # layers, keys and values, heads, dim, bytes


class Session:
    def __init__(self, key: int, rng: random.Random, length: int) -> None:
        self.key = key
        self.tokens = [rng.randrange(VOCABULARY) for _ in range(length)]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in {"llama", "gemma3-window"} else [pytest.mark.slow]) for name in CONFIGS],
)
def test_random_work_over_several_sequences_equals_the_batch_one_oracle(name: str) -> None:
    rng = random.Random(f"packed {name}")
    verifier = TorchVerifier(tiny_target(name), budget_bytes=BUDGET)
    oracle = Oracle(name)
    sessions = [Session(key, rng, rng.choice([5, 30, 90, 150])) for key in range(7)]
    for session in sessions:
        verifier.open(session.key)
    kinds = set()
    for _ in range(14):
        items, checks = [], []
        source = rng.choice(sessions)
        if computed := verifier.computed(source.key):  # a session that begins as another does
            length = rng.randint(1, computed)
            fork = Session(len(sessions), rng, 0)
            fork.tokens = [*source.tokens[:length], rng.randrange(VOCABULARY)]
            verifier.fork(fork.key, source.key, length)
            sessions.append(fork)
            kinds.add("fork")
        for session in rng.sample(sessions, rng.randrange(1, len(sessions) + 1)):
            computed = verifier.computed(session.key)
            if rng.random() < 0.1:  # evicted: everything is computed again
                verifier.close(session.key)
                verifier.open(session.key)
                computed = 0
                kinds.add("evict")
            elif computed > 3 and rng.random() < 0.3:  # a rejection, and a correction
                computed -= rng.randrange(1, 4)
                verifier.truncate(session.key, computed)
                del session.tokens[computed:]
                session.tokens.append(rng.randrange(VOCABULARY))
                kinds.add("rollback")
            known = len(session.tokens) - computed
            if known > 40:  # a chunk of a prefill
                new, rows = session.tokens[computed : computed + 40], rng.choice([0, 40])
                kinds.add("prefill")
            else:  # the rest, and a draft
                session.tokens += [rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 10))]
                new = session.tokens[computed:]
                rows = rng.randrange(1, len(new) + 1)
                kinds.add("verify")
            items.append(Item(session.key, new, rows))
            checks.append((list(session.tokens[: computed + len(new)]), rows))
        logits = verifier.score(items)
        assert logits.dtype == torch.float32
        assert logits.shape == (sum(item.rows for item in items), VOCABULARY)
        start = 0
        for tokens, rows in checks:
            if rows:
                expected = oracle.logits(tokens)[-rows:]
                torch.testing.assert_close(logits[start : start + rows], expected, atol=TOLERANCE, rtol=0)
            start += rows
    assert kinds == {"evict", "fork", "rollback", "prefill", "verify"}
    assert max(len(session.tokens) for session in sessions) > 64  # longer than a page and the window


@pytest.mark.parametrize("name", ["llama", "gemma2-softcap-window", "mistral-window", "phi3"])
def test_nothing_in_a_step_waits_for_a_gpu(name: str) -> None:
    verifier = TorchVerifier(tiny_target(name), budget_bytes=BUDGET)
    for key in range(3):
        verifier.open(key)
    with waits_counted() as waits:
        for step in ([(0, 40, 0), (1, 3, 1)], [(0, 1, 1), (1, 5, 5), (2, 2, 1)]):
            verifier.score([Item(key, [7] * count, rows) for key, count, rows in step])
            verifier.truncate(1, 2)
    assert waits == []


def test_the_oracle_would_notice_a_window_off_by_one() -> None:
    kind, arguments = CONFIGS["mistral-window"]
    other = random_model(kind, arguments | {"sliding_window": arguments["sliding_window"] - 1})
    tokens = [index % VOCABULARY for index in range(60)]
    verifier = TorchVerifier(target_of(other), budget_bytes=BUDGET)
    verifier.open(1)
    rows = verifier.score([Item(1, tokens, len(tokens))])
    difference = (rows - Oracle("mistral-window").logits(tokens)).abs().amax(dim=1)
    assert difference[:20].max() < TOLERANCE
    assert difference[40:].max() > 100 * TOLERANCE


def test_bfloat16_stays_near_float32() -> None:
    tokens = [index * 7 % VOCABULARY for index in range(40)]
    verifier = TorchVerifier(tiny_target("llama", dtype=torch.bfloat16), budget_bytes=BUDGET)
    verifier.open(1)
    rows = verifier.score([Item(1, tokens, len(tokens))])
    expected = Oracle("llama").logits(tokens)
    assert float((rows - expected).square().mean().sqrt() / expected.std()) < 0.1


def test_wide_soft_capped_prefill_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [index * 5 % VOCABULARY for index in range(100)]
    monkeypatch.setattr("fleet_edge.verifiers.torch_engine.attention.SCORES", 1000)
    verifier = TorchVerifier(tiny_target("gemma2-softcap-window"), budget_bytes=BUDGET)
    verifier.open(1)
    rows = verifier.score([Item(1, tokens, len(tokens))])
    expected = Oracle("gemma2-softcap-window").logits(tokens)
    torch.testing.assert_close(rows, expected, atol=TOLERANCE, rtol=0)


def test_a_failed_forward_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = TorchVerifier(tiny_target("llama"), budget_bytes=BUDGET)
    verifier.open(1)
    verifier.score([Item(1, [3, 4], 0)])

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("lost the device")

    with monkeypatch.context() as patch:
        patch.setattr(verifier._model, "forward", fail)
        with pytest.raises(RuntimeError, match="lost"):
            verifier.score([Item(1, [5, 6], 1)])
    assert verifier.computed(1) == 2
    rows = verifier.score([Item(1, [7], 1)])
    torch.testing.assert_close(rows, Oracle("llama").logits([3, 4, 7])[-1:], atol=TOLERANCE, rtol=0)


def test_a_machine_without_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("fleet_edge.verifiers.torch_engine.attention.np.zeros", fail)
    with pytest.raises(VerifierError, match="kv_bytes"):
        TorchVerifier(tiny_target("llama"), budget_bytes=BUDGET)


def test_a_budget_that_serves_nothing_is_refused_with_what_is_needed() -> None:
    least = 256 * TOKEN_BYTES
    with pytest.raises(VerifierError, match=str(least)):
        TorchVerifier(tiny_target("llama"), budget_bytes=least - 1)
    assert TorchVerifier(tiny_target("llama"), budget_bytes=least).info.context == 256


@pytest.mark.parametrize("pages", [1, 2, 100])
def test_rows_do_not_depend_on_which_sequences_are_gathered_together(
    pages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_GATHERED_BYTES, "cpu", pages * 64 * TOKEN_BYTES // 4)  # of one of the four layers
    verifier, oracle, lengths = TorchVerifier(tiny_target("llama"), budget_bytes=BUDGET), Oracle("llama"), [3, 70, 140]
    texts = [[(length + index) % VOCABULARY for index in range(length)] for length in lengths]
    for key, text in enumerate(texts):
        verifier.open(key)
        verifier.score([Item(key, text[:-2], 0)])
    rows = verifier.score([Item(key, text[-2:], 1) for key, text in enumerate(texts)])
    for row, text in zip(rows, texts, strict=True):
        torch.testing.assert_close(row, oracle.logits(text)[-1], atol=TOLERANCE, rtol=0)


def test_an_architecture_that_differs_in_a_trial_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target("llama")
    embed = target.model.model.embed_tokens.forward

    def mix(ids: torch.Tensor) -> torch.Tensor:
        hidden = embed(ids)  # each token sees the one before it, outside attention
        return hidden + 0.2 * hidden.roll(1, dims=1)

    monkeypatch.setattr(target.model.model.embed_tokens, "forward", mix)
    with pytest.raises(UnsupportedModel):
        TorchVerifier(target, budget_bytes=BUDGET)

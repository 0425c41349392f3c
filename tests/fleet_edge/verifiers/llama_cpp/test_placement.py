import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import llama_cpp
import pytest

from fleet_edge.verifiers.contract import Item, SequenceFailed, Verifier, VerifierError
from fleet_edge.verifiers.llama_cpp import slab, verifier
from fleet_edge.verifiers.llama_cpp.slab import GgufTarget, SlabShape, open_target
from fleet_edge.verifiers.llama_cpp.streams import ActiveSequences, StreamSizes, StreamTable, cheapest_moves, nearest
from fleet_edge.verifiers.llama_cpp.verifier import LlamaCppVerifier
from fleet_edge.verifiers.prefix_cache import PrefixCache
from tests.fleet_edge.verifiers.oracle import VOCABULARY, tiny_target_gguf

CALL_TOKENS = 8.0
PROMPT = 40


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture
def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], LlamaCppVerifier]:
    monkeypatch.setattr(verifier, "measure_call_tokens", lambda *_: CALL_TOKENS)
    return lambda: LlamaCppVerifier(open_target(path, gpu_layers=0), budget_bytes=1 << 20, threads=1)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    decode, found = llama_cpp.llama_decode, list[int]()

    def noted(context: object, batch: llama_cpp.llama_batch) -> int:
        found.append(batch.n_tokens)
        return int(decode(context, batch))

    monkeypatch.setattr(llama_cpp, "llama_decode", noted)
    return found


def open_at(cache: PrefixCache, key: int, prompt: list[int]) -> None:
    cache.open(key)
    cache.expect(key, [*prompt, 0])
    cache.reuse(key)
    items = [Item(key, prompt[cache.computed(key) :], 0)]
    if items[0].tokens:
        assert cache.fits(items)
        cache.score(items)


def run(cache: Verifier, keys: list[int], count: int, tokens: int = 1) -> None:
    for _ in range(count):
        cache.score([Item(key, [7] * tokens, tokens) for key in keys])


@pytest.mark.parametrize(("running", "window"), [(2, 0), (16, 0), (4, 9), (15, 9)])
def test_an_edge_that_has_served_computes_a_step_in_as_many_passes_as_a_fresh_one(
    load: Callable[[], LlamaCppVerifier],
    sizes: list[int],
    monkeypatch: pytest.MonkeyPatch,
    running: int,
    window: int,
) -> None:
    rng = random.Random(running)
    shared = [rng.choices(range(VOCABULARY), k=PROMPT) for _ in range(5)]
    monkeypatch.setattr(GgufTarget, "window", window)
    cache = PrefixCache(load())
    key, open_keys = 0, list[int]()
    for _ in range(200):
        key += 1
        prompt = rng.choice(shared)[: rng.randrange(20, PROMPT + 1)] + rng.choices(
            range(VOCABULARY), k=rng.randrange(30)
        )
        open_at(cache, key, prompt)
        open_keys.append(key)
        run(cache, open_keys, rng.randrange(1, 4))
        while len(open_keys) >= running:
            cache.close(open_keys.pop(rng.randrange(len(open_keys))))
    while len(open_keys) < running:
        open_at(cache, key := key + 1, rng.choices(range(VOCABULARY), k=PROMPT))
        open_keys.append(key)
    run(cache, open_keys, 40)
    fresh = load()
    for each in open_keys:
        fresh.open(each)
    fresh.score([Item(each, [3] * PROMPT, 0) for each in open_keys])
    sizes.clear()
    fresh.score([Item(each, [7], 1) for each in open_keys])
    expected = list(sizes)
    sizes.clear()
    run(cache, open_keys, 1)
    assert sizes == expected


def test_a_failed_move_fails_it_alone(load: Callable[[], LlamaCppVerifier], monkeypatch: pytest.MonkeyPatch) -> None:
    inner = load()
    for key in range(4):
        inner.open(key)
        inner.score([Item(key, [key + 1] * PROMPT, 0)])

    def fail(*_: Any) -> None:
        raise VerifierError("no")

    with monkeypatch.context() as patch:
        patch.setattr(slab.LlamaSlab, "restore", fail)
        with pytest.raises(SequenceFailed) as caught:
            run(inner, [0, 3], 40)
    lost = caught.value.sequence
    assert len(inner.score([Item(key, [7], 1) for key in (1, 3)])) == 2
    with pytest.raises(SequenceFailed):
        inner.score([Item(lost, [7], 1)])
    inner.close(lost)
    inner.open(lost)
    assert len(inner.score([Item(lost, [7], 1)])) == 1


def test_a_sequence_is_active_for_as_long_as_it_was_ever_silent() -> None:
    active = ActiveSequences()
    for step in range(40):
        active.step([1, 2] if step % 10 == 0 else [1])
    for _ in range(9):
        active.step([3])
    assert (1 in active, 2 in active, 3 in active) == (False, True, True)
    active.forget(3)
    assert 3 not in active


def test_the_free_stream_next_to_the_active_ones_is_taken_and_without_any_the_lowest() -> None:
    assert nearest({0, 9, 15}, []) == 0
    assert nearest({0, 9, 15}, [6, 7]) == 9
    assert nearest({5, 9, 15}, [6, 7, 8]) == 5


def test_moves_make_neighbours_of_the_active_ones() -> None:
    for seed in range(100):
        rng = random.Random(seed)
        lengths = {stream: rng.randrange(1, 500) for stream in range(16) if rng.random() < 0.8}
        active = sorted(rng.sample(sorted(lengths), rng.randrange(1, len(lengths) + 1)))
        moves = cheapest_moves(active, lengths=lengths, begins=range(17 - len(active)))
        now = set(active)
        for first, second in moves.pairs:
            assert first not in now
            now = (now - {second}) | {first}
        assert max(now) - min(now) + 1 == len(active)
        assert (moves.price > 0) == bool(moves.pairs)


def test_few_and_short_sequences_are_moved_rather_than_many_and_long_ones() -> None:
    lengths = {0: 4000, 1: 10, 2: 10, 3: 10, 7: 10}
    moves = cheapest_moves([1, 2, 3, 7], lengths=lengths, begins=range(5))
    assert moves.pairs == ((4, 7),)
    assert cheapest_moves([1, 2], lengths=lengths, begins=()) is None


@pytest.mark.parametrize(("count", "begins"), [(2, [0, 1, 2, 4, 5, 6]), (4, [0, 4]), (5, [0, 1, 2, 3])])
def test_neighbours_are_in_as_few_slabs_as_can_be_and_never_in_a_spare_stream(count: int, begins: list[int]) -> None:
    plan = StreamSizes(context=255, slabs=2, shape=SlabShape(streams=4, cells=256, rows=4, tokens=64, threads=1))
    table = StreamTable(plan, lambda: cast("slab.LlamaSlab", object()))
    table.slabs.append(table.slabs[0])
    assert list(table.begins(count)) == begins
    spare = StreamTable(plan, lambda: cast("slab.LlamaSlab", object()), spare=True)
    assert list(spare.begins(count)) == [begin for begin in begins if begin + count <= 3]
    assert spare.free == 6

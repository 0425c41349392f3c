"""States of recurrent layers, on small models of Qwen3.5's, Granite 4-H's and Nemotron-H's architectures."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fleet_edge.settings import EdgeSettings, PrefixSharing
from fleet_edge.verifiers import blocks_engine
from fleet_edge.verifiers.blocks.geometry import LOGGED
from fleet_edge.verifiers.blocks.gguf_weights import GgufWeights
from fleet_edge.verifiers.blocks.kv import PAGE, ProcessMemory
from fleet_edge.verifiers.blocks.model import Model
from fleet_edge.verifiers.blocks.verifier import BlocksVerifier
from fleet_edge.verifiers.contract import CapacityExceeded, Item, TargetInfo, Verifier, VerifierError
from fleet_edge.verifiers.prefix_cache import PrefixCache
from schemas.vocabulary import Vocabulary
from tests.fleet_edge.verifiers.oracle import CONTEXT, VOCABULARY, tiny_target_gguf

TOKENS = [(7 * index + index * index // 5) % VOCABULARY for index in range(300)]
Make = Callable[[int], BlocksVerifier]


@pytest.fixture(scope="module", params=["qwen35", "granitehybrid", "nemotron_h_moe"])
def gguf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target_gguf(tmp_path_factory.mktemp("models") / "model.gguf", kind=request.param)


@pytest.fixture(scope="module")
def make(gguf: Path) -> Make:
    """Return what makes a verifier with a number of states."""
    file = GgufWeights(gguf)
    model, its = Model(file, threads=1), file.geometry
    words = Vocabulary.of([f"t{index}" for index in range(VOCABULARY)])
    info = TargetInfo("tiny", words, CONTEXT, its.end_tokens)

    def made(states: int) -> BlocksVerifier:
        memory = ProcessMemory(its.pools, 64, its.states(states))
        return BlocksVerifier(model, info, memory)

    return made


class Rows:
    """Rows of sequences that a verifier computes from their beginning, in one step."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier, self._known = verifier, dict[tuple[int, ...], NDArray[np.float32]]()

    def of(self, tokens: Sequence[int], count: int) -> NDArray[np.float32]:
        """Return the rows of the last tokens."""
        key = tuple(tokens)
        if key not in self._known:
            self._verifier.open(1)
            self._known[key] = np.array(self._verifier.score([Item(1, tokens, len(tokens))]))
            self._verifier.close(1)
        return self._known[key][len(tokens) - count :]


def _draft(verifier: BlocksVerifier, sequence: int, tokens: Sequence[int]) -> NDArray[np.float32]:
    return verifier.score([Item(sequence, tokens, len(tokens))]).copy()


@pytest.mark.parametrize("states", [2, 5, 40])
@pytest.mark.parametrize("seed", range(3))
def test_rows_are_the_same_bits_whatever_happened_to_a_sequence_before(states: int, seed: int, make: Make) -> None:
    draw, verifier, rows = random.Random(seed), make(states), Rows(make(40))
    texts = dict[int, list[int]]()
    for number in range(10, 130):
        action = draw.random()
        if not texts or (action < 0.1 and len(texts) < 6):
            verifier.open(number)
            texts[number] = []
        elif action < 0.2:
            source = draw.choice(list(texts))
            length = draw.randint(0, len(texts[source]))
            verifier.fork(number, source, length)
            texts[number] = texts[source][:length]
        elif action < 0.28:
            gone = draw.choice(list(texts))
            verifier.close(gone)
            del texts[gone]
        elif action < 0.45:
            cut = draw.choice(list(texts))
            length = draw.choice([max(0, len(texts[cut]) - draw.randrange(6)), draw.randint(0, len(texts[cut]))])
            verifier.truncate(cut, length)
            del texts[cut][length:]
        else:
            chosen = draw.sample(list(texts), draw.randint(1, len(texts)))
            new = {each: draw.choices(range(9), k=draw.choice([1, 1, 4, 5, 30, 70])) for each in chosen}
            new = {each: tokens for each, tokens in new.items() if len(texts[each]) + len(tokens) <= CONTEXT}
            items = [Item(each, tokens, draw.randint(0, len(tokens))) for each, tokens in new.items()]
            if not verifier.fits(items):
                with pytest.raises(CapacityExceeded):
                    verifier.score(items)
                items = []
            found, begin = verifier.score(items).copy(), 0
            for item in items:
                texts[item.sequence] += item.tokens
                wanted = rows.of(texts[item.sequence], item.rows)
                assert np.array_equal(found[begin : begin + item.rows], wanted)
                begin += item.rows


def test_a_rejected_draft_costs_no_computed_token(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier, computed = make(4), list[int]()
    forward = Model.forward
    monkeypatch.setattr(
        Model,
        "forward",
        lambda self, parts, *more: computed.extend(len(part.tokens) for part in parts) or forward(self, parts, *more),
    )
    verifier.open(1)
    verifier.score([Item(1, TOKENS[:100], 1)])
    for accepted in (0, 3, LOGGED):
        verifier.score([Item(1, TOKENS[: LOGGED + 1], LOGGED + 1)])
        verifier.truncate(1, verifier.computed(1) - LOGGED + accepted)
    verifier.score([Item(1, [5], 1)])
    assert computed == [100, *[LOGGED + 1] * 3, 1]


def test_a_fork_far_back_computes_what_follows_the_last_copy(make: Make) -> None:
    verifier = make(16)
    verifier.open(1)
    for begin in range(0, 300, 30):
        verifier.score([Item(1, TOKENS[begin : begin + 30], 1)])
    found = [verifier.reach(1, length) for length in (300, 299, 256, 255, 150, 100)]
    assert found == [300, 4 * PAGE, 4 * PAGE, 3 * PAGE, 2 * PAGE, 0]


def test_a_step_that_fails_loses_no_token(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier, rows = make(3), Rows(make(3))
    verifier.open(2)
    verifier.score([Item(2, TOKENS[:90], 1)])
    _draft(verifier, 2, TOKENS[90:95])
    with monkeypatch.context() as patch:
        patch.setattr(Model, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _draft(verifier, 2, TOKENS[95:100])
    assert verifier.computed(2) == 95
    assert np.array_equal(_draft(verifier, 2, TOKENS[95:100]), rows.of(TOKENS[:100], 5))


def test_a_cache_reuses_what_has_a_state(make: Make) -> None:
    cache = PrefixCache(make(8))
    cache.open(1)
    cache.expect(1, TOKENS[:200])
    for begin, end in ((0, 2 * PAGE), (2 * PAGE, 200)):
        cache.score([Item(1, TOKENS[begin:end], 1)])
    cache.close(1)
    cache.open(2)
    cache.expect(2, [*TOKENS[:150], *[1] * 30])
    assert cache.reuse(2) == 2 * PAGE


def test_a_restarted_engine_goes_on_from_a_kept_state(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make
) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    wanted = Rows(make(4)).of(TOKENS, 300 - 4 * PAGE)

    def cache() -> PrefixCache:
        settings = {"target": str(gguf), "engine": "blocks", "kv_bytes": 1 << 20, "kv_kept": "disk", "threads": 1}
        return PrefixCache(blocks_engine.load(EdgeSettings.model_validate(settings)), sharing=PrefixSharing.DEVICE)

    first = cache()
    first.open(1)
    first.expect(1, TOKENS, owner="device-1")
    for begin in range(0, 300, 50):
        first.score([Item(1, TOKENS[begin : begin + 50], 1)])
    del first
    for damaged in (False, True):
        if damaged:
            (path,) = (tmp_path / "pages").iterdir()
            data = bytearray(path.read_bytes())
            for at in range(len(data) * 6 // 10, len(data), 64):
                data[at] ^= 1
            path.write_bytes(data)
        second = cache()
        second.open(1)
        second.expect(1, TOKENS, owner="device-1")
        second.reuse(1)
        assert second.computed(1) == (0 if damaged else 4 * PAGE)
        begin = second.computed(1)
        found = np.array(second.score([Item(1, TOKENS[begin:], 300 - 4 * PAGE)]))
        assert np.array_equal(found, wanted)
        del second


def test_memory_for_too_few_states_is_refused_with_the_number_to_set(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    settings = EdgeSettings.model_validate({"target": str(gguf), "engine": "blocks", "kv_bytes": 1 << 20})
    monkeypatch.setattr("fleet_edge.verifiers.blocks.kv.MIN_STATES", 1000)
    with pytest.raises(VerifierError):
        blocks_engine.load(settings)


def test_states_count_in_memory(make: Make) -> None:
    verifier = make(8)
    verifier.open(1)
    before = verifier.allocated_bytes
    verifier.score([Item(1, [1], 1)])
    one = verifier.allocated_bytes
    verifier.score([Item(1, TOKENS[:PAGE], 1)])
    page = verifier.allocated_bytes - one
    verifier.close(1)
    assert before == verifier.allocated_bytes == 0
    assert one > page // 2 > 0

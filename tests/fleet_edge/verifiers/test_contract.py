import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fleet_edge.settings import VERIFIERS, EdgeSettings, InferenceServerSettings
from fleet_edge.verifiers.blocks.products import variants
from fleet_edge.verifiers.contract import CapacityExceeded, Item, RunsElsewhere, Verifier, VerifierError
from fleet_edge.verifiers.prefix_cache import PrefixCache
from fleet_edge.verifiers.registry import load_verifier
from schemas.fields import TARGET_ID_BYTES
from tests.fleet_edge.verifiers.oracle import CONTEXT, VOCABULARY, WORDS, tiny_folder, tiny_target_gguf
from tests.support.inference_server import InferenceServer
from tests.support.markov import MarkovScript
from tests.support.scripted_verifier import ScriptedVerifier

BUDGET_TOKENS = (1 << 20) // (4 * 2 * 2 * 12 * 4)  # layers, keys and values, heads, dim, bytes: the tiny target's
GGUF_TOKENS = (1 << 20) // (1 * 2 * 1 * 32 * 2)  # likewise, of the tiny GGUF

OF_GGUF = ("blocks", "llama.cpp")
HYBRIDS = ("llama.cpp lfm2", "blocks lfm2", "blocks qwen35", "blocks granitehybrid", "blocks nemotron_h_moe")
READ = [word.replace("Ġ", " ") for word in WORDS]


class SquaredLengths:
    """A script that depends on the whole prefix, so that no table can hold it."""

    def logits(self, prefix: Sequence[int]) -> NDArray[np.float32]:
        row = np.zeros(VOCABULARY, dtype=np.float32)
        row[(sum(prefix) + len(prefix) ** 2) % VOCABULARY] = 3.0
        return row


def _scripted() -> Verifier:
    script = MarkovScript(size=VOCABULARY, seed=3, period=5)
    return ScriptedVerifier(script, WORDS, context=CONTEXT, budget_tokens=BUDGET_TOKENS)


def _scripted_by_prefix() -> Verifier:
    return ScriptedVerifier(SquaredLengths(), WORDS, context=CONTEXT, budget_tokens=BUDGET_TOKENS)


def _cached() -> Verifier:
    return PrefixCache(_scripted_by_prefix())


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target_gguf(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def hybrids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    kinds = {name.split()[1] for name in HYBRIDS}
    return {kind: tiny_target_gguf(folder / f"{kind}.gguf", kind=kind) for kind in kinds}


@pytest.fixture(scope="module")
def server(target: Path) -> Iterator[InferenceServer]:
    served = load_verifier(EdgeSettings(engine="torch", target=str(target), dtype="float32"))
    with InferenceServer(served, READ, max_model_len=CONTEXT + 1) as running:
        yield running


@contextmanager
def _remote(url: str, target: Path) -> Iterator[Verifier]:
    remote = InferenceServerSettings(endpoint=url, top_logprobs=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fleet_edge.verifiers.remote.verifier.KNOWN_TOKENS", BUDGET_TOKENS)
        verifier = load_verifier(EdgeSettings(engine="remote", target=str(target), remote=remote))
    assert isinstance(verifier, RunsElsewhere)
    yield verifier
    verifier.shut_down()


@pytest.fixture(params=[*VERIFIERS, *HYBRIDS, _scripted, _scripted_by_prefix, _cached])
def verifier(request: pytest.FixtureRequest, target: Path, gguf: Path) -> Iterator[Verifier]:
    if request.param == "remote":
        with _remote(request.getfixturevalue("server").url, target) as remote:
            yield remote
        return
    if request.param in HYBRIDS:
        engine, kind = request.param.split()
        path = str(request.getfixturevalue("hybrids")[kind])
        yield load_verifier(EdgeSettings(engine=engine, target=path, kv_bytes=1 << 20, threads=1))
        return
    if isinstance(request.param, str):
        # The smallest budget that settings accept: 1 MiB, about four contexts of the tiny target.
        path = str(gguf if request.param in OF_GGUF else target)
        settings = {"engine": request.param, "target": path, "dtype": "float32", "kv_bytes": 1 << 20, "threads": 1}
        yield load_verifier(EdgeSettings.model_validate(settings))
        return
    made: Verifier = request.param()
    yield made


def _budget(verifier: Verifier) -> int:
    return GGUF_TOKENS if verifier.info.runs_on.startswith(OF_GGUF) else BUDGET_TOKENS


def _score(verifier: Verifier, items: Sequence[Item]) -> NDArray[np.float32]:
    """Return a copy of a step's rows, which are valid only until the next step."""
    logits = verifier.score(items)
    rows = np.array(logits if isinstance(logits, np.ndarray) else logits.cpu().numpy())
    assert rows.dtype == np.float32
    return rows


def _close(left: NDArray[np.float32], right: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(left, right, atol=5e-4, rtol=0)


def test_a_new_sequence_has_computed_nothing_and_costs_nothing(verifier: Verifier) -> None:
    before = verifier.capacity()
    assert 0 < before <= _budget(verifier)
    verifier.open(1)
    assert verifier.computed(1) == 0
    verifier.close(1)
    assert verifier.capacity() == before


def test_a_step_returns_the_last_rows_of_every_item_in_order(verifier: Verifier) -> None:
    for key in (1, 2, 3):
        verifier.open(key)
    first, second, third = [5, 6, 7, 8], [9, 10], [11] * 20
    rows = _score(verifier, [Item(1, first, 2), Item(2, second, 0), Item(3, third, 1)])
    assert rows.shape == (3, VOCABULARY)
    assert rows.dtype == np.float32
    assert [verifier.computed(key) for key in (1, 2, 3)] == [4, 2, 20]
    verifier.open(4)
    alone = _score(verifier, [Item(4, first, 4)])
    _close(rows[:2], alone[2:])
    verifier.open(5)
    _close(rows[2:], _score(verifier, [Item(5, third, 1)]))


def test_chunks_give_the_same_rows_as_one_step(verifier: Verifier) -> None:
    tokens = [index * 7 % VOCABULARY for index in range(70)]
    verifier.open(1)
    whole = _score(verifier, [Item(1, tokens, len(tokens))])
    verifier.open(2)
    pieces = [_score(verifier, [Item(2, tokens[at : at + 9], len(tokens[at : at + 9]))]) for at in range(0, 70, 9)]
    _close(whole, np.concatenate(pieces))


def test_a_prefill_alone_returns_no_rows(verifier: Verifier) -> None:
    verifier.open(1)
    assert _score(verifier, [Item(1, [1, 2, 3], 0)]).shape == (0, VOCABULARY)
    assert verifier.computed(1) == 3


def test_an_empty_step_is_no_work(verifier: Verifier) -> None:
    assert _score(verifier, []).shape == (0, VOCABULARY)


@pytest.mark.parametrize("length", [2, 3, 5])
def test_a_truncated_sequence_goes_on_as_if_the_rest_had_never_been(verifier: Verifier, length: int) -> None:
    tokens = [1, 2, 3, 40, 41, 42]
    verifier.open(1)
    _score(verifier, [Item(1, tokens[:3], 0)])
    _score(verifier, [Item(1, tokens[3:], 0)])
    verifier.truncate(1, length)
    assert verifier.computed(1) == length
    rows = _score(verifier, [Item(1, [4, 5], 2)])
    verifier.open(2)
    _close(rows, _score(verifier, [Item(2, [*tokens[:length], 4, 5], 2)]))


def test_a_closed_sequence_gives_its_room_back_and_may_be_opened_again(verifier: Verifier) -> None:
    before = verifier.capacity()
    verifier.open(1)
    _score(verifier, [Item(1, [1, 2, 3], 1)])
    verifier.close(1)
    assert verifier.capacity() == before
    verifier.close(1)  # unknown ones are ignored
    verifier.open(1)
    assert verifier.computed(1) == 0


@pytest.mark.parametrize("length", [1, 64, 65])
def test_a_fork_goes_on_as_if_it_had_computed_its_beginning_itself(verifier: Verifier, length: int) -> None:
    shared = [index * 11 % VOCABULARY for index in range(100)]
    verifier.open(1)
    verifier.score([Item(1, shared, 0)])
    verifier.fork(2, 1, length)
    assert (verifier.computed(1), verifier.computed(2)) == (100, length)
    rows = _score(verifier, [Item(2, [40, 41, 42], 3)])
    verifier.open(3)
    _close(rows, _score(verifier, [Item(3, [*shared[:length], 40, 41, 42], 3)]))


def test_a_fork_and_its_source_know_nothing_of_each_other(verifier: Verifier) -> None:
    shared = [index * 5 % VOCABULARY for index in range(50)]
    verifier.open(1)
    verifier.score([Item(1, shared, 0)])
    verifier.fork(2, 1, 40)
    verifier.fork(3, 2, 40)
    verifier.truncate(1, 20)
    verifier.score([Item(1, [7] * 60, 0), Item(2, [9] * 50, 0)])
    verifier.truncate(2, 45)
    verifier.close(1)
    rows = _score(verifier, [Item(2, [8, 10], 2), Item(3, [11], 1)])
    verifier.open(4)
    verifier.open(5)
    alone = _score(verifier, [Item(4, [*shared[:40], *[9] * 5, 8, 10], 2), Item(5, [*shared[:40], 11], 1)])
    _close(rows, alone)


def test_a_fork_of_nothing_is_a_new_sequence(verifier: Verifier) -> None:
    verifier.open(1)
    verifier.score([Item(1, [5, 6], 0)])
    verifier.fork(2, 1, 0)
    assert verifier.computed(2) == 0
    rows = _score(verifier, [Item(2, [1, 2], 1)])
    verifier.open(3)
    _close(rows, _score(verifier, [Item(3, [1, 2], 1)]))


def test_a_fork_that_cannot_be_is_refused_and_changes_nothing(verifier: Verifier) -> None:
    verifier.open(1)
    verifier.score([Item(1, [1, 2, 3], 0)])
    verifier.open(2)
    for sequence, source, length in [(2, 1, 3), (1, 1, 3), (3, 9, 0), (3, 1, 4), (3, 1, -1)]:
        with pytest.raises(VerifierError):
            verifier.fork(sequence, source, length)
    with pytest.raises(VerifierError):
        verifier.computed(3)
    assert (verifier.computed(1), verifier.computed(2)) == (3, 0)


def test_where_there_is_no_room_a_fork_is_told_so_or_shares(verifier: Verifier) -> None:
    full = _fill(verifier)
    try:
        verifier.fork(100, 0, CONTEXT - 10)
    except CapacityExceeded:
        with pytest.raises(VerifierError):
            verifier.computed(100)
        verifier.close(full[-1])
        verifier.fork(100, 0, CONTEXT - 10)
    assert (verifier.computed(0), verifier.computed(100)) == (CONTEXT, CONTEXT - 10)


def test_opening_and_closing_sequences_changes_no_other_rows(verifier: Verifier) -> None:
    texts = {key: [(key * 13 + index) % VOCABULARY for index in range(10 + key)] for key in range(12)}
    for key, tokens in texts.items():
        verifier.open(key)
        _score(verifier, [Item(key, tokens, 0)])
    for key in range(0, 12, 3):
        verifier.close(key)
    kept = [key for key in texts if key % 3]
    rows = _score(verifier, [Item(key, [7, 8], 1) for key in kept])
    for row, key in zip(rows, kept, strict=True):
        verifier.open(100)
        _close(row, _score(verifier, [Item(100, [*texts[key], 7, 8], 1)])[0])
        verifier.close(100)


def _fill(verifier: Verifier) -> list[int]:
    keys = []
    while True:
        verifier.open(len(keys))
        if not verifier.fits([Item(len(keys), [1] * CONTEXT, 0)]):
            verifier.close(len(keys))
            return keys
        _score(verifier, [Item(len(keys), [1] * CONTEXT, 0)])
        keys.append(len(keys))


def test_a_step_for_which_there_is_no_room_computes_nothing(verifier: Verifier) -> None:
    full = _fill(verifier)
    assert len(full) * CONTEXT <= _budget(verifier)
    verifier.truncate(0, CONTEXT - 1)
    verifier.open(100)
    step = [Item(0, [1], 1), Item(100, [1] * CONTEXT, 1)]
    assert not verifier.fits(step)
    with pytest.raises(CapacityExceeded):
        _score(verifier, step)
    assert (verifier.computed(0), verifier.computed(100)) == (CONTEXT - 1, 0)
    verifier.close(1)
    assert verifier.fits(step)
    assert _score(verifier, step).shape == (2, VOCABULARY)


@pytest.mark.parametrize("seed", range(3))
def test_the_room_named_is_there_whichever_sequences_use_it(verifier: Verifier, seed: int) -> None:
    rng = random.Random(seed)
    for key in range(rng.randrange(1, 6)):
        verifier.open(key)
        _score(verifier, [Item(key, [1] * rng.randrange(1, CONTEXT - 40), 0)])
    for key in range(10, 10 + rng.randrange(1, 12)):
        verifier.open(key)
    everyone = [key for key in range(30) if key < 5 or key >= 10]
    room, items = verifier.capacity(), []
    for key in rng.sample(everyone, len(everyone)):
        try:
            count = min(room, rng.choice((1, 8, 40)), CONTEXT - verifier.computed(key))
        except VerifierError:  # not open
            continue
        if count:
            items.append(Item(key, [2] * count, 0))
            room -= count
    assert verifier.fits(items)
    _score(verifier, items)


def test_one_sequence_grows_to_the_context_where_all_others_are_closed(verifier: Verifier) -> None:
    for key in _fill(verifier):
        verifier.close(key)
    verifier.open(1)
    for _ in range(0, CONTEXT, 20):
        step = [Item(1, [1] * 20, 1)]
        assert verifier.fits(step)
        _score(verifier, step)
    assert verifier.computed(1) == CONTEXT


IMPOSSIBLE = [
    [Item(9, [1], 1)],
    [Item(1, [], 0)],
    [Item(1, [1], 2)],
    [Item(1, [1], -1)],
    [Item(1, [VOCABULARY], 1)],
    [Item(1, [-1], 1)],
    [Item(1, [1] * (CONTEXT + 1), 1)],
    [Item(1, [1], 1), Item(1, [2], 1)],
    [Item(2, [1], 1), Item(1, [VOCABULARY], 1)],
]


def test_an_item_that_cannot_be_computed_is_refused_and_changes_nothing(verifier: Verifier) -> None:
    verifier.open(1)
    verifier.open(2)
    for items in IMPOSSIBLE:
        with pytest.raises(VerifierError):
            _score(verifier, items)
        assert verifier.computed(1) == verifier.computed(2) == 0


def test_misuse_is_refused(verifier: Verifier) -> None:
    verifier.open(1)
    with pytest.raises(VerifierError):
        verifier.open(1)
    with pytest.raises(VerifierError):
        verifier.computed(2)
    with pytest.raises(VerifierError):
        verifier.truncate(1, 1)
    with pytest.raises(VerifierError):
        verifier.truncate(1, -1)


def test_the_target_says_who_it_is(verifier: Verifier) -> None:
    assert verifier.info.vocabulary.size == VOCABULARY
    assert verifier.info.context == CONTEXT


def test_the_target_has_an_identity(verifier: Verifier) -> None:
    assert len(verifier.info.target_id) == TARGET_ID_BYTES
    assert any(verifier.info.target_id)


@pytest.mark.parametrize("engine", [name for name in VERIFIERS if name != "remote"])
def test_the_identity_depends_on_the_weights_alone(engine: str, target: Path, gguf: Path, tmp_path: Path) -> None:
    def identity(path: Path, **more: object) -> bytes:
        settings = {"engine": engine, "target": str(path), "dtype": "float32", "kv_bytes": 1 << 20, "threads": 1}
        return load_verifier(EdgeSettings.model_validate(settings | more)).info.target_id

    path = gguf if engine in OF_GGUF else target
    moved = tmp_path / "moved" / path.name
    moved.parent.mkdir()
    if path.is_dir():
        shutil.copytree(path, moved)
    else:
        shutil.copy(path, moved)
    known = identity(path)
    assert identity(moved, threads=2, kv_bytes=1 << 21) == known
    if engine in OF_GGUF:
        assert identity(tiny_target_gguf(tmp_path / "other.gguf", seed=2)) != known
    else:
        assert identity(path, dtype="bfloat16") != known


def test_every_kernel_of_blocks_gives_the_same_identity(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EdgeSettings(engine="blocks", target=str(gguf), kv_bytes=1 << 20, threads=1)
    found = set()
    for variant in variants():
        monkeypatch.setattr("fleet_edge.verifiers.blocks.products.variants", lambda variant=variant: (variant,))
        verifier = load_verifier(settings)
        assert verifier.info.batch_invariant
        found.add(verifier.info.target_id)
    assert len(found) == 1

import random

import pytest
import torch

from fleet_edge.verifiers.packed.kv import KVStore, LayerShape, SlabMemory

SHAPES = (LayerShape(2, 4, 4), LayerShape(1, 3, 5))
CONTEXT = 1000


TOKEN_BYTES = (2 * 8 + 1 * 8) * 4
PLENTY = 64 << 20


def _store(budget_bytes: int = PLENTY) -> KVStore:
    memory = SlabMemory(SHAPES, budget_bytes=budget_bytes, dtype=torch.float32, device=torch.device("cpu"))
    return KVStore(memory, context=CONTEXT)


def _reserve(store: KVStore, sequence: int, length: int, *, keep: int) -> None:
    assert store.missing_bytes({sequence: length}) == 0
    store.reserve({sequence: length}, keep={sequence: keep})


def _write(store: KVStore, sequence: int, start: int, end: int) -> None:
    slot = store.slot(sequence)
    for tensors in (slot.slab.keys, slot.slab.values):
        for tensor in tensors:
            tensor[slot.index, :, start:end] = sequence + torch.arange(start, end)[None, :, None] / CONTEXT


def _check(store: KVStore, sequence: int, length: int) -> None:
    slot = store.slot(sequence)
    assert slot.slab.capacity >= length
    for tensors in (slot.slab.keys, slot.slab.values):
        for tensor in tensors:
            heads, _, size = tensor.shape[1:]
            expected = (sequence + torch.arange(length) / CONTEXT)[None, :, None].expand(heads, -1, size)
            torch.testing.assert_close(tensor[slot.index, :, :length], expected, atol=0, rtol=0)


@pytest.mark.parametrize("budget_tokens", [PLENTY // TOKEN_BYTES, 9000, 4000])
def test_random_growth_and_release_loses_nothing(budget_tokens: int) -> None:
    rng = random.Random(5)
    store = _store(budget_tokens * TOKEN_BYTES)
    lengths: dict[int, int] = {}
    for turn in range(400):
        if lengths and rng.random() < 0.2:
            gone = rng.choice(list(lengths))
            store.release(gone)
            del lengths[gone]
        else:
            sequence = turn if rng.random() < 0.4 or not lengths else rng.choice(list(lengths))
            old = lengths.get(sequence, 0)
            new = min(CONTEXT, old + rng.randrange(1, 120))
            while store.missing_bytes({sequence: new}):
                gone = rng.choice([other for other in lengths if other != sequence])
                store.release(gone)
                del lengths[gone]
            _reserve(store, sequence, new, keep=old)
            with torch.inference_mode():
                _write(store, sequence, old, new)
            lengths[sequence] = new
        homes = [(id(slot.slab), slot.index) for slot in map(store.slot, lengths)]
        assert len(set(homes)) == len(homes)
        if turn % 20 == 0:
            for sequence, length in lengths.items():
                _check(store, sequence, length)
    for sequence, length in lengths.items():
        _check(store, sequence, length)
        store.release(sequence)
    assert store.allocated_bytes == 0


def test_a_slot_is_finite_beyond_its_length_whoever_had_it_before() -> None:
    store = _store()
    _reserve(store, 1, 10, keep=0)
    slot = store.slot(1)
    with torch.inference_mode():
        for tensor in slot.slab.keys + slot.slab.values:
            tensor.fill_(torch.nan)
    store.release(1)
    _reserve(store, 2, 10, keep=0)
    _reserve(store, 3, 10, keep=0)
    store.release(2)  # the last moves into the hole
    slot = store.slot(3)
    assert all(tensor[slot.index].isfinite().all() for tensor in slot.slab.keys + slot.slab.values)


def test_a_refused_allocation_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    store = _store()
    _reserve(store, 1, 60, keep=0)
    with torch.inference_mode():
        _write(store, 1, 0, 60)

    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", refuse)
        with pytest.raises(MemoryError):
            _reserve(store, 1, 70, keep=60)
    _check(store, 1, 60)
    _reserve(store, 1, 70, keep=60)
    _check(store, 1, 60)


@pytest.mark.parametrize("made", range(4))
def test_a_machine_that_fails_while_a_slab_grows_loses_nothing(made: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = _store()
    for sequence in range(4):
        _reserve(store, sequence, 60, keep=0)
        with torch.inference_mode():
            _write(store, sequence, 0, 60)
    empty, calls = torch.empty, 0

    def fail_later(*args: object, **kwargs: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > made:
            raise RuntimeError("can't allocate memory")
        return empty(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", fail_later)
        with pytest.raises(MemoryError):
            store.reserve({4: 60}, keep={4: 0})
    for sequence in range(4):
        _check(store, sequence, 60)
    _reserve(store, 4, 60, keep=0)
    with torch.inference_mode():
        _write(store, 4, 0, 60)
    for sequence in range(5):
        _check(store, sequence, 60)
        store.release(sequence)
    assert store.allocated_bytes == 0

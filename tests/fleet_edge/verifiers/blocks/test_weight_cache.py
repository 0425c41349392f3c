"""Packed weights that later starts map."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers import blocks_engine
from fleet_edge.verifiers.blocks import compiler, weight_cache
from fleet_edge.verifiers.blocks.gguf_weights import GgufWeights
from fleet_edge.verifiers.blocks.kv import Pages, ProcessMemory
from fleet_edge.verifiers.blocks.model import Model, Part
from fleet_edge.verifiers.blocks.verifier import Trial
from fleet_edge.verifiers.blocks.weight_cache import CachedWeights, fingerprint
from fleet_edge.verifiers.contract import TargetInfo
from tests.fleet_edge.verifiers.oracle import tiny_target_gguf


class Disk(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model on a disk with room, whatever the disk of this machine has."""
    monkeypatch.setattr("shutil.disk_usage", lambda _path: Disk(10**12, 0, 10**12))
    (tmp_path / "weights").mkdir()
    return tiny_target_gguf(tmp_path / "tiny.gguf")


def _loaded(gguf: Path) -> tuple[CachedWeights, np.ndarray]:
    file = GgufWeights(gguf)
    weights = CachedWeights(file, _file(gguf), fingerprint(file.files, bits=8), threads=2)
    model, its = Model(weights, threads=1), file.geometry
    weights.keep()
    pages = Pages(ProcessMemory(its.pools, 1))
    pages.reserve(1, 0, 3)
    return weights, np.array(model.forward([Part(pages.table(1), 0, [5, 6, 7], 3)], pages))


def _file(gguf: Path) -> Path:
    return gguf.parent / "weights" / "tiny.weights"


def test_a_second_start_packs_nothing_and_computes_the_same_bits(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, rows = _loaded(gguf)
    monkeypatch.delattr(GgufWeights, "pack")
    second, others = _loaded(gguf)
    assert (first.is_mapped, second.is_mapped) == (False, True)
    assert np.array_equal(rows, others)
    assert _file(gguf).stat().st_mode & 0o777 == 0o600


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: _flip(path, 0),
        lambda path: _flip(path, path.stat().st_size // 2),
        lambda path: _flip(path, path.stat().st_size - 1),
        lambda path: _flip(path, path.stat().st_size - 100),
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: os.truncate(path, 3),
        lambda path: path.write_bytes(b""),
    ],
    ids=["first", "middle", "trailer", "index", "half", "three-bytes", "empty"],
)
def test_damaged_files_are_made_again(gguf: Path, damage: Callable[[Path], object]) -> None:
    _, rows = _loaded(gguf)
    damage(_file(gguf))
    again, others = _loaded(gguf)
    assert not again.is_mapped
    assert np.array_equal(rows, others)
    assert _loaded(gguf)[0].is_mapped


def test_a_changed_source_is_packed_again(gguf: Path) -> None:
    _loaded(gguf)
    os.utime(gguf, (1, 1))
    assert not _loaded(gguf)[0].is_mapped
    assert _loaded(gguf)[0].is_mapped


def test_other_code_packs_again(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _loaded(gguf)
    monkeypatch.setattr(weight_cache, "sources_hash", lambda: "another")
    assert not _loaded(gguf)[0].is_mapped


@pytest.mark.parametrize(
    ("total", "free", "kept"),
    [(10**6, 50_000, False), (10**12, 9 * 10**9, False), (10**12, 11 * 10**9, True)],
    ids=["small", "large", "large with room"],
)
def test_weights_are_kept_where_they_leave_the_disk_room(
    gguf: Path, monkeypatch: pytest.MonkeyPatch, total: int, free: int, kept: bool
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: Disk(total, total - free, free))
    _loaded(gguf)
    assert _file(gguf).exists() is kept


def test_files_of_killed_starts_and_those_not_read_for_a_month_are_deleted(gguf: Path) -> None:
    _loaded(gguf)
    part = _file(gguf).with_suffix(".1.part")
    old = _file(gguf).with_name("old.weights")
    for path in (part, old):
        path.write_bytes(b"0")
    month = time.time() - 31 * 86_400
    os.utime(old, (month, month))
    os.utime(gguf, (2, 2))
    _loaded(gguf)
    assert list(_file(gguf).parent.iterdir()) == [_file(gguf)]


# In the engine


@pytest.fixture
def load(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TargetInfo]:
    """Load as an edge does, with a first start that has kept its weights."""
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(blocks_engine, "_MIN_KEPT_BYTES", 0)
    monkeypatch.setattr(CachedWeights, "keep_later", CachedWeights.keep)

    def loaded(**settings: object) -> TargetInfo:
        given = {"target": str(gguf), "engine": "blocks", "kv_bytes": 1 << 20, "kv_kept": "off", "threads": 1}
        return blocks_engine.load(EdgeSettings.model_validate(given | settings)).info

    return loaded


def _count_trials(monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    trials, repeats = list[Trial](), Trial.repeats

    def counted(trial: Trial) -> bool:
        trials.append(trial)
        return repeats(trial)

    monkeypatch.setattr(Trial, "repeats", counted)
    return trials


def test_a_second_start_relies_on_the_trial_of_the_first(
    load: Callable[..., TargetInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = _count_trials(monkeypatch)
    first = load()
    assert (first.batch_invariant, len(trials)) == (True, 1)
    assert load() == first
    assert len(trials) == 1


@pytest.mark.parametrize("changed", ["threads", "processor", "rows"])
def test_a_trial_under_other_conditions_is_made_again(
    load: Callable[..., TargetInfo], monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    load()
    trials = _count_trials(monkeypatch)
    if changed == "processor":
        monkeypatch.setattr(compiler, "processor_features", lambda: frozenset({"another"}))
    if changed == "rows":
        monkeypatch.setattr("fleet_edge.verifiers.blocks.verifier._SEED", 1)
    load(threads=2 if changed == "threads" else 1)
    assert len(trials) == 1


def test_a_load_reports_its_bytes_packed_or_mapped(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", str(gguf.parent / "cache"))
    monkeypatch.setattr(blocks_engine, "_MIN_KEPT_BYTES", 0)
    monkeypatch.setattr(CachedWeights, "keep_later", CachedWeights.keep)
    settings = EdgeSettings.model_validate({"target": str(gguf), "engine": "blocks", "kv_bytes": 1 << 20})
    for _ in ("packed", "mapped"):
        shares = list[float]()
        blocks_engine.load(settings, shares.append)
        assert shares == sorted(shares)
        assert len(shares) > 5
        assert 0.9 < shares[-1] <= 1.0, "all but vectors"

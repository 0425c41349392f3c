"""The files of cut models are served, with narrower layers than theirs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.engines import cut_models
from benchmarks.engines.cut_models import CUT, make_cut
from benchmarks.processes import BenchError
from benchmarks.raw_llama import RawLlama
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import Item
from fleet_edge.verifiers.registry import load_verifier
from tests.fleet_edge.verifiers.oracle import tiny_target_gguf


@pytest.mark.parametrize("name", CUT)
def test_blocks_and_llama_cpp_compute_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    its = CUT[name]
    narrow = replace(its, vocabulary=1_024, hidden=256, inner=256, heads=2, kv_heads=1, experts=min(its.experts, 8))
    monkeypatch.setattr(cut_models, "CUT", {name: narrow})
    vocabulary = tmp_path / "vocabulary.gguf"
    tiny_target_gguf(vocabulary)
    path = make_cut(tmp_path, name, its.file, vocabulary=vocabulary, layers=12)
    fewer = make_cut(tmp_path, name, its.file, vocabulary=vocabulary, layers=11)
    assert fewer.stat().st_size < path.stat().st_size
    settings = {"target": str(path), "engine": "blocks", "threads": 1, "context": 255, "kv_bytes": 16 << 20}
    verifier = load_verifier(EdgeSettings.model_validate(settings))
    verifier.open(1)
    rows = np.asarray(verifier.score([Item(1, (5, 6, 7), 3)]))
    assert np.all(np.isfinite(rows))
    assert np.all(rows.std(axis=1) > 0.05)
    assert RawLlama(str(path), streams=2, cells=256, context=64, threads=1, flash=False).step(2, 3) > 0


def test_another_type_or_more_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="blocks:MXFP4"):
        make_cut(tmp_path, "gpt-oss-20b", "Q4_0", vocabulary=tmp_path)
    with pytest.raises(BenchError, match="24 layers"):
        make_cut(tmp_path, "gpt-oss-20b", "MXFP4", vocabulary=tmp_path, layers=25)

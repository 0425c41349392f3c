from pathlib import Path

import pytest
import torch

from fleet_edge.verifiers import source
from fleet_edge.verifiers.contract import VerifierError
from fleet_edge.verifiers.torch_engine.target import load_target, parameters_of
from tests.fleet_edge.verifiers.oracle import tiny_folder, tiny_model, tiny_target_gguf


def parameters() -> int:
    return sum(tensor.numel() for tensor in tiny_model("llama").parameters())


def test_the_numbers_of_a_folder_are_the_model_s_whole_or_in_pieces(tmp_path: Path) -> None:
    assert parameters_of(tiny_folder(tmp_path / "whole")) == parameters()
    pieces = tmp_path / "pieces"
    tiny_model("llama").save_pretrained(pieces, max_shard_size="20KB")
    assert not (pieces / "model.safetensors").exists()
    assert parameters_of(pieces) == parameters()


def test_the_numbers_of_a_gguf_are_those_of_its_tensors(tmp_path: Path) -> None:
    path = tiny_target_gguf(tmp_path / "tiny.gguf")
    assert 30_000 < (parameters_of(path) or 0) * 4 < path.stat().st_size


@pytest.mark.parametrize("number", ["float32", "bfloat16"])
def test_too_little_memory_is_named_in_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    folder = tiny_folder(tmp_path / "tiny")
    needed = parameters() * getattr(torch, number).itemsize
    monkeypatch.setattr(source, "available_memory", lambda: needed - 1)
    with pytest.raises(VerifierError, match=f"{folder}"):
        load_target(folder, dtype=number)
    monkeypatch.setattr(source, "available_memory", lambda: needed)
    load_target(folder, dtype=number)

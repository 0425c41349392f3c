from pathlib import Path

import pytest
import torch

from fleet_edge.verifiers.contract import VerifierError
from fleet_edge.verifiers.packed import target as packed_target
from fleet_edge.verifiers.packed.target import check_memory, load_target, parameters_of
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


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100, (20).to_bytes(8, "little") + b"no JSON at all      "])
def test_what_cannot_be_read_is_not_known(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(damage)
    assert parameters_of(tmp_path) is None
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF" + damage)
    assert parameters_of(file) is None
    check_memory(name="a", needed=None, available=1, number="float32")
    check_memory(name="a", needed=2, available=None, number="float32")


@pytest.mark.parametrize("number", ["float32", "bfloat16"])
def test_too_little_memory_is_named_in_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    folder = tiny_folder(tmp_path / "tiny")
    needed = parameters() * getattr(torch, number).itemsize
    monkeypatch.setattr(packed_target, "available_memory", lambda: needed - 1)
    with pytest.raises(VerifierError, match=f"{folder}"):
        load_target(folder, dtype=number)
    monkeypatch.setattr(packed_target, "available_memory", lambda: needed)
    load_target(folder, dtype=number)


def test_a_gguf_is_in_float32_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_target_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(packed_target, "available_memory", lambda: 6 * (parameters_of(path) or 0) - 1)
    with pytest.raises(VerifierError, match="bfloat16"):
        load_target(path, dtype="bfloat16")

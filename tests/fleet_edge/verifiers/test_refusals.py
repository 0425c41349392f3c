import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet_common.extras import install_command
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers import blocks_engine as blocks_loader, source, torch_engine as torch_loader
from fleet_edge.verifiers.contract import VerifierError
from fleet_edge.verifiers.llama_cpp import verifier as llama_loader
from fleet_edge.verifiers.registry import check_verifier, load_verifier, read_target_tokens
from tests.fleet_edge.verifiers.oracle import WORDS, tiny_folder, tiny_target_gguf
from tests.support.tiny_gguf import new_gguf, tiny_rows, write_gguf


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return tiny_target_gguf(tmp_path / "tiny.gguf")


def settings(target: Path, **more: Any) -> EdgeSettings:
    return EdgeSettings.model_validate({"target": str(target), "kv_bytes": 1 << 20, "threads": 1, **more})


@pytest.mark.parametrize(
    ("engine", "loader", "extra"),
    [
        ("torch", torch_loader, "edge-torch"),
        ("llama.cpp", llama_loader, "edge-llama"),
        ("blocks", blocks_loader, "edge"),
    ],
)
def test_an_engine_that_is_not_installed_says_how_to_get_it(
    gguf: Path, engine: str, loader: Any, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "find_spec", lambda _name: None)
    for attempt in (check_verifier, load_verifier):
        with pytest.raises(VerifierError, match=re.escape(install_command(extra))):
            attempt(settings(gguf, engine=engine))


def test_layers_on_a_gpu_that_is_not_there_are_refused_and_all_layers_are_not(gguf: Path) -> None:
    with pytest.raises(VerifierError, match="gpu_layers"):
        load_verifier(settings(gguf, engine="llama.cpp", gpu_layers=3))
    load_verifier(settings(gguf, engine="llama.cpp", gpu_layers=-1))


@pytest.mark.parametrize(("scaling", "is_refused"), [("yarn", True), ("none", False)])
def test_llama_cpp_refuses_gpt_oss_whose_yarn_it_rounds(scaling: str, is_refused: bool, tmp_path: Path) -> None:
    path = tmp_path / "oss.gguf"
    writer = new_gguf(path, "gpt-oss", layers=1, width=32, inner=32, heads=1, kv_heads=1, rows=tiny_rows())
    writer.add_string("gpt-oss.rope.scaling.type", scaling)
    writer.add_tensor("token_embd.weight", np.zeros((1, 32), np.float32))
    write_gguf(writer)
    with pytest.raises(VerifierError, match="set engine to blocks") if is_refused else nullcontext():
        llama_loader.check(settings(path, engine="llama.cpp"))


@pytest.mark.parametrize("engine", ["llama.cpp", "blocks"])
def test_a_gguf_larger_than_what_is_left_of_the_memory_is_refused(
    gguf: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "available_memory", lambda: gguf.stat().st_size // 8)
    with pytest.raises(VerifierError, match="memory"):
        load_verifier(settings(gguf, engine=engine))


@pytest.mark.parametrize("engine", ["llama.cpp", "torch", "blocks", "auto"])
@pytest.mark.parametrize("kept", [4, 200, 0.5, 0.99])
def test_a_damaged_gguf_is_a_sentence(
    gguf: Path, engine: str, kept: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = gguf.read_bytes()
    gguf.write_bytes(whole[: int(kept if kept > 1 else kept * len(whole))])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(VerifierError, match=r"tiny\.gguf"):
        load_verifier(settings(gguf, engine=engine))


def test_tokens_of_a_gguf_and_a_folder_are_read(gguf: Path, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "tiny")
    assert read_target_tokens(settings(gguf)) == read_target_tokens(settings(folder)) == WORDS


def test_the_tokens_of_a_remote_target_need_no_weights(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    assert read_target_tokens(settings(folder, engine="remote")) == WORDS
    with pytest.raises(VerifierError, match="weights"):
        read_target_tokens(settings(folder))

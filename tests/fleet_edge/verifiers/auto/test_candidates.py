"""Which engines come into question, and why others do not."""

import json
from pathlib import Path

import pytest

from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.auto.candidates import Candidate, find_candidates, gguf_beside
from fleet_edge.verifiers.contract import UnsupportedModel, VerifierError
from fleet_edge.verifiers.registry import check_verifier

BOTH = {"torch", "transformers", "llama_cpp"}
LLAMA = {"llama_cpp"}
TORCH = {"torch", "transformers"}


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({}))
    (path / "model.safetensors").write_bytes(b"")
    return path


def gguf(path: Path, *, size: int = 100) -> Path:
    path.write_bytes(b"GGUF" + bytes(size))
    return path


def found(target: Path, installed: set[str], **settings: str) -> tuple[list[Candidate], str]:
    given = EdgeSettings.model_validate({"target": str(target), **settings})
    candidates = find_candidates(given, installed=installed.__contains__)
    return list(candidates.found), "; ".join(candidates.reasons)


def test_a_folder_with_its_gguf_beside_it_can_be_served_by_both(tmp_path: Path) -> None:
    target, file = folder(tmp_path / "target"), gguf(tmp_path / "target-Q8_0.gguf")
    assert found(target, BOTH) == ([Candidate("torch", str(target)), Candidate("llama.cpp", str(file))], "")


def test_a_gguf_can_be_served_by_both_as_it_is(tmp_path: Path) -> None:
    folder(tmp_path / "target")
    file = str(gguf(tmp_path / "target-Q8_0.gguf"))
    assert found(Path(file), BOTH) == ([Candidate("torch", file), Candidate("llama.cpp", file)], "")


def test_what_is_not_installed_is_out_and_said(tmp_path: Path) -> None:
    target, file = folder(tmp_path / "target"), str(gguf(tmp_path / "target-Q8_0.gguf"))
    assert found(target, TORCH) == ([Candidate("torch", str(target))], "llama.cpp is not installed")
    assert found(target, {"torch", "llama_cpp"})[1] == "torch is not installed", "it needs transformers too"
    assert found(target, LLAMA) == ([Candidate("llama.cpp", file)], "torch is not installed")


def test_a_folder_alone_is_torch_s(tmp_path: Path) -> None:
    target = folder(tmp_path / "target")
    (only,), reason = found(target, BOTH)
    assert only == Candidate("torch", str(target))
    assert reason == f"llama.cpp takes a GGUF, and there is none beside {target}"


@pytest.mark.parametrize("settings", [{"dtype": "float32"}, {"torch_device": "cpu"}])
def test_a_setting_of_torch_asks_for_torch(tmp_path: Path, settings: dict[str, str]) -> None:
    target = folder(tmp_path / "target")
    gguf(tmp_path / "target-Q8_0.gguf")
    ((only,), reason), ((name, value),) = found(target, BOTH, **settings), settings.items()
    assert (only.engine, reason) == ("torch", f"{name} = {value} is a setting of torch")
    assert found(target, LLAMA, **settings)[0][0].engine == "llama.cpp"


def test_names_tell_which_file_is_of_which_folder(tmp_path: Path) -> None:
    plain, deep = folder(tmp_path / "target"), folder(tmp_path / "target-cost4")
    other = folder(tmp_path / "qwen2.5-7b-instruct")
    small, large = gguf(tmp_path / "target-Q4_K_M.gguf", size=10), gguf(tmp_path / "target-Q8_0.gguf", size=20)
    deepened = gguf(tmp_path / "target-Q8_0-cost4.gguf", size=40)
    dotted = gguf(tmp_path / "qwen2.5-7b-instruct.IQ4_NL.gguf")
    gguf(tmp_path / "Q4_0.gguf")
    assert gguf_beside(plain) == large
    assert gguf_beside(deep) == deepened
    assert gguf_beside(other) == dotted
    large.write_bytes(b"no GGUF, and larger" * 9)
    assert gguf_beside(plain) == small
    for file in (small, large, deepened):
        file.unlink()
    assert gguf_beside(plain) is None
    assert gguf_beside(gguf(tmp_path / "target.gguf")) is None, "it is no folder"
    assert gguf_beside(plain) == tmp_path / "target.gguf"


def test_where_nothing_fits_a_sentence_says_what_to_do(tmp_path: Path) -> None:
    target = folder(tmp_path / "target")
    with pytest.raises(VerifierError, match=r"llama\.cpp"):
        found(target, set())
    with pytest.raises(VerifierError, match=r"llama\.cpp"):
        found(target, LLAMA)


def test_a_target_that_is_not_there_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(VerifierError, match="nowhere"):
        check_verifier(EdgeSettings(target="nowhere"))
    damaged = tmp_path / "a.gguf"
    damaged.write_bytes(b"GGML")
    with pytest.raises(UnsupportedModel, match="GGUF"):
        check_verifier(EdgeSettings(target=str(damaged)))

import logging
from pathlib import Path
from typing import Any

import pytest

from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers import registry
from fleet_edge.verifiers.contract import DraftsItself, UnsupportedModel, VerifierError
from fleet_edge.verifiers.registry import check_draft, check_verifier, choose_engine, load_draft, load_verifier
from tests.fleet_edge.verifiers.oracle import WORDS, tiny_folder, tiny_target_gguf
from tests.support.markov import MarkovScript
from tests.support.scripted_verifier import ScriptedVerifier


@pytest.fixture(autouse=True)
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that an NVIDIA driver would make here."""
    monkeypatch.setattr(registry, "NVIDIA_DRIVER", tmp_path / "nvidiactl")
    return tmp_path / "nvidiactl"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return the packages that are installed, as the rule sees them."""
    packages = {"torch", "numba", "llama_cpp"}
    monkeypatch.setattr(registry, "find_spec", lambda name: name if name in packages else None)
    return packages


def settings(target: Path, **more: Any) -> EdgeSettings:
    return EdgeSettings.model_validate({"target": str(target), "kv_bytes": 1 << 22, "threads": 1, **more})


def chosen(target: Path, **more: Any) -> str:
    return choose_engine(settings(target, **more)).engine


def test_blocks_serve_what_they_can(tmp_path: Path, installed: set[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert chosen(tiny_target_gguf(tmp_path / "tiny.gguf")) == "blocks"
    assert "tiny.gguf" in caplog.text
    assert chosen(tiny_folder(tmp_path / "tiny")) == "blocks"
    installed.clear()
    installed.add("numba")
    assert chosen(tmp_path / "tiny") == "blocks"


def test_another_architecture_goes_to_another_engine(tmp_path: Path, installed: set[str]) -> None:
    target = tiny_folder(tmp_path / "gpt2", "gpt2")
    assert chosen(target) == "torch"
    installed.discard("torch")
    with pytest.raises(UnsupportedModel, match="gpt2"):
        chosen(target)


def test_a_gguf_of_another_architecture_goes_to_llama_cpp(
    tmp_path: Path, installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_settings: EdgeSettings) -> None:
        raise UnsupportedModel("It is another one.")

    monkeypatch.setattr("fleet_edge.verifiers.blocks_engine.check_architecture", refuse)
    target = tiny_target_gguf(tmp_path / "tiny.gguf")
    assert chosen(target) == "llama.cpp"
    installed.discard("llama_cpp")
    with pytest.raises(UnsupportedModel):
        chosen(target)


def test_a_gguf_that_transformers_misreads_stays_off_the_gpu(
    tmp_path: Path, installed: set[str], driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_path: Path) -> None:
        raise UnsupportedModel("It is misread.")

    target = tiny_target_gguf(tmp_path / "tiny.gguf")
    driver.touch()
    assert "torch" in installed
    assert chosen(target) == "torch"
    monkeypatch.setattr(registry, "check_gguf_reader", refuse)
    assert chosen(target) == "blocks"


def test_a_processor_without_fast_products_goes_to_llama_cpp(
    tmp_path: Path, installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet_edge.verifiers.blocks.products.variants", lambda: ("portable",))
    target = tiny_target_gguf(tmp_path / "tiny.gguf")
    assert chosen(target) == "llama.cpp"
    installed.discard("llama_cpp")
    assert chosen(target) == "blocks"


def test_a_setting_of_torch_selects_torch(tmp_path: Path, installed: set[str]) -> None:
    assert chosen(tiny_target_gguf(tmp_path / "tiny.gguf"), dtype="float32") == "torch"
    assert installed


def test_a_gpu_is_torch_s(tmp_path: Path, installed: set[str], driver: Path) -> None:
    target = tiny_target_gguf(tmp_path / "tiny.gguf")
    driver.touch()
    assert chosen(target) == "torch"
    installed.discard("torch")
    assert chosen(target) == "blocks"


def test_an_engine_that_is_set_stays(tmp_path: Path) -> None:
    assert chosen(tmp_path / "none", engine="llama.cpp") == "llama.cpp"


def test_a_target_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(VerifierError, match=r"none\.gguf"):
        check_verifier(settings(tmp_path / "none.gguf"))


def test_a_draft_model_has_the_target_s_vocabulary(tmp_path: Path) -> None:
    target = load_verifier(settings(tiny_target_gguf(tmp_path / "tiny.gguf")))
    given = settings(tmp_path / "tiny.gguf", edge_draft=str(tmp_path / "tiny.gguf"))
    draft = load_draft(given, target)
    assert draft is not None
    assert draft.info.vocabulary == target.info.vocabulary
    assert load_draft(settings(tmp_path / "tiny.gguf"), target) is None
    other = ScriptedVerifier(MarkovScript(size=len(WORDS), seed=1), [f"other-{word}" for word in WORDS])
    with pytest.raises(VerifierError, match="edge_draft"):
        load_draft(given, other)


def test_a_target_drafts_with_a_layer_of_its_own(tmp_path: Path) -> None:
    target = tiny_target_gguf(tmp_path / "mtp.gguf", kind="qwen35 mtp")
    given = settings(target, edge_draft="mtp")
    check_draft(given)
    verifier = load_verifier(given)
    assert isinstance(verifier, DraftsItself)
    assert load_draft(given, verifier) is None
    plain = load_verifier(settings(target))
    assert not isinstance(plain, DraftsItself)
    assert plain.info.target_id == verifier.info.target_id
    with pytest.raises(VerifierError, match="blocks"):
        load_draft(given, plain)


def test_a_target_that_cannot_draft_is_refused(tmp_path: Path) -> None:
    def refused(target: Path, **more: Any) -> str:
        with pytest.raises(VerifierError) as refusal:
            check_draft(settings(target, edge_draft="mtp", **more))
        return str(refusal.value)

    assert "nextn_predict_layers" in refused(tiny_target_gguf(tmp_path / "without.gguf", kind="qwen35"))
    assert "GGUF" in refused(tiny_folder(tmp_path / "folder"))
    with_layer = tiny_target_gguf(tmp_path / "with.gguf", kind="qwen35 mtp")
    assert "engine to blocks" in refused(with_layer, engine="llama.cpp")

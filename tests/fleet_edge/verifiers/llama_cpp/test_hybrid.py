from pathlib import Path

import pytest

from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import Item, VerifierError
from fleet_edge.verifiers.registry import load_verifier
from tests.fleet_edge.verifiers.oracle import tiny_target_gguf

pytest.importorskip("llama_cpp")

import llama_cpp

from fleet_edge.verifiers.llama_cpp.target import open_target
from fleet_edge.verifiers.llama_cpp.verifier import LlamaCppVerifier


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny_target_gguf(tmp_path / "hybrid.gguf", kind="lfm2")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of tokens of each call."""
    decode, sizes = llama_cpp.llama_decode, list[int]()

    def noted(context: object, batch: llama_cpp.llama_batch) -> int:
        sizes.append(batch.n_tokens)
        return int(decode(context, batch))

    monkeypatch.setattr(llama_cpp, "llama_decode", noted)
    return sizes


def load(path: Path, kv_bytes: int = 1 << 20) -> LlamaCppVerifier:
    settings = {"engine": "llama.cpp", "target": str(path), "kv_bytes": kv_bytes, "threads": 1}
    verifier = load_verifier(EdgeSettings.model_validate(settings))
    assert isinstance(verifier, LlamaCppVerifier)
    return verifier


def test_a_rejection_computes_no_more_than_a_draft_again(path: Path, computed: list[int]) -> None:
    verifier = load(path)
    verifier.open(1)
    verifier.score([Item(1, [3] * 30, 1)])
    length = 30
    for accepted in (1, 2, 3, 1, 1, 4, 1, 2, 3):
        computed.clear()
        verifier.score([Item(1, [5, 6, 7, 8, 9], 5)])
        assert sum(computed) <= 5 + 8 + 5
        assert len(computed) <= 2
        length += accepted
        verifier.truncate(1, length)


def test_a_copy_of_a_whole_sequence_is_not_computed_again(path: Path, computed: list[int]) -> None:
    verifier = load(path)
    verifier.open(1)
    verifier.score([Item(1, [3] * 30, 1)])
    verifier.fork(2, 1, 30)
    computed.clear()
    verifier.score([Item(2, [4], 1)])
    assert computed == [1]


def test_a_budget_without_room_for_a_state_is_refused(path: Path) -> None:
    with pytest.raises(VerifierError):
        LlamaCppVerifier(open_target(path, gpu_layers=0), budget_bytes=1000)

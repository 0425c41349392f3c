from collections.abc import Sequence
from pathlib import Path

import pytest

from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import Item, VerifierError
from fleet_edge.verifiers.registry import load_verifier
from tests.fleet_edge.verifiers.oracle import tiny_target_gguf

pytest.importorskip("llama_cpp")

from fleet_edge.verifiers.llama_cpp.hybrid import HybridVerifier


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny_target_gguf(tmp_path / "hybrid.gguf", hybrid=True)


def load(path: Path, kv_bytes: int = 1 << 20) -> HybridVerifier:
    settings = {"engine": "llama.cpp", "target": str(path), "kv_bytes": kv_bytes, "threads": 1}
    verifier = load_verifier(EdgeSettings.model_validate(settings))
    assert isinstance(verifier, HybridVerifier)
    return verifier


def test_a_rejection_computes_no_more_than_a_draft_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier, computed = load(path), list[int]()
    plain = verifier._call

    def call(tokens: Sequence[object]) -> None:
        computed.append(len(tokens))
        plain(tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(verifier, "_call", call)
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


def test_a_copy_of_a_whole_sequence_is_not_computed_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier, computed = load(path), list[int]()
    plain = verifier._call
    verifier.open(1)
    verifier.score([Item(1, [3] * 30, 1)])
    verifier.fork(2, 1, 30)
    monkeypatch.setattr(verifier, "_call", lambda tokens: (computed.append(len(tokens)), plain(tokens)))
    verifier.score([Item(2, [4], 1)])
    assert computed == [1]


def test_a_budget_without_room_for_a_state_is_refused(path: Path) -> None:
    with pytest.raises(VerifierError):
        HybridVerifier(load(path)._target, budget_bytes=1000)

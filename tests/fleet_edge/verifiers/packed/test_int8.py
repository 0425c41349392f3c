import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numba
import pytest
import torch

from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import Item, UnsupportedModel, Verifier, VerifierError
from fleet_edge.verifiers.packed import int8, lean
from fleet_edge.verifiers.packed.int8 import check_rotation, load_int8, quantize, rotate, some_logits
from fleet_edge.verifiers.packed.layout import Part
from fleet_edge.verifiers.packed.target import load_target
from fleet_edge.verifiers.packed.verifier import PackedVerifier
from fleet_edge.verifiers.registry import load_verifier
from fleet_edge.verifiers.tokens import encode
from tests.fleet_edge.verifiers.oracle import CONTEXT, VOCABULARY, tiny_folder, tiny_model, tiny_target_gguf
from tests.support.prepared_models import prepared

SERVED = ("llama", "llama3-scaled-rope-tied", "qwen2", "qwen3", "smollm3-layers-without-positions")
REFUSED = ("qwen2-window-in-late-layers", "mistral-window", "gemma2-softcap-window", "phi3", "gpt2")
BUDGET = 64 << 20
OTHERS = 15
OVERLAP = 0.95
ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def verifier(folder: Path) -> PackedVerifier:
    return PackedVerifier(load_int8(folder), budget_bytes=BUDGET)


def _tokens(rng: random.Random, count: int) -> list[int]:
    return rng.choices(range(VOCABULARY), k=count)


def _rows(verifier: Verifier, items: Sequence[Item], sequence: int) -> torch.Tensor:
    logits = torch.as_tensor(verifier.score(items))
    begin = 0
    for item in items:
        if item.sequence == sequence:
            return logits[begin : begin + item.rows].clone()
        begin += item.rows
    raise AssertionError("no such sequence")


def _alone(verifier: Verifier, tokens: Sequence[int]) -> torch.Tensor:
    verifier.open(0)
    rows = _rows(verifier, [Item(0, tokens, len(tokens))], 0)
    verifier.close(0)
    return rows


def _among_others(verifier: Verifier, tokens: Sequence[int], seed: int) -> torch.Tensor:
    """Return the rows of a sequence that is cut at random, among others that open, close and roll back."""
    rng = random.Random(seed)
    verifier.open(0)
    for key in range(1, 1 + OTHERS):
        verifier.open(key)
        verifier.score([Item(key, _tokens(rng, rng.choice([3, 20, 70, 130])), 0)])
    found, begin = [], 0
    while begin < len(tokens):
        piece = tokens[begin : begin + rng.choice([1, 1, 5, 9, 30])]
        others = rng.sample(range(1, 1 + OTHERS), rng.randrange(OTHERS + 1))
        items = [Item(key, _tokens(rng, count), count) for key in others for count in [rng.choice([1, 5, 9])]]
        items.insert(rng.randrange(len(items) + 1), Item(0, piece, len(piece)))
        found.append(_rows(verifier, items, 0))
        begin += len(piece)
        for key in others:
            verifier.truncate(key, min(verifier.computed(key), 140))
    for key in range(1 + OTHERS):
        verifier.close(key)
    return torch.cat(found)


@pytest.mark.parametrize("name", SERVED)
def test_rotated_weights_compute_the_models_own_logits(name: str) -> None:
    model = tiny_model(name)
    own = some_logits(model)
    check_rotation(own, *rotate(model, context=CONTEXT, end_tokens=(2,)))


@pytest.mark.parametrize("part", ["1.qkv.weight", "2.o.weight", "0.gate_up.weight", "3.down.weight", "head.weight"])
def test_a_mistake_in_the_rotation_is_found(part: str) -> None:
    model = tiny_model("llama")
    own = some_logits(model)
    geometry, tensors = rotate(model, context=CONTEXT, end_tokens=(2,))
    tensors[part][0] *= 1.01
    with pytest.raises(UnsupportedModel, match="llama model, because its logits changed by"):
        check_rotation(own, geometry, tensors)


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_rows_are_the_same_to_the_bit_alone_and_among_others(name: str, tmp_path: Path) -> None:
    verifier = PackedVerifier(load_int8(tiny_folder(tmp_path / name, name)), budget_bytes=BUDGET)
    assert verifier.info.batch_invariant
    assert verifier.info.least_tokens == 1
    tokens = _tokens(random.Random(1), 200)
    alone = _alone(verifier, tokens)
    for seed in range(3):
        assert torch.equal(_among_others(verifier, tokens, seed), alone)


@pytest.mark.slow
def test_sequences_that_read_each_others_keys_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out = lean._lay_out

    def with_one_slot(parts: Sequence[Part]) -> list[lean._Run]:
        return [replace(run, slots=run.slots * 0) for run in lay_out(parts)]

    monkeypatch.setattr(lean, "_lay_out", with_one_slot)
    verifier = PackedVerifier(load_int8(folder), budget_bytes=BUDGET)
    assert not verifier.info.batch_invariant


@pytest.mark.parametrize("name", REFUSED)
def test_other_architectures_are_refused_by_name(name: str, tmp_path: Path) -> None:
    kind = name.partition("-")[0]
    with pytest.raises(UnsupportedModel, match=f"int8 cannot serve this {kind} model"):
        load_int8(tiny_folder(tmp_path / name, name))


def test_an_architecture_is_refused_before_weights_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "load_target", lambda *_, **__: pytest.fail("weights were loaded"))
    monkeypatch.setattr(int8, "gguf_architecture", lambda _path: "gpt2")
    for source in (tiny_folder(tmp_path / "gpt2", "gpt2"), tiny_target_gguf(tmp_path / "tiny.gguf")):
        with pytest.raises(UnsupportedModel, match="gpt2"):
            load_int8(source)


def test_a_gpu_is_refused(folder: Path) -> None:
    with pytest.raises(VerifierError, match="int8 is for CPUs; set torch_device to cpu, or dtype to auto for cuda"):
        load_int8(folder, device="cuda")


@pytest.mark.slow
def test_the_computing_thread_uses_the_set_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    verifier = PackedVerifier(load_int8(folder), budget_bytes=BUDGET)

    def threads() -> int:
        numba.set_num_threads(1)
        _alone(verifier, [1, 2])
        return numba.get_num_threads()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(threads).result() == 2


OTHER_PROCESSOR = """
import sys, torch
from fleet_edge.verifiers.packed.int8 import load_int8
from fleet_edge.verifiers.packed.kernels import VNNI
from fleet_edge.verifiers.packed.verifier import PackedVerifier
from tests.fleet_edge.verifiers.packed.test_int8 import BUDGET, some_rows
assert not VNNI
torch.set_num_threads(int(sys.argv[3]))
torch.save(some_rows(PackedVerifier(load_int8(sys.argv[1]), budget_bytes=BUDGET)), sys.argv[2])
"""


def some_rows(verifier: PackedVerifier) -> torch.Tensor:
    return _among_others(verifier, _tokens(random.Random(7), 150), 1)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3])
def test_processors_compute_equal_bits(folder: Path, verifier: PackedVerifier, tmp_path: Path, threads: int) -> None:
    """LLVM's name `generic` stands for the oldest processor of this kind: no VNNI, no AVX, not even FMA."""
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    rows = tmp_path / "rows.pt"
    code = [sys.executable, "-c", OTHER_PROCESSOR, str(folder), str(rows), str(threads)]
    subprocess.run(code, check=True, env=environment, cwd=ROOT)
    assert torch.equal(torch.load(rows, weights_only=True), some_rows(verifier))


@pytest.fixture
def own(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CACHE_DIRECTORY", raising=False)
    copy: Path = shutil.copytree(folder, tmp_path / "models" / "tiny")
    return copy


def _made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Load a model; return whether its weights were quantized for it."""
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(int8, "quantize", lambda *given: calls.append(1) or quantize(*given))
        load_int8(folder)
    return bool(calls)


def test_int8_weights_are_kept_next_to_the_model(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _made(own, monkeypatch)
    kept = own.parent / "tiny.int8.safetensors"
    assert kept.is_file()
    assert not _made(own, monkeypatch)
    assert [path.name for path in own.parent.iterdir() if path != own] == [kept.name]


def test_kept_weights_of_other_weights_are_not_used(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_int8(own)
    other = tiny_folder(own.parent / "other", "llama3-scaled-rope-tied")
    for file in ("model.safetensors", "config.json"):
        shutil.copy(other / file, own / file)
    assert _made(own, monkeypatch)
    assert not _made(own, monkeypatch)


def test_damaged_weights_are_made_again(
    own: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load_int8(own)
    kept = own.parent / "tiny.int8.safetensors"
    whole = kept.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[: len(whole) // 2], b"", b"x" * 100):
        caplog.clear()
        kept.write_bytes(damaged)
        assert _made(own, monkeypatch)
        assert f"{kept} are damaged" in caplog.text
        assert not _made(own, monkeypatch)


def test_where_the_models_folder_cannot_be_written_the_cache_is(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (own.parent / "tiny.int8.safetensors").mkdir()  # which no file replaces, not even root's
    assert _made(own, monkeypatch)
    assert not _made(own, monkeypatch)
    (kept,) = (tmp_path / "cache").rglob("*.safetensors")
    kept.unlink()
    kept.mkdir()
    assert _made(own, monkeypatch)
    assert "cannot be kept" in caplog.text


@pytest.mark.models
def test_the_demos_model_in_int8_stays_near_float32() -> None:
    path = prepared("target")
    ids = encode(path, (ROOT / "LICENSE").read_text(encoding="utf-8"))[:400]
    with torch.inference_mode():
        own = load_target(path, dtype="float32").model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    found = _alone(load_verifier(EdgeSettings(engine="torch", target=str(path), dtype="int8")), ids)
    p = torch.softmax(own, -1)[:, : found.shape[1]]
    overlap = torch.minimum(p, torch.softmax(found, -1)).sum(-1)
    assert float(overlap.mean()) >= OVERLAP

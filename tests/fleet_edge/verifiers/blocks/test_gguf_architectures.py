"""GGUF files of each architecture against llama.cpp, on small random models."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from fleet_edge.verifiers.blocks.gguf_weights import GgufWeights
from fleet_edge.verifiers.blocks.kv import Pages, ProcessMemory
from fleet_edge.verifiers.blocks.model import Model, Part
from fleet_edge.verifiers.contract import UnsupportedModel
from fleet_edge.verifiers.source import check_gguf_reader
from tests.support.tiny_gguf import new_gguf, tiny_rows, write_gguf

llama_cpp = pytest.importorskip("llama_cpp")

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS = 7, 64, 96, 4, 2
EXPERTS, EXPERT_INNER = 8, 32
WINDOW = 24
TOKENS = [(7 * index + index * index // 5) % 250 for index in range(150)]

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama 3": ("llama", {"rope_freqs": True}),
    "linear": ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "yarn": (
        "qwen2",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
    ),
    "qwen2": ("qwen2", {"rope.freq_base": 1e6}),
    "qwen3": ("qwen3", {"dim": 32}),
    "smollm3": ("smollm3", {}),
    "phi3": ("phi3", {"attention.sliding_window": 512}),
    "phi4": ("phi3", {"attention.sliding_window": 512, "rope.dimension_count": 8}),
    "gemma3": ("gemma3", {"dim": 32, "attention.sliding_window": WINDOW}),
    "qwen3moe": (
        "qwen3moe",
        {"dim": 32, "expert_count": EXPERTS, "expert_used_count": 3, "expert_feed_forward_length": EXPERT_INNER},
    ),
}


class _Writer:
    def __init__(self, file: gguf.GGUFWriter, changed: Mapping[str, tuple[int, ...] | None]) -> None:
        self.file = file
        self._changed = changed
        self._random = np.random.default_rng(11)

    def weight(self, name: str, *planned: int) -> None:
        shape = self._changed.get(f"{name}.weight", planned)
        if shape is not None:
            floats = self._random.normal(0, 1.5 / shape[-1] ** 0.5, shape).astype(np.float32)
            packed = gguf.quants.quantize(floats, GGMLQuantizationType.Q8_0)
            self.file.add_tensor(f"{name}.weight", packed, raw_dtype=GGMLQuantizationType.Q8_0)

    def vector(self, name: str, size: int, middle: float = 1.0) -> None:
        shape = self._changed.get(name, (size,))
        if shape is not None:
            self.file.add_tensor(name, self._random.normal(middle, 0.3, shape).astype(np.float32))

    def router(self, name: str) -> None:
        floats = self._random.normal(0, 1, (EXPERTS, HIDDEN)).astype(np.float32)
        self.file.add_tensor(f"{name}.weight", floats)


def _write(
    path: Path,
    kind: str,
    own: Mapping[str, Any],
    *,
    split: int = 0,
    changed: Mapping[str, tuple[int, ...] | None] | None = None,
) -> Path:
    """Write a model; `changed` has other shapes for tensors, None to leave one out."""
    dim, rows = own.get("dim", HIDDEN // HEADS), tiny_rows()
    file = new_gguf(
        path, kind, layers=LAYERS, width=HIDDEN, inner=INNER, heads=HEADS, kv_heads=KV_HEADS, dim=dim, rows=rows,
        split=split,
    )  # fmt: skip
    writer = _Writer(file, changed or {})
    for key, value in {"rope.dimension_count": dim, **own}.items():
        if "." in key or key.startswith("expert"):
            add = {int: file.add_uint32, float: file.add_float32, str: file.add_string}[type(value)]
            add(f"{kind}.{key}", value)
    writer.weight("token_embd", len(rows), HIDDEN)
    if kind not in {"gemma2", "gemma3"}:
        writer.weight("output", len(rows), HIDDEN)
    writer.vector("output_norm.weight", HIDDEN)
    if own.get("rope_freqs"):
        writer.vector("rope_freqs.weight", dim // 2, 3.0)
    for layer in range(LAYERS):
        _write_layer(writer, kind, f"blk.{layer}.", dim)
    write_gguf(file)
    return path


def _write_layer(writer: _Writer, kind: str, at: str, dim: int) -> None:
    outputs = {"attn_q": HEADS * dim, "attn_k": KV_HEADS * dim, "attn_v": KV_HEADS * dim}
    norms = {"attn_norm": HIDDEN, "ffn_norm": HIDDEN}
    feed: dict[str, tuple[int, ...]] = {
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    if kind == "phi3":
        outputs = {"attn_qkv": sum(outputs.values())}
        feed = {"ffn_up": (2 * INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
    if kind in {"qwen3", "qwen3moe", "gemma3"}:
        norms |= {"attn_q_norm": dim, "attn_k_norm": dim}
    if kind in {"gemma2", "gemma3"}:
        norms |= {"post_attention_norm": HIDDEN, "post_ffw_norm": HIDDEN}
    if kind == "qwen3moe":
        writer.router(f"{at}ffn_gate_inp")
        up, down = (EXPERTS, EXPERT_INNER, HIDDEN), (EXPERTS, HIDDEN, EXPERT_INNER)
        feed = {"ffn_gate_exps": up, "ffn_up_exps": up, "ffn_down_exps": down}
    for name, count in outputs.items():
        writer.weight(at + name, count, HIDDEN)
        if kind == "qwen2":
            writer.vector(f"{at}{name}.bias", count, 0.0)
    writer.weight(f"{at}attn_output", HIDDEN, HEADS * dim)
    for name, size in norms.items():
        writer.vector(f"{at}{name}.weight", size)
    for name, shape in feed.items():
        writer.weight(at + name, *shape)


def _logits(path: Path) -> NDArray[np.float32]:
    file = GgufWeights(path)
    its = file.geometry
    pages = Pages(ProcessMemory(layers=its.layers, kv_heads=its.kv_heads, dim=its.head_dim, count=8))
    pages.reserve(0, 0, len(TOKENS))
    return Model(file, threads=1).forward([Part(pages.table(0), 0, TOKENS, len(TOKENS))], pages).copy()


def _logits_of_llama_cpp(path: Path) -> NDArray[np.float32]:
    model = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)
    model.eval(TOKENS)
    return np.array(model.scores[: len(TOKENS)])


def _distance(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Return the median over rows, since rounding may choose another expert for a row, by the spread of logits."""
    return float(np.median(np.sqrt(np.square(found - wanted).mean(1))) / wanted.std())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_llama_cpp_up_to_rounding(name: str, tmp_path: Path) -> None:
    kind, own = ARCHITECTURES[name]
    path = _write(tmp_path / "model.gguf", kind, own)
    off = _distance(_logits(path), _logits_of_llama_cpp(path))
    print(name, off)
    # Rounding gives 0.02 to 0.065, the smallest of nine planted mistakes 0.12.
    assert off < 0.08


_GEMMA2 = {"dim": 16, "attention.sliding_window": WINDOW, "attn_logit_softcapping": 5.0}
_OF_TORCH: dict[str, tuple[str, dict[str, Any]]] = {
    **ARCHITECTURES,
    "gemma2": ("gemma2", _GEMMA2),
    "mixtral": ("llama", {"expert_count": EXPERTS, "expert_used_count": 2}),
}


@pytest.mark.parametrize("name", _OF_TORCH)
def test_torch_follows_llama_cpp_or_refuses_the_file(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from fleet_edge.verifiers.packed.target import load_target  # noqa: PLC0415 - needs torch

    kind, own = _OF_TORCH[name]
    path = _write(tmp_path / "model.gguf", kind, own)
    try:
        check_gguf_reader(path)
    except UnsupportedModel:
        assert name not in {"llama", "qwen2", "gemma2", "gemma3"}
        with pytest.raises(UnsupportedModel, match="torch"):
            load_target(path)
        return
    assert name in {"llama", "qwen2", "gemma2", "gemma3"}
    with torch.no_grad():
        found = load_target(path, dtype="float32").model(torch.tensor([TOKENS])).logits[0].numpy()
    # Rounding by llama.cpp gives 0.04 to 0.1, a window that is one token off 0.2, another scale of the attention 0.5.
    assert _distance(found, _logits_of_llama_cpp(path)) < 0.12


def test_a_file_in_parts_is_read_whole(tmp_path: Path) -> None:
    _write(tmp_path / "parts.gguf", "llama", {}, split=20)
    whole = _write(tmp_path / "whole.gguf", "llama", {})
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert len(parts) > 2
    assert np.array_equal(_logits(parts[0]), _logits(whole))
    with pytest.raises(UnsupportedModel, match="first"):
        GgufWeights(parts[1])
    parts[1].unlink()
    with pytest.raises(UnsupportedModel, match="missing"):
        GgufWeights(parts[0])


_SIZES = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length")


@pytest.mark.parametrize(
    ("key", "number"),
    [*itertools.product(_SIZES, [0, 1 << 31, (1 << 32) - 1]), ("attention.head_count_kv", 3)],
)
def test_impossible_sizes_are_refused_before_memory_is_taken(key: str, number: int, tmp_path: Path) -> None:
    path = _write(tmp_path / "model.gguf", "llama", {})
    name = f"llama.{key}".encode()
    content = bytearray(path.read_bytes())
    place = content.index(name) + len(name) + 4  # behind the type
    content[place : place + 4] = number.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(UnsupportedModel, match="damaged"):
        GgufWeights(path)


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("llama", {"blk.0.attn_q.weight": (HIDDEN,)}),
        ("llama", {"blk.3.attn_k.weight": (KV_HEADS * HIDDEN // HEADS - 1, HIDDEN)}),
        ("llama", {"blk.6.ffn_down.weight": (HIDDEN, INNER // 3)}),
        ("llama", {"blk.2.attn_norm.weight": (HIDDEN - 1,)}),
        ("llama", {"blk.2.attn_norm.weight": None}),
        ("llama 3", {"rope_freqs.weight": (3,)}),
        ("qwen2", {"blk.1.attn_k.bias": None}),
        ("qwen2", {"blk.1.attn_k.bias": (1,)}),
        ("qwen3", {"blk.1.attn_q_norm.weight": None}),
        ("phi3", {"blk.1.attn_qkv.weight": (HIDDEN, HIDDEN)}),
        ("qwen3moe", {"blk.1.ffn_up_exps.weight": (EXPERTS - 1, EXPERT_INNER, HIDDEN)}),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_they_are_loaded(
    kind: str, changed: dict[str, tuple[int, ...] | None], tmp_path: Path
) -> None:
    path = _write(tmp_path / "model.gguf", *ARCHITECTURES[kind], changed=changed)
    with pytest.raises(UnsupportedModel):
        Model(GgufWeights(path), threads=1)


def test_a_norm_of_integers_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "model.gguf", "llama", {})
    content = bytearray(path.read_bytes())
    place = content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8  # behind its dimension
    content[place : place + 4] = int(GGMLQuantizationType.I32).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(UnsupportedModel, match="damaged"):
        Model(GgufWeights(path), threads=1)

"""GGUF files of each architecture against llama.cpp, on small random models."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from fleet_edge.verifiers.blocks.states import Replay
from fleet_edge.verifiers.contract import UnsupportedModel
from fleet_edge.verifiers.source import check_gguf_reader
from tests.support.tiny_gguf import (
    Row,
    new_gguf,
    overwrite,
    tiny_delta_gguf,
    tiny_hybrid_gguf,
    tiny_mamba_gguf,
    tiny_nemotron_gguf,
    tiny_rows,
    write_gguf,
)

llama_cpp = pytest.importorskip("llama_cpp")

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS = 7, 64, 96, 4, 2
EXPERTS, EXPERT_INNER = 8, 32
WINDOW = 24
TOKENS = [(7 * index + index * index // 5) % 250 for index in range(150)]

_EXPERTS: dict[str, Any] = {
    "expert_count": EXPERTS,
    "expert_used_count": 3,
    "expert_feed_forward_length": EXPERT_INNER,
}
_WINDOW_OF_GEMMA2: dict[str, Any] = {
    "attention.sliding_window": WINDOW,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 10.0,
}
_FEW = {"layers": 3}
"""Experts change with the rounding of a router's inputs, so that rows differ the more the more layers there are."""
_LOCAL = [True, True, False, True, True]
"""Layers of Gemma 4 with a window, and with smaller heads."""
_GEMMA4: dict[str, Any] = {
    "dim": 64,
    "attention.sliding_window": WINDOW,
    "embedding_length_per_layer_input": 0,
    "attention.sliding_window_pattern": _LOCAL[:3],
    "attention.key_length_swa": 32,
    "attention.value_length_swa": 32,
    "rope.dimension_count_swa": 32,
    "attention.head_count_kv": [2, 2, 1],
    **_FEW,
    "final_logit_softcapping": 10.0,
}

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
    "gemma2": ("gemma2", {"dim": 16} | _WINDOW_OF_GEMMA2),
    "gemma4": ("gemma4", _GEMMA4),
    "gemma4 e": (
        "gemma4",
        _GEMMA4
        | {
            "layers": 5,
            "attention.sliding_window_pattern": _LOCAL,
            "attention.head_count_kv": [2, 2, 1, 2, 2],
            "embedding_length_per_layer_input": 256,  # with 32, llama.cpp computes another result on AMX
            "attention.shared_kv_layers": 2,
        },
    ),
    "gemma4 moe": ("gemma4", _GEMMA4 | _EXPERTS),
    "mixtral": ("llama", _FEW | {"expert_count": EXPERTS, "expert_used_count": 2}),
    "qwen2moe": ("qwen2moe", _FEW | _EXPERTS | {"expert_shared_feed_forward_length": 64}),
    "qwen3moe": ("qwen3moe", _FEW | _EXPERTS | {"dim": 32}),
    "gpt-oss": ("gpt-oss", _FEW | _EXPERTS | {"dim": 32, "attention.sliding_window": WINDOW}),
}


class _Writer:
    def __init__(
        self, file: gguf.GGUFWriter, changed: Mapping[str, tuple[int, ...] | None], kind: GGMLQuantizationType
    ) -> None:
        self.file, self._kind = file, kind
        self._changed = changed
        self._random = np.random.default_rng(11)

    def weight(self, name: str, *planned: int) -> None:
        shape = self._changed.get(f"{name}.weight", planned)
        if shape is not None:
            floats = self._random.normal(0, 1.5 / shape[-1] ** 0.5, shape).astype(np.float32)
            packed = gguf.quants.quantize(floats, self._kind)
            self.file.add_tensor(f"{name}.weight", packed, raw_dtype=self._kind)

    def vector(self, name: str, size: int, middle: float = 1.0) -> None:
        shape = self._changed.get(name, (size,))
        if shape is not None:
            self.file.add_tensor(name, self._random.normal(middle, 0.3, shape).astype(np.float32))

    def floats(self, name: str, *shape: int) -> None:
        self.file.add_tensor(name, self._random.normal(0, 1, shape).astype(np.float32))


def write_model(
    path: Path,
    kind: str,
    own: Mapping[str, Any],
    *,
    split: int = 0,
    changed: Mapping[str, tuple[int, ...] | None] | None = None,
    rows: Sequence[Row] | None = None,
) -> Path:
    """Write a model; `changed` has other shapes for tensors, None to leave one out. `rows` are its tokens."""
    dim, rows = own.get("dim", HIDDEN // HEADS), rows or tiny_rows()
    layers = own.get("layers", LAYERS)
    file = new_gguf(
        path, kind, layers=layers, width=HIDDEN, inner=INNER, heads=HEADS, kv_heads=KV_HEADS, dim=dim, rows=rows,
        split=split,
    )  # fmt: skip
    writer = _Writer(file, changed or {}, own.get("kind", GGMLQuantizationType.Q8_0))
    for key, value in {"rope.dimension_count": dim, **own}.items():
        if key not in ("dim", "kind", "layers", "rope_freqs"):
            types = {int: file.add_uint32, float: file.add_float32, str: file.add_string, list: file.add_array}
            types[type(value)](f"{kind}.{key}", value)
    writer.weight("token_embd", len(rows), HIDDEN)
    if not kind.startswith("gemma"):
        writer.weight("output", len(rows), HIDDEN)
    writer.vector("output_norm.weight", HIDDEN)
    if own.get("rope_freqs") or kind == "gemma4":
        writer.vector("rope_freqs.weight", dim // 2, 3.0)
    if by_layer := own.get("embedding_length_per_layer_input"):
        writer.weight("per_layer_token_embd", len(rows), own["layers"] * by_layer)
        writer.weight("per_layer_model_proj", own["layers"] * by_layer, HIDDEN)
        writer.vector("per_layer_proj_norm.weight", by_layer)
    for layer in range(layers):
        _write_layer(writer, kind, own, layer)
    write_gguf(file)
    return path


def _write_layer(writer: _Writer, kind: str, own: Mapping[str, Any], layer: int) -> None:
    at, dim = f"blk.{layer}.", own.get("dim", HIDDEN // HEADS)
    if kind == "gemma4" and _LOCAL[layer]:
        dim = own["attention.key_length_swa"]
    for name, count in _of_attention(kind, own, layer, dim).items():
        writer.weight(at + name, count, HIDDEN)
        if kind in {"qwen2", "qwen2moe", "gpt-oss"}:
            writer.vector(f"{at}{name}.bias", count, 0.0)
    writer.weight(f"{at}attn_output", HIDDEN, HEADS * dim)
    if kind == "gpt-oss":
        writer.vector(f"{at}attn_output.bias", HIDDEN, 0.0)
        writer.vector(f"{at}attn_sinks.weight", HEADS)
    if by_layer := own.get("embedding_length_per_layer_input"):
        writer.weight(f"{at}inp_gate", by_layer, HIDDEN)
        writer.weight(f"{at}proj", HIDDEN, by_layer)
    for name, size in _norms(kind, own, dim).items():
        writer.vector(f"{at}{name}.weight", size)
    for name, shape in _feed(writer, kind, own, at).items():
        writer.weight(at + name, *shape)


def _of_attention(kind: str, own: Mapping[str, Any], layer: int, dim: int) -> dict[str, int]:
    kv_heads = own.get("attention.head_count_kv", [KV_HEADS] * LAYERS)[layer]
    outputs = {"attn_q": HEADS * dim, "attn_k": kv_heads * dim, "attn_v": kv_heads * dim}
    if layer >= own.get("layers", LAYERS) - own.get("attention.shared_kv_layers", 0):
        return {"attn_q": HEADS * dim}
    if kind == "gemma4" and not _LOCAL[layer]:
        del outputs["attn_v"]
    return {"attn_qkv": sum(outputs.values())} if kind == "phi3" else outputs


def _norms(kind: str, own: Mapping[str, Any], dim: int) -> dict[str, int]:
    """Return the sizes of norms and scales."""
    names = ["attn_norm", "post_attention_norm" if kind == "gpt-oss" else "ffn_norm"]
    if kind.startswith("gemma"):
        names += ["post_attention_norm", "post_ffw_norm"]
    if kind == "gemma4" and own.get("expert_count"):
        names += ["pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"]
    if own.get("embedding_length_per_layer_input"):
        names.append("post_norm")
    found = dict.fromkeys(names, HIDDEN)
    if kind in {"qwen3", "qwen3moe", "gemma3", "gemma4"}:
        found |= {"attn_q_norm": dim, "attn_k_norm": dim}
    return found | ({"layer_output_scale": 1} if kind == "gemma4" else {})


def _feed(writer: _Writer, kind: str, own: Mapping[str, Any], at: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of products of a feed-forward part; write the rest of it."""
    dense: dict[str, tuple[int, ...]] = {
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    if kind == "phi3":
        return {"ffn_up": (2 * INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
    if not own.get("expert_count"):
        return dense
    writer.floats(f"{at}ffn_gate_inp.weight", EXPERTS, HIDDEN)
    inner = own.get("expert_feed_forward_length", INNER)
    up, down = (EXPERTS, inner, HIDDEN), (EXPERTS, HIDDEN, inner)
    feed: dict[str, tuple[int, ...]] = {"ffn_gate_exps": up, "ffn_up_exps": up, "ffn_down_exps": down}
    if kind == "gpt-oss":
        writer.vector(f"{at}ffn_gate_inp.bias", EXPERTS, 0.0)
        for name, shape in feed.items():
            writer.floats(f"{at}{name}.bias", *shape[:2])
    if kind == "qwen2moe":
        shared = own["expert_shared_feed_forward_length"]
        writer.floats(f"{at}ffn_gate_inp_shexp.weight", HIDDEN)
        feed |= {"ffn_gate_shexp": (shared, HIDDEN), "ffn_up_shexp": (shared, HIDDEN)}
        feed["ffn_down_shexp"] = HIDDEN, shared
    if kind == "gemma4":
        writer.vector(f"{at}ffn_gate_inp.scale", HIDDEN)
        writer.vector(f"{at}ffn_down_exps.scale", EXPERTS)
        return dense | {"ffn_gate_up_exps": (EXPERTS, 2 * inner, HIDDEN), "ffn_down_exps": down}
    return feed


def _logits(path: Path) -> NDArray[np.float32]:
    file = GgufWeights(path)
    its = file.geometry
    memory = ProcessMemory(its.pools, 8, its.states(1))
    pages = Pages(memory)
    pages.reserve(0, 0, len(TOKENS))
    part = Part(pages.table(0), 0, TOKENS, len(TOKENS), Replay(settled=len(TOKENS)))
    return Model(file, threads=1).forward([part], pages, memory.states).copy()


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
    path = write_model(tmp_path / "model.gguf", kind, own)
    off = _distance(_logits(path), _logits_of_llama_cpp(path))
    print(name, off)
    # Rounding gives 0.02 to 0.065, the smallest of nine planted mistakes 0.12.
    assert off < 0.08


def test_a_file_in_mxfp4_is_computed_as_by_llama_cpp_up_to_rounding(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "qwen3", _FEW | {"dim": 32, "kind": GGMLQuantizationType.MXFP4})
    assert _distance(_logits(path), _logits_of_llama_cpp(path)) < 0.08


_nemotron_with_experts = partial(tiny_nemotron_gguf, experts=6)


@pytest.mark.parametrize(
    "write", [tiny_hybrid_gguf, tiny_delta_gguf, tiny_mamba_gguf, tiny_nemotron_gguf, _nemotron_with_experts]
)
def test_hybrids_are_those_of_llama_cpp_up_to_rounding(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf")
    assert _distance(_logits(path), _logits_of_llama_cpp(path)) < 0.08


def test_torch_refuses_bounds_that_transformers_does_not_read(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", *ARCHITECTURES["gemma2"])
    with pytest.raises(UnsupportedModel):
        check_gguf_reader(path)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_torch_follows_llama_cpp_or_refuses_the_file(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from fleet_edge.verifiers.torch_engine.target import load_target  # noqa: PLC0415 - needs torch

    kind, own = ARCHITECTURES[name]
    if kind == "gemma2":  # transformers reads no other bound than that of the published models
        own = own | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    path = write_model(tmp_path / "model.gguf", kind, own)
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
    write_model(tmp_path / "parts.gguf", "llama", {}, split=20)
    whole = write_model(tmp_path / "whole.gguf", "llama", {})
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert len(parts) > 2
    assert np.array_equal(_logits(parts[0]), _logits(whole))
    with pytest.raises(UnsupportedModel):
        GgufWeights(parts[1])
    parts[1].unlink()
    with pytest.raises(UnsupportedModel, match=re.escape(parts[1].name)):
        GgufWeights(parts[0])


_SIZES = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length")


@pytest.mark.parametrize(
    ("key", "number"),
    [*itertools.product(_SIZES, [0, 1 << 31, (1 << 32) - 1]), ("attention.head_count_kv", 3)],
)
def test_impossible_sizes_are_refused_before_memory_is_taken(key: str, number: int, tmp_path: Path) -> None:
    path = overwrite(write_model(tmp_path / "model.gguf", "llama", {}), f"llama.{key}", number)
    with pytest.raises(UnsupportedModel):
        GgufWeights(path)


_ODD_SIZES = {
    "qwen35": {  # a head of keys, two of values, all of 32 numbers, and attention in every second layer
        "ssm.conv_kernel": [3, 5],
        "ssm.state_size": [31, 64],
        "ssm.group_count": [2, 3],
        "ssm.time_step_rank": [1, 3],
        "ssm.inner_size": [63, 65, 128],
        "full_attention_interval": [1, 3],
    },
    "granitehybrid": {  # two groups of keys of 8 numbers, and four heads of 32
        "ssm.conv_kernel": [3, 5],
        "ssm.state_size": [7, 16],
        "ssm.group_count": [1, 3, 4],
        "ssm.time_step_rank": [3, 8],
        "ssm.inner_size": [127, 129, 256],
    },
    "nemotron_h_moe": {  # six experts in two groups, of which a token uses two in one
        "expert_count": [5, 8],
        "expert_used_count": [4],
        "expert_group_count": [4, 6],
        "expert_group_used_count": [3],
        "expert_feed_forward_length": [64],
        "expert_shared_feed_forward_length": [64],
        "moe_latent_size": [31, 64],
    },
}
_FACTORS = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
_NO_FACTORS = (0x7FC00000, 0x7F800000, 0xBF800000)
"""Not a number, infinity, and -1."""
_ODD = [
    (kind, key, number)
    for kind, sizes in _ODD_SIZES.items()
    for key, odd in sizes.items()
    for number in [None, 0, 1 << 31, (1 << 32) - 1, *odd]
    if number or key != "expert_group_count"  # without it all experts are one group
] + [
    *(("granitehybrid", key, number) for key in _FACTORS for number in _NO_FACTORS),
    *(("nemotron_h_moe", "expert_weights_scale", number) for number in _NO_FACTORS),
]


@pytest.mark.parametrize(("kind", "key", "number"), _ODD)
def test_impossible_states_are_refused_before_weights_are_loaded(
    kind: str, key: str, number: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = {
        "qwen35": tiny_delta_gguf, "granitehybrid": tiny_mamba_gguf, "nemotron_h_moe": _nemotron_with_experts
    }  # fmt: skip
    path = overwrite(writers[kind](tmp_path / "model.gguf"), f"{kind}.{key}", number)
    monkeypatch.setattr(GgufWeights, "pack", lambda *_, **__: pytest.fail("weights are loaded"))
    with pytest.raises(UnsupportedModel):
        Model(GgufWeights(path), threads=1)


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
        ("qwen2moe", {"blk.1.ffn_up_shexp.weight": (32, HIDDEN)}),
        ("gpt-oss", {"blk.1.attn_sinks.weight": None}),
        ("gemma4", {"blk.2.attn_k_norm.weight": (32,)}),
        ("gemma4 e", {"blk.2.inp_gate.weight": None}),
        ("gemma4 e", {"per_layer_token_embd.weight": (HIDDEN, 1280)}),
        ("gemma4 moe", {"blk.1.post_ffw_norm_1.weight": None}),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_they_are_loaded(
    kind: str, changed: dict[str, tuple[int, ...] | None], tmp_path: Path
) -> None:
    path = write_model(tmp_path / "model.gguf", *ARCHITECTURES[kind], changed=changed)
    with pytest.raises(UnsupportedModel):
        Model(GgufWeights(path), threads=1)


def test_a_norm_of_integers_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "llama", {})
    content = bytearray(path.read_bytes())
    place = content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8  # behind its dimension
    content[place : place + 4] = int(GGMLQuantizationType.I32).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(UnsupportedModel):
        Model(GgufWeights(path), threads=1)

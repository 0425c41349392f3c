"""Random models of published shapes, perhaps with fewer layers: steps of mixtures of experts and of Gemma 4 E.

A layer and the output projection take the time of the published ones, and layers have the same random weights. Tokens
choose experts evenly, which is the worst case: a step of several rows reads most of them. The difference of two files
with fewer layers is the time of some layers, which scales to all.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from benchmarks.large.models import add_vocabulary, new_gguf, random_weights
from benchmarks.processes import BenchError

_Shapes = dict[str, tuple[int, ...]]

_SEED: Final = 1
_PATTERN: Final = 6  # every layer of this number of Gemma 4 has no window
_SPREAD: Final = 0.6  # of a product, for inputs of 1
_ADDED: Final = 0.2  # the same for what a layer adds to its input
_EMBEDDED: Final = 1.0
_UNTURNED: Final = 1e30  # divides the frequency of numbers that are not rotated
_ADDS: Final = ("attn_output", "ffn_down", "ffn_down_exps", "proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class CutModel:
    """A published model.

    Attributes:
        file: Type of its weights, in published files too.
        others: Type of all weights but the experts'.
        head: Type of the output projection.
        metadata: Besides sizes that all have, by key after the architecture's name.
        is_tied: Whether embedding and output projection are one tensor, of the type `head`.
        has_windows: All layers but every sixth have a window.
        shared: The last layers, which have no keys and values of their own.
        dims: Size of a head, without and with a window.
    """

    kind: str
    layers: int
    file: str
    others: Kind
    head: Kind
    vocabulary: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dims: tuple[int, int]
    experts: int = 0
    used: int = 0
    is_tied: bool = False
    has_windows: bool = False
    shared: int = 0
    per_layer: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)


CUT: Final[Mapping[str, CutModel]] = MappingProxyType(
    {
        "gemma4-e4b": CutModel(
            kind="gemma4",
            layers=42,
            file="Q4_0",
            others=Kind.Q4_0,
            head=Kind.Q6_K,
            vocabulary=262_144,
            hidden=2_560,
            inner=10_240,
            heads=8,
            kv_heads=2,
            dims=(512, 256),
            is_tied=True,
            has_windows=True,
            shared=18,
            per_layer=256,
            metadata={
                "rope.freq_base": 1e6,
                "rope.freq_base_swa": 1e4,
                "rope.dimension_count": 512,
                "rope.dimension_count_swa": 256,
                "attention.sliding_window": 512,
                "final_logit_softcapping": 30.0,
            },
        ),
        "gpt-oss-20b": CutModel(
            kind="gpt-oss",
            layers=24,
            file="MXFP4",
            others=Kind.Q8_0,
            head=Kind.Q8_0,
            vocabulary=201_088,
            hidden=2_880,
            inner=2_880,
            heads=64,
            kv_heads=8,
            dims=(64, 64),
            experts=32,
            used=4,
            metadata={
                "rope.freq_base": 150_000.0,
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 32.0,
                "rope.scaling.original_context_length": 4_096,
                "attention.sliding_window": 128,
            },
        ),
        "qwen3-30b-a3b": CutModel(
            kind="qwen3moe",
            layers=48,
            file="Q4_0",
            others=Kind.Q4_0,
            head=Kind.Q6_K,
            vocabulary=151_936,
            hidden=2_048,
            inner=768,
            heads=32,
            kv_heads=4,
            dims=(128, 128),
            experts=128,
            used=8,
            metadata={"rope.freq_base": 1e6},
        ),
    }
)


def make_cut(folder: Path, name: str, file: str, *, vocabulary: Path, layers: int | None = None) -> Path:
    """Return a GGUF, made if it is missing, as `benchmarks.large.models.make` does; perhaps with fewer layers."""
    its = CUT[name]
    if file != its.file:
        raise BenchError(f"The shape {name} is published in {its.file}; choose --engines blocks:{its.file}.")
    if layers is not None and layers > its.layers:
        raise BenchError(f"The shape {name} has {its.layers} layers; choose fewer --layers.")
    if layers is not None and layers < its.layers:
        # llama.cpp wants the last layer with keys of its own to have no window.
        own = max(1, (its.layers - its.shared) * layers // its.layers // _PATTERN) * _PATTERN if its.shared else layers
        its = replace(its, layers=layers, shared=max(layers - own, 0))
        name = f"{name}-{layers}"
    path = folder / f"{name}-{file}.gguf"
    if path.exists():
        return path
    with new_gguf(path, its.kind) as writer:
        _describe(writer, its, path.stem)
        add_vocabulary(writer, vocabulary, its.vocabulary)
        for tensor, data, kind in _tensors(its):
            writer.add_tensor(tensor, data, raw_dtype=kind)
    return path


def _describe(writer: gguf.GGUFWriter, its: CutModel, name: str) -> None:
    writer.add_name(f"random {name}")
    writer.add_block_count(its.layers)
    writer.add_context_length(32_768)
    writer.add_embedding_length(its.hidden)
    writer.add_feed_forward_length(its.inner)
    writer.add_head_count(its.heads)
    writer.add_head_count_kv(its.kv_heads)
    writer.add_key_length(its.dims[0])
    writer.add_value_length(its.dims[0])
    writer.add_layer_norm_rms_eps(1e-6)
    if its.experts:
        writer.add_expert_count(its.experts)
        writer.add_expert_used_count(its.used)
        writer.add_expert_feed_forward_length(its.inner)
    if its.per_layer:
        writer.add_array(
            f"{its.kind}.attention.sliding_window_pattern", [_is_local(its, at) for at in range(its.layers)]
        )
        writer.add_uint32(f"{its.kind}.attention.shared_kv_layers", its.shared)
        writer.add_uint32(f"{its.kind}.embedding_length_per_layer_input", its.per_layer)
        writer.add_uint32(f"{its.kind}.attention.key_length_swa", its.dims[1])
        writer.add_uint32(f"{its.kind}.attention.value_length_swa", its.dims[1])
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in its.metadata.items():
        add[type(value)](f"{its.kind}.{key}", value)


def _tensors(its: CutModel) -> Iterator[tuple[str, NDArray[Any], Kind | None]]:
    random = np.random.default_rng(_SEED)
    made: dict[tuple[str, tuple[int, ...]], NDArray[np.uint8]] = {}

    def weights(name: str, kind: Kind, shape: tuple[int, ...], spread: float) -> tuple[str, NDArray[Any], Kind]:
        """Return a tensor; all of one name and shape are the same, which need the memory of one."""
        if (name, shape) not in made:
            *_, rows, columns = shape
            count = shape[0] if len(shape) > 2 else 1
            data = random_weights(kind, random, count * rows, columns, spread)
            made[name, shape] = data.reshape(*shape[:-1], -1)
        return name, made[name, shape], kind

    size = (its.vocabulary, its.hidden)
    yield weights("token_embd.weight", its.head if its.is_tied else its.others, size, _EMBEDDED)
    if not its.is_tied:
        yield weights("output.weight", its.head, size, its.hidden**-0.5)
    yield "output_norm.weight", np.ones(its.hidden, np.float32), None
    if its.per_layer:
        width = its.layers * its.per_layer
        turned = np.where(np.arange(its.dims[0] // 2) < its.dims[0] // 8, 1.0, _UNTURNED)
        yield "rope_freqs.weight", turned.astype(np.float32), None
        yield weights("per_layer_token_embd.weight", its.others, (its.vocabulary, width), _EMBEDDED)
        yield weights("per_layer_model_proj.weight", its.others, (width, its.hidden), its.hidden**-0.5)
        yield "per_layer_proj_norm.weight", np.ones(its.per_layer, np.float32), None
    for layer in range(its.layers):
        at = f"blk.{layer}."
        for name, shape in _products(its, layer).items():
            kind = getattr(Kind, its.file) if name.endswith("_exps") else its.others
            spread = (_ADDED if name in _ADDS else _SPREAD) / shape[-1] ** 0.5
            _, data, _ = weights(name, kind, shape, spread)
            yield f"{at}{name}.weight", data, kind
        for name, shape in _vectors(its, layer).items():
            yield f"{at}{name}", np.ones(shape, np.float32), None
        for name, shape in _biases(its).items():
            yield f"{at}{name}", np.zeros(shape, np.float32), None
        if its.experts:
            router = random.normal(0, its.hidden**-0.5, (its.experts, its.hidden))
            yield f"{at}ffn_gate_inp.weight", router.astype(np.float32), None


def _is_local(its: CutModel, layer: int) -> bool:
    return its.has_windows and (layer + 1) % _PATTERN != 0


def _dim(its: CutModel, layer: int) -> int:
    return its.dims[_is_local(its, layer)]


def _owns_keys(its: CutModel, layer: int) -> bool:
    return layer < its.layers - its.shared


def _products(its: CutModel, layer: int) -> _Shapes:
    wide, narrow = its.heads * _dim(its, layer), its.kv_heads * _dim(its, layer)
    found: _Shapes = {"attn_q": (wide, its.hidden), "attn_output": (its.hidden, wide)}
    if _owns_keys(its, layer):
        found |= {"attn_k": (narrow, its.hidden), "attn_v": (narrow, its.hidden)}
    each, end = ((its.experts,), "_exps") if its.experts else ((), "")
    found |= {f"ffn_{name}{end}": (*each, its.inner, its.hidden) for name in ("gate", "up")}
    found[f"ffn_down{end}"] = (*each, its.hidden, its.inner)
    if its.per_layer:
        found |= {"inp_gate": (its.per_layer, its.hidden), "proj": (its.hidden, its.per_layer)}
    return found


def _vectors(its: CutModel, layer: int) -> _Shapes:
    names = ["attn_norm", "post_attention_norm" if its.kind == "gpt-oss" else "ffn_norm"]
    if its.kind == "gemma4":
        names += ["post_attention_norm", "post_ffw_norm", "post_norm"]
    found: _Shapes = {f"{name}.weight": (its.hidden,) for name in names}
    if its.kind == "gemma4":
        found["layer_output_scale.weight"] = (1,)
    if its.kind != "gpt-oss":
        normalized = "qk" if _owns_keys(its, layer) else "q"
        found |= {f"attn_{name}_norm.weight": (_dim(its, layer),) for name in normalized}
    return found


def _biases(its: CutModel) -> _Shapes:
    if its.kind != "gpt-oss":
        return {}
    wide, narrow = its.heads * its.dims[0], its.kv_heads * its.dims[0]
    return {
        "attn_sinks.weight": (its.heads,),
        "attn_q.bias": (wide,),
        "attn_k.bias": (narrow,),
        "attn_v.bias": (narrow,),
        "attn_output.bias": (its.hidden,),
        "ffn_gate_inp.bias": (its.experts,),
        "ffn_gate_exps.bias": (its.experts, its.inner),
        "ffn_up_exps.bias": (its.experts, its.inner),
        "ffn_down_exps.bias": (its.experts, its.hidden),
    }

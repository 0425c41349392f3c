"""int8 weights for the lean forward: rotation, quantization, and the file in which they are kept.

One scale a row costs quality where single channels are large. So the weights are rotated first, which does not change
the model's function (QuaRot, arXiv 2404.00456): one orthogonal matrix is folded into all weights that read or write the
residual stream, one into values and `o`, and the input of `down` is multiplied by a Hadamard matrix. The rotated
model's float32 logits are compared with the model's own before it is quantized.
"""

import hashlib
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import linear, pad, scaled_dot_product_attention, silu

from fleet_common.host import available_memory, cache_folder
from fleet_common.hub import hub_access
from fleet_edge.verifiers.blocks.gguf_reader import read_header
from fleet_edge.verifiers.contract import TargetInfo, UnsupportedModel, VerifierError
from fleet_edge.verifiers.packed.lean import Geometry, LeanModel, hadamard
from fleet_edge.verifiers.packed.target import (
    AUTO,
    Target,
    check_memory,
    load_target,
    loading_bytes,
    text_config,
    vocabulary_of,
)
from fleet_edge.verifiers.source import check_repository, is_gguf, target_name
from fleet_edge.verifiers.tokens import gguf_tokens, repository_tokens

_log = logging.getLogger(__name__)

KINDS: Final = ("llama", "mistral", "qwen2", "qwen3", "smollm3")

_FORMAT: Final = "2"
"""Version of the format; change it whenever the same weights are quantized differently."""

_FILES: Final = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "config.json", "generation_config.json")
"""Files of a folder on which the result depends."""

_SEED: Final = 0
_CHECKED: Final = 40  # tokens
_TOLERANCE: Final = 1e-4
_INSTEAD: Final = "torch serves it in float32 and bfloat16 (dtype)"
_INNER_STEP: Final = 32
"""Feed-forward layers are widened to a multiple of this, for blocks of a Hadamard matrix."""
_LARGEST_HADAMARD: Final = 1 << 12


def check_kind(config: Any) -> None:  # noqa: ANN401 - transformers has no type information
    """Check that the lean forward serves an architecture; raises `UnsupportedModel`."""
    kind, reason = config.model_type, ""
    if kind in KINDS and config.hidden_act != "silu":
        reason = f"the model uses {config.hidden_act} where it computes silu"
    elif "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        kind == "mistral" and config.sliding_window is not None
    ):
        reason = "the model has layers with a sliding window"
    _require(kind, reason)


def _require(kind: str, reason: str = "") -> None:
    if kind not in KINDS:
        reason = f"it serves {', '.join(KINDS)}"
    if reason:
        raise UnsupportedModel(f"The number format int8 cannot serve this {kind} model, because {reason}; {_INSTEAD}.")


def rotate(model: Any, *, context: int, end_tokens: tuple[int, ...]) -> tuple[Geometry, dict[str, torch.Tensor]]:  # noqa: ANN401
    """Return a model's geometry and its rotated weights in float32.

    The transformers model loses its weights on the way, so that memory holds them once. Raises `UnsupportedModel` if
    the lean forward does not serve it.
    """
    config, body = model.config, model.model
    check_kind(config)
    hidden = config.hidden_size
    inner = -(-config.intermediate_size // _INNER_STEP) * _INNER_STEP
    size = math.gcd(inner, _LARGEST_HADAMARD)
    first = body.layers[0].self_attn
    geometry = Geometry(
        kind=config.model_type,
        layers=config.num_hidden_layers,
        hidden=hidden,
        inner=inner,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=first.head_dim,
        rows=config.vocab_size,
        hadamard=size,
        eps=config.rms_norm_eps,
        context=context,
        rope_scale=float(body.rotary_emb.attention_scaling),
        without_rope=tuple(
            number for number, layer in enumerate(body.layers) if not getattr(layer.self_attn, "use_rope", True)
        ),
        end_tokens=end_tokens,
    )
    generator = torch.Generator().manual_seed(_SEED)
    stream, head = _orthogonal(hidden, generator), _orthogonal(geometry.head_dim, generator)
    spread = hadamard(size).double() / size
    embedding = body.embed_tokens.weight.detach().double()
    output = model.lm_head.weight.detach().double()
    tensors = {
        "inv_freq": body.rotary_emb.inv_freq.detach().float(),
        "embedding": (embedding @ stream).float(),
        "head.weight": (output * body.norm.weight.detach().double() @ stream * hidden**0.5).float(),
    }
    for number, layer in enumerate(body.layers):
        tensors |= _rotate_layer(layer, f"{number}.", geometry, stream=stream, head=head, spread=spread)
        for parameter in layer.parameters():
            parameter.data = torch.empty(0)
    return geometry, tensors


def _orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    matrix: torch.Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return matrix


def _rotate_layer(
    layer: Any,  # noqa: ANN401
    name: str,
    geometry: Geometry,
    *,
    stream: torch.Tensor,
    head: torch.Tensor,
    spread: torch.Tensor,
) -> dict[str, torch.Tensor]:
    attention, feed = layer.self_attn, layer.mlp
    # The lean forward's norms leave the root of the width to the weights that follow.
    before, between = (
        norm.weight.detach().double() * geometry.hidden**0.5
        for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    )
    root = geometry.head_dim**0.5

    def heads_rotated(value: torch.Tensor) -> torch.Tensor:
        return (head.T @ value.view(geometry.kv_heads, geometry.head_dim, -1)).reshape(value.shape)

    query, key, value = (
        (part.weight.detach().double() * before) @ stream
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    scale, tensors = attention.scaling, dict[str, torch.Tensor]()
    if hasattr(attention, "q_norm"):
        tensors[f"{name}q_norm"] = (attention.q_norm.weight.detach().double() * scale * root).float()
        tensors[f"{name}k_norm"] = (attention.k_norm.weight.detach().double() * root).float()
        scale = 1.0
    tensors[f"{name}qkv.weight"] = torch.cat((query * scale, key, heads_rotated(value))).float()
    if attention.q_proj.bias is not None:
        query, key, value = (
            part.bias.detach().double() for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        tensors[f"{name}qkv.bias"] = torch.cat((query * scale, key, heads_rotated(value))).float()
    output = attention.o_proj.weight.detach().double()
    output = (output.view(len(output), geometry.heads, geometry.head_dim) @ head).reshape(output.shape)
    gate, up = ((part.weight.detach().double() * between) @ stream for part in (feed.gate_proj, feed.up_proj))
    more = geometry.inner - len(gate)
    gate, up, down = pad(gate, (0, 0, 0, more)), pad(up, (0, 0, 0, more)), feed.down_proj.weight.detach().double()
    down = pad(down, (0, more))
    down = (down.view(len(down), -1, geometry.hadamard) @ spread).reshape(down.shape)
    tensors |= {
        f"{name}o.weight": (stream.T @ output).float(),
        f"{name}gate_up.weight": torch.cat((gate, up)).float(),
        f"{name}down.weight": (stream.T @ down).float(),
    }
    for part, its in (("o", attention.o_proj), ("down", feed.down_proj)):
        if its.bias is not None:
            tensors[f"{name}{part}.bias"] = (its.bias.detach().double() @ stream).float()
    return tensors


def quantize(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return rotated weights in int8, with one scale a row, and take them out of what is given."""
    made = dict[str, torch.Tensor]()
    for name in set(tensors):
        tensor = tensors.pop(name)
        if name.endswith(".weight"):
            scale = tensor.abs().amax(1).clamp_min_(1e-30) / 127
            made[name] = torch.round(tensor / scale[:, None]).to(torch.int8)
            made[f"{name.removesuffix('weight')}scale"] = scale
        else:
            made[name] = tensor
    made["embedding"] = made["embedding"].to(torch.float16)
    return made


def some_logits(model: Any) -> torch.Tensor:  # noqa: ANN401
    """Return a model's logits for `check_rotation` to compare."""
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=_some_ids(model.config.vocab_size)[None], use_cache=False).logits[0]
    return logits


def _some_ids(rows: int) -> torch.Tensor:
    return torch.randint(rows, (_CHECKED,), generator=torch.Generator().manual_seed(_SEED))


def check_rotation(own: torch.Tensor, geometry: Geometry, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that rotated weights in float32 compute the model's own logits; raises `UnsupportedModel`."""
    found = reference_logits(geometry, tensors, _some_ids(geometry.rows))
    distance = float((found - own).abs().max() / own.std().clamp_min(1e-9))
    if not distance <= _TOLERANCE:  # also if it is not a number
        raise UnsupportedModel(
            f"The number format int8 cannot serve this {geometry.kind} model, because its logits changed by "
            f"{distance:.1e} of their spread when its weights were rotated; {_INSTEAD}."
        )


def reference_logits(geometry: Geometry, tensors: Mapping[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Return what rotated weights compute in float32 for one sequence, `[len(ids), rows]`, by the plainest means."""
    its = geometry
    heads, shared = its.heads, its.heads // its.kv_heads

    def norm(x: torch.Tensor, eps: float) -> torch.Tensor:
        return x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()

    def times(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    angles = torch.arange(len(ids), dtype=torch.float64)[:, None] * tensors["inv_freq"].double()
    cos, sin = (turn.mul(its.rope_scale).float().repeat(1, 2)[:, None] for turn in (angles.cos(), angles.sin()))
    spread = hadamard(its.hadamard)
    x = tensors["embedding"][ids].float()
    for layer in range(its.layers):
        found = times(norm(x, its.eps * its.hidden), f"{layer}.qkv").view(len(ids), -1, its.head_dim)
        both, value = found[:, : -its.kv_heads], found[:, -its.kv_heads :]
        if f"{layer}.q_norm" in tensors:
            both = norm(both, its.eps * its.head_dim)
            both = torch.cat(
                (both[:, :heads] * tensors[f"{layer}.q_norm"], both[:, heads:] * tensors[f"{layer}.k_norm"]), 1
            )
        if layer not in its.without_rope:
            left, right = both.chunk(2, -1)
            both = both * cos + torch.cat((-right, left), -1) * sin
        query, key, value = (part.transpose(0, 1) for part in (both[:, :heads], both[:, heads:], value))
        key, value = key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)
        found = scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
        x = x + times(found.transpose(0, 1).flatten(1), f"{layer}.o")
        gate, up = times(norm(x, its.eps * its.hidden), f"{layer}.gate_up").chunk(2, -1)
        x = x + times(((silu(gate) * up).view(-1, its.hadamard) @ spread).view(len(x), -1), f"{layer}.down")
    return times(norm(x, its.eps * its.hidden), "head")


def load_int8(source: str | Path, *, device: str = AUTO) -> Target:
    """Load a target model in int8, on `cpu` or `auto`; quantize it first where no file holds the result.

    Raises `UnsupportedModel` if the lean forward does not serve the model or its files cannot be loaded,
    `VerifierError` if there is no such model, or the device is no CPU.
    """
    if device not in (AUTO, "cpu"):
        raise VerifierError(
            f"The number format int8 is for CPUs; set torch_device to cpu, or dtype to auto for {device}."
        )
    path = Path(source).expanduser()
    local = path if path.exists() else _snapshot(str(source))
    known = None if local is None else _read(local, _digest(local))
    geometry, tensors = _make(source) if known is None else known
    tokens = gguf_tokens(path) if is_gguf(path) else repository_tokens(str(source))
    name = target_name(source)
    info = TargetInfo(
        name=name,
        vocabulary=vocabulary_of(tokens, name=name, rows=geometry.rows),
        context=geometry.context,
        end_tokens=geometry.end_tokens,
        runs_on=f"cpu, int8, {torch.get_num_threads()} threads",
    )
    return Target(LeanModel(geometry, tensors), info, source)


Quantized = tuple[Geometry, dict[str, torch.Tensor]]


def _make(source: str | Path) -> Quantized:
    path = Path(source).expanduser()
    # Before its weights are loaded:
    if is_gguf(path):
        _require(str(read_header(path).metadata.get("general.architecture")))
    else:
        with hub_access():
            check_kind(text_config(str(source)))
    floats = loading_bytes(path, torch.float32)
    check_memory(
        name=str(source),
        needed=floats and floats * 5 // 4,  # once in float32 and once in int8
        available=available_memory(),
        number="int8 for the first time",
    )
    target = load_target(source, dtype="float32")
    with torch.inference_mode():
        own = some_logits(target.model)
        geometry, rotated = rotate(target.model, context=target.info.context, end_tokens=target.info.end_tokens)
        del target
        check_rotation(own, geometry, rotated)
        tensors = quantize(rotated)
    local = path if path.exists() else _snapshot(str(source))
    if local is not None:
        _write(local, _digest(local), geometry, tensors)
    return geometry, tensors


def _snapshot(name: str) -> Path | None:
    """Return the folder of a repository whose weights were fetched before, if there is one."""
    from transformers.utils import cached_file  # noqa: PLC0415 - takes seconds

    check_repository(name)
    try:
        found = cached_file(name, "config.json", local_files_only=True)
    except OSError:
        return None
    folder = None if found is None else Path(found).parent
    return folder if folder is not None and (folder / "model.safetensors").exists() else None


def _places(local: Path) -> list[Path]:
    """Return the files that may hold the quantized weights: next to the model, or in the cache folder."""
    name = f"{local.resolve().name.removesuffix('.gguf')}.int8.safetensors"
    cache = cache_folder()
    digest = hashlib.sha256(str(local.resolve()).encode()).hexdigest()[:16]
    return [local.resolve().parent / name, *([cache / "int8" / f"{digest}.safetensors"] if cache else [])]


def _digest(local: Path) -> str:
    files = [local]
    if local.is_dir():
        files = sorted({file for pattern in _FILES for file in local.glob(pattern)})
    digest = hashlib.sha256(_FORMAT.encode())
    for file in files:
        digest.update(f"\n{file.name} ".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _content(geometry: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(geometry.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(local: Path, source: str) -> Quantized | None:
    """Return the kept weights of a model; None if they are missing, damaged or another model's."""
    for file in _places(local):
        try:
            with safe_open(file, "pt") as kept:
                metadata = kept.metadata() or {}
                if metadata.get("source") != source:
                    continue
                tensors = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118 - no mapping
            geometry = metadata.get("geometry", "")
            if metadata.get("content") == _content(geometry, tensors):
                return Geometry.model_validate_json(geometry), tensors
        except (OSError, SafetensorError, ValidationError):
            if not file.exists():
                continue
        _log.warning("The int8 weights in %s are damaged and made again.", file)
    return None


def _write(local: Path, source: str, geometry: Geometry, tensors: Mapping[str, torch.Tensor]) -> None:
    """Keep weights next to their model, or in the cache folder where that cannot be written."""
    text = geometry.model_dump_json()
    metadata = {"source": source, "geometry": text, "content": _content(text, tensors)}
    errors = []
    for file in _places(local):
        partial = None
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
            os.close(descriptor)
            save_file(dict(tensors), partial, metadata)
            Path(partial).chmod(0o644)
            Path(partial).replace(file)
        except (OSError, SafetensorError) as error:
            errors.append(str(error))
            if partial is not None:
                with suppress(OSError):
                    Path(partial).unlink()
        else:
            return
    _log.warning("The int8 weights cannot be kept and are made again at the next start: %s", "; ".join(errors))

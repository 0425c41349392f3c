"""Tensors of a model: the names and shapes that a geometry demands, as a GGUF has them."""

import math
from collections.abc import Callable, Sequence
from typing import Final

from fleet_edge.verifiers.blocks.geometry import Attention, Convolution, Experts, Geometry, Layer, Recurrence

_Shapes = dict[str, tuple[int, ...]]

_OPTIONAL: Final = (
    "attn_q_norm", "attn_k_norm", "attn_qkv", "ffn_gate", "ffn_gate_up_exps", "layer_output_scale", "ssm_ba",
    "ffn_gate_shexp",
)  # fmt: skip


def unfit_tensor(its: Geometry, shape: Callable[[str], tuple[int, ...] | None]) -> str | None:
    """Return the name of a tensor that is missing, or has not the shape that the geometry demands; None if all fit.

    `shape(name)` returns the shape of a tensor by its name in a GGUF, None if there is none.
    """
    expected: _Shapes = {"token_embd.weight": (its.rows, its.hidden), f"{its.output_norm}.weight": (its.hidden,)}
    if shape("output.weight") is not None:
        expected["output.weight"] = (its.rows, its.hidden)
    if its.per_layer:
        width = len(its.layers) * its.per_layer
        expected["per_layer_token_embd.weight"] = its.rows, width
        expected["per_layer_model_proj.weight"] = width, its.hidden
        expected["per_layer_proj_norm.weight"] = (its.per_layer,)
    for number, layer in enumerate(its.all_layers):
        at = f"blk.{number}."
        if number == len(its.layers):
            expected |= _of_mtp(its, at, shape)
        names = [name for name in _OPTIONAL if shape(f"{at}{name}.weight") is not None]
        expected |= {f"{at}{name}": each for name, each in _vectors(its, layer, names).items()}
        for together in _products(its, layer, names):
            expected |= {f"{at}{name}.weight": each for name, each in together.items()}
            needed = layer.experts is not None and layer.experts.has_biases
            if needed or any(shape(f"{at}{name}.bias") is not None for name in together):
                expected |= {f"{at}{name}.bias": each[:-1] for name, each in together.items()}
    return next((name for name, each in expected.items() if _as_vector(name, shape(name)) != each), None)


def _of_mtp(its: Geometry, at: str, shape: Callable[[str], tuple[int, ...] | None]) -> _Shapes:
    """Return the shapes of what the layer that proposes tokens has besides a layer's own."""
    whole, hidden = (its.rows, its.hidden), (its.hidden,)
    optional = {"embed_tokens": whole, "shared_head_head": whole, "shared_head_norm": hidden}
    found = {name: each for name, each in optional.items() if shape(f"{at}nextn.{name}.weight") is not None}
    found |= {"eh_proj": (its.hidden, 2 * its.hidden), "enorm": hidden, "hnorm": hidden}
    return {f"{at}nextn.{name}.weight": each for name, each in found.items()}


def _as_vector(name: str, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Return the shape of a vector that a file has as a matrix: of one row, or in Mamba-2 of a row by head or group."""
    if shape is not None and name.endswith((".ssm_a", ".ssm_d", ".ssm_norm.weight")):
        return (math.prod(shape),)
    return shape[1:] if shape is not None and len(shape) > 1 and shape[0] == 1 else shape


def _vectors(its: Geometry, layer: Layer, optional: Sequence[str]) -> _Shapes:
    """Return the shapes of a layer's norms, routers and scales."""
    hidden, mixer = (its.hidden,), layer.mixer
    found: _Shapes = {"attn_norm.weight": hidden, f"{its.feed_norm}.weight": hidden}
    if its.sandwich:
        found |= {"post_attention_norm.weight": hidden, "post_ffw_norm.weight": hidden}
    if isinstance(mixer, Convolution):
        found["shortconv.conv.weight"] = its.hidden, mixer.kernel
    elif isinstance(mixer, Recurrence):
        found |= {"ssm_dt.bias": (mixer.value_heads,), "ssm_a": (mixer.value_heads,)}
        found |= {"ssm_norm.weight": (mixer.value_dim,), "ssm_conv1d.weight": (mixer.channels, mixer.kernel)}
    if isinstance(mixer, Recurrence) and mixer.is_mamba:
        found |= {"ssm_norm.weight": (mixer.values,), "ssm_conv1d.bias": (mixer.channels,)}
        found["ssm_d"] = (mixer.value_heads,)
    elif isinstance(mixer, Recurrence):
        names, count = (["ssm_ba"], 2) if "ssm_ba" in optional else (["ssm_beta", "ssm_alpha"], 1)
        found |= {f"{name}.weight": (count * mixer.value_heads, its.hidden) for name in names}
    elif isinstance(mixer, Attention):
        found |= _of_heads(mixer, optional)
    if layer.experts is not None:
        found |= _of_router(layer.experts, its.hidden)
    if its.per_layer:
        found["post_norm.weight"] = hidden
    if its.sandwich and "layer_output_scale" in optional:
        found["layer_output_scale.weight"] = (1,)
    return found


def _of_heads(its: Attention, optional: Sequence[str]) -> _Shapes:
    found: _Shapes = {}
    for name in ("attn_q_norm", "attn_k_norm"):
        needed = its.heads_normalized and (name == "attn_q_norm" or its.source is None)
        if needed or name in optional:
            found[f"{name}.weight"] = (its.dim,)
    if its.has_sinks:
        found["attn_sinks.weight"] = (its.heads,)
    return found


def _of_router(its: Experts, hidden: int) -> _Shapes:
    found: _Shapes = {"ffn_gate_inp.weight": (its.count, hidden)}
    if its.has_biases:
        found["ffn_gate_inp.bias"] = (its.count,)
    if its.groups:
        found["exp_probs_b.bias"] = (its.count,)
    if its.shared and its.shared_gated:
        found["ffn_gate_inp_shexp.weight"] = (hidden,)
    if its.scaled:
        found |= {"ffn_gate_inp.scale": (hidden,), "ffn_down_exps.scale": (its.count,)}
        found |= {f"{name}.weight": (hidden,) for name in ("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2")}
    return found


def _products(its: Geometry, layer: Layer, optional: Sequence[str]) -> list[_Shapes]:
    """Return the shapes of a layer's products, together those that share their inputs."""
    hidden, experts, mixer = its.hidden, layer.experts, layer.mixer
    if isinstance(mixer, Convolution):
        found: list[_Shapes] = [{"shortconv.in_proj": (3 * hidden, hidden)}, {"shortconv.out_proj": (hidden, hidden)}]
    elif isinstance(mixer, Recurrence):
        found = [{"attn_qkv": (mixer.channels, hidden), "attn_gate": (mixer.values, hidden)}]
        if mixer.is_mamba:
            found = [{"ssm_in": (mixer.inputs, hidden)}]
        found.append({"ssm_out": (hidden, mixer.values)})
    elif mixer is None:
        found = []
    else:
        found = [_of_attention(mixer, hidden, fused="attn_qkv" in optional)]
        found.append({"attn_output": (hidden, mixer.heads * mixer.dim)})
    gated = its.activation.has_gate
    if layer.inner:
        found += _of_dense("", layer.inner, hidden, optional, gated=gated)
    if experts is not None:
        found += _of_experts(experts, hidden, optional, gated=gated)
    if its.per_layer:
        found += [{"inp_gate": (its.per_layer, hidden)}, {"proj": (hidden, its.per_layer)}]
    return found


def _of_experts(its: Experts, hidden: int, optional: Sequence[str], *, gated: bool) -> list[_Shapes]:
    width = its.latent or hidden
    up = its.count, its.inner, width
    if "ffn_gate_up_exps" in optional:
        found: list[_Shapes] = [{"ffn_gate_up_exps": (its.count, 2 * its.inner, width)}]
    else:
        found = [{"ffn_gate_exps": up, "ffn_up_exps": up} if gated else {"ffn_up_exps": up}]
    found.append({"ffn_down_exps": (its.count, width, its.inner)})
    if its.latent:
        found += [{"ffn_latent_down": (width, hidden)}, {"ffn_latent_up": (hidden, width)}]
    return found + (_of_dense("_shexp", its.shared, hidden, optional, gated=gated) if its.shared else [])


def _of_dense(end: str, inner: int, hidden: int, optional: Sequence[str], *, gated: bool) -> list[_Shapes]:
    """Return the shapes of a feed-forward part, whose gate may lie in one tensor with up."""
    up: _Shapes = {f"ffn_up{end}": (2 * inner if gated else inner, hidden)}
    if gated and f"ffn_gate{end}" in optional:
        up = {f"ffn_gate{end}": (inner, hidden), f"ffn_up{end}": (inner, hidden)}
    return [up, {f"ffn_down{end}": (hidden, inner)}]


def _of_attention(its: Attention, hidden: int, *, fused: bool) -> _Shapes:
    queries, keys = its.heads * its.dim, its.kv_heads * its.dim
    if fused:
        return {"attn_qkv": (queries + 2 * keys, hidden)}
    found: _Shapes = {"attn_q": (queries * (2 if its.is_gated else 1), hidden)}
    if its.source is None:
        found["attn_k"] = keys, hidden
    if its.source is None and its.has_values:
        found["attn_v"] = keys, hidden
    return found

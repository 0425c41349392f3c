"""Architectures: the layers and the constants of a model, from the metadata of a GGUF or from a config.json."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fleet_edge.verifiers.blocks.geometry import (
    Activation,
    Attention,
    Convolution,
    Experts,
    Geometry,
    Layer,
    Mixer,
    Recurrence,
    Rope,
)
from fleet_edge.verifiers.blocks.ropes import rope
from fleet_edge.verifiers.contract import GEMMA2_CAPS, RUNNING_STATE, UnsupportedModel, running_state

_Vector = Callable[[str], npt.NDArray[np.float32] | None]

_SLIDING: Final = "sliding_attention"
_LINEAR: Final = "linear_attention"
_GEMMA2_27B_LAYERS: Final = 46
_GEMMA3_27B_LAYERS: Final = 62
_SMOLLM3_PATTERN: Final = 4
"""Every fourth layer of SmolLM3 has no rotary embedding."""
_LOCAL_BASE: Final = 10_000.0
_DELTA_PATTERN: Final = 4
"""Every fourth layer of Qwen3.5 has attention, unless a model says otherwise."""
_DELTA_TURNED: Final = 0.25
"""Part of a head that is rotated in its attention, likewise."""
_OSS_LIMIT: Final = 7.0
_OSS_ALPHA: Final = 1.702
_GRANITE: Final = "granitehybrid"
_NEMOTRON: Final = "nemotron_h", "nemotron_h_moe"
_MAMBA: Final = _GRANITE, *_NEMOTRON
_GRANITE_FACTORS: Final = "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"
_LEAST_FACTOR: Final = 1e-4
_MOST_FACTOR: Final = 1e4
_MOST_LAYERS: Final = 1 << 10
_MOST_WIDTH: Final = 1 << 17
_MOST_DELTA: Final = 1 << 10
_MOST_CONTEXT: Final = 1 << 22
"""Bounds of a GGUF's numbers, by which memory is taken: widths are those of hidden states, heads, a head's numbers and
feed-forward layers; a head of a recurrent layer has a matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What the name of an architecture says.

    Attributes:
        whole_every: In a GGUF, every layer of this number sees the whole sequence, the others a window; 0 if all
            layers have a window, None if no layer has.
        local_base: Whether layers with a window have a rotary embedding of their own.
        delta: Whether layers have a gated delta rule, apart from some with gated attention.
        experts: Whether layers have experts; None if they may.
        apart: Whether a layer has either a mixer or a feed-forward part.
        neighbours, sandwich, feed_norm, output_norm, activation: As in `Geometry`.
    """

    whole_every: int | None = None
    local_base: bool = False
    heads_normalized: bool = False
    delta: bool = False
    experts: bool | None = False
    apart: bool = False
    neighbours: bool = False
    sandwich: bool = False
    scaled_embedding: bool = False
    feed_norm: str = "ffn_norm"
    output_norm: str = "output_norm"
    activation: Activation = Activation.SILU


_FAMILIES: Final = {
    "llama": _Family(neighbours=True, experts=None),  # in a GGUF also Mistral and Mixtral
    "mistral": _Family(),
    "mixtral": _Family(experts=True),
    "qwen2": _Family(),
    "qwen3": _Family(heads_normalized=True),
    "qwen2moe": _Family(experts=True),
    "qwen3moe": _Family(heads_normalized=True, experts=True),
    "smollm3": _Family(neighbours=True),
    "phi3": _Family(whole_every=0),
    "gemma2": _Family(whole_every=2, sandwich=True, scaled_embedding=True, activation=Activation.GELU),
    "gemma3": _Family(
        whole_every=6,
        local_base=True,
        heads_normalized=True,
        sandwich=True,
        scaled_embedding=True,
        activation=Activation.GELU,
    ),
    "gemma4": _Family(
        whole_every=6,
        local_base=True,
        heads_normalized=True,
        experts=None,
        sandwich=True,
        scaled_embedding=True,
        activation=Activation.GELU,
    ),
    "qwen35": _Family(heads_normalized=True, delta=True, feed_norm="post_attention_norm"),
    "qwen35moe": _Family(heads_normalized=True, delta=True, experts=True, feed_norm="post_attention_norm"),
    "qwen3next": _Family(heads_normalized=True, delta=True, experts=True, feed_norm="post_attention_norm"),
    _GRANITE: _Family(neighbours=True, experts=None),
    **dict.fromkeys(
        _NEMOTRON, _Family(apart=True, experts=None, feed_norm="attn_norm", activation=Activation.SQUARED)
    ),
    "lfm2": _Family(heads_normalized=True, output_norm="token_embd_norm"),
    "gpt-oss": _Family(
        whole_every=2, experts=True, feed_norm="post_attention_norm", activation=Activation.CLAMPED
    ),
}  # fmt: skip

ARCHITECTURES: Final = tuple(_FAMILIES)

_OF_CONFIG: Final = {
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "granitemoehybrid": _GRANITE,
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
    "qwen3_next": "qwen3next",
}
"""Names of architectures in a config.json that differ from those in a GGUF."""

_NEMOTRON_NAMES: Final = {
    "hybrid_override_pattern": "layer_types",
    "layers_block_type": "layer_types",
    "layer_norm_epsilon": "rms_norm_eps",
    "mlp_hidden_act": "hidden_act",
    "n_groups": "mamba_n_groups",
    "mamba_num_heads": "mamba_n_heads",
    "mamba_head_dim": "mamba_d_head",
    "ssm_state_size": "mamba_d_state",
    "conv_kernel": "mamba_d_conv",
    "use_conv_bias": "mamba_conv_bias",
    "n_routed_experts": "num_local_experts",
    "moe_shared_expert_intermediate_size": "shared_intermediate_size",
}
"""What a config.json of Nemotron-H calls by other names than that of Granite does."""
_NEMOTRON_LAYERS: Final = {"M": _LINEAR, "mamba": _LINEAR, "-": "mlp", "E": "moe"}
"""Other names of the layers of Nemotron-H that have no attention."""


def refusal(kind: str, reason: str = "") -> UnsupportedModel:
    """Return the error that refuses a model by the name of its architecture."""
    if kind in RUNNING_STATE and kind not in _FAMILIES:
        return running_state(kind, "blocks")
    because = reason or f"it serves {', '.join(ARCHITECTURES)}"
    return UnsupportedModel(
        f"The engine blocks cannot serve this {kind} model, because {because}; set engine to auto and target to a "
        "GGUF of it."
    )


def of_gguf(get: Callable[..., Any], vector: _Vector, has: Callable[[str], bool]) -> Geometry:
    """Return the geometry of a GGUF.

    `get(key, default)` reads its metadata, `vector(name)` a small tensor; `has(name)`: there is such a tensor.

    Raises `UnsupportedModel` for architectures that are not served, KeyError where metadata is missing.
    """
    kind = str(get("general.architecture"))
    family = _FAMILIES.get(kind)
    if family is None:
        raise refusal(kind)

    def of(key: str, *default: Any) -> Any:
        return get(f"{kind}.{key}", *default)

    drafting, hidden = int(of("nextn_predict_layers", 0)), int(of("embedding_length"))
    count = int(of("block_count")) - drafting  # the layers that propose tokens come last
    if not 0 <= drafting <= _MOST_LAYERS or not 0 < count <= _MOST_LAYERS or not 0 < hidden <= _MOST_WIDTH:
        raise ValueError("It has an impossible number of layers.")

    def each(key: str, *default: Any) -> list[int]:
        """Return a number by layer; a GGUF has one for all, or a list."""
        found = of(key, *default)
        numbers = [int(one) for one in found] if isinstance(found, list) else [int(found)] * (count + drafting)
        if len(numbers) != count + drafting:
            raise ValueError("It has numbers for another number of layers.")
        return numbers[:count]

    heads = each("attention.head_count")
    kv_heads = each("attention.head_count_kv", heads)
    sliding = _sliding(count, family.whole_every)
    if kind == "gemma4":
        sliding = [bool(one) for one in each("attention.sliding_window_pattern", sliding)]
    dim = int(of("attention.key_length", hidden // max(heads[0], 1)))
    local_dim = int(of("attention.key_length_swa", dim))
    if any(int(of(f"attention.value_length{end}", same)) != same for end, same in (("", dim), ("_swa", local_dim))):
        raise refusal(kind, "its keys and values differ in size")
    experts = _experts_of_gguf(kind, family, of)
    lengths = each("feed_forward_length") if experts is None or experts.scaled or family.apart else [0] * count
    (whole, local), context = _ropes_of_gguf(kind, family, (dim, local_dim), of, vector)
    skipped = _SMOLLM3_PATTERN if kind == "smollm3" else count + 1
    if kind in _MAMBA and not (kind == _GRANITE and of("rope.scaling.finetuned", True)):  # noqa: FBT003 - a default
        skipped = 1  # all
    large = count == {"gemma2": _GEMMA2_27B_LAYERS, "gemma3": _GEMMA3_27B_LAYERS}.get(kind)
    caps = GEMMA2_CAPS if kind == "gemma2" else {}
    window = int(of("attention.sliding_window", 0)) if family.whole_every is not None else 0
    sources = _sources(sliding, int(of("attention.shared_kv_layers", 0)))
    has_attention = kv_heads
    if family.delta:
        every = int(of("full_attention_interval", _DELTA_PATTERN))
        recurrent = each("attention.recurrent_layers", [(number + 1) % every for number in range(count + drafting)])
        has_attention = [not its for its in recurrent]
    other = _other_mixer_of_gguf(kind, family, of)
    layers = [
        Layer(
            mixer=other
            if other is not None and not has_attention[number]
            else Attention(
                heads=heads[number],
                kv_heads=kv_heads[number],
                dim=local_dim if is_local else dim,
                scale=1.0 if kind == "gemma4" else (hidden // heads[number] if large else dim) ** -0.5,
                rope=None if (number + 1) % skipped == 0 else local if is_local else whole,
                window=window if is_local else 0,
                cap=float(of("attn_logit_softcapping", caps.get("attn", 0.0))),
                source=sources[number],
                heads_normalized=family.heads_normalized,
                values_normalized=kind == "gemma4",
                has_values=kind != "gemma4" or has(f"blk.{number}.attn_v.weight"),
                has_sinks=kind == "gpt-oss",
                is_gated=family.delta,
            ),
            inner=lengths[number],
            experts=experts,
        )
        for number, is_local in enumerate(sliding)
    ]
    layers = _apart(layers, lengths) if family.apart else layers
    proposes = family.delta and drafting == 1 and has(f"blk.{count}.nextn.eh_proj.weight")
    return _checked(
        Geometry(
            kind=kind,
            layers=tuple(layers),
            hidden=hidden,
            rows=len(get("tokenizer.ggml.tokens")),
            context=context,
            eps=_eps_of_gguf(of),
            end_tokens=_ids([get("tokenizer.ggml.eos_token_id", None), get("tokenizer.ggml.eot_token_id", None)]),
            activation=family.activation,
            embedding_scale=hidden**0.5 if family.scaled_embedding else 1.0,
            cap=float(of("final_logit_softcapping", caps.get("final", 0.0))),
            neighbours=family.neighbours,
            sandwich=family.sandwich,
            feed_norm=family.feed_norm,
            output_norm=family.output_norm,
            per_layer=int(of("embedding_length_per_layer_input", 0)),
            # It is like the model's own layers of attention.
            mtp=next((each for each in reversed(layers) if proposes and isinstance(each.mixer, Attention)), None),
        ),
        _granite_factors(of, dim) if kind == _GRANITE else (),
    )


def _eps_of_gguf(of: Callable[..., Any]) -> float:
    return float(of("attention.layer_norm_rms_epsilon", None) or of("attention.layer_norm_epsilon"))


def _apart(layers: Sequence[Layer], lengths: Sequence[int]) -> list[Layer]:
    """Return layers without their mixer where the length of a feed-forward part is not 0, and only with it elsewhere.

    A length says where experts are, and not how wide they are.
    """
    return [
        replace(layer, mixer=None, inner=0 if layer.experts else length)
        if length
        else replace(layer, inner=0, experts=None)
        for layer, length in zip(layers, lengths, strict=True)
    ]


def _granite_factors(of: Callable[..., Any], dim: int) -> list[float]:
    """Return the factors of `_with_factors`; a GGUF says 0 or nothing where one is usual."""
    names = "attention.scale", "embedding_scale", "residual_scale", "logit_scale"
    usual = dim**-0.5, 1.0, 1.0, 1.0
    return [float(of(name, 0.0) or each) for name, each in zip(names, usual, strict=True)]


def _checked(its: Geometry, factors: Sequence[float] = ()) -> Geometry:
    """Return a geometry whose sizes are possible, with Granite's factors if there are any; raises ValueError."""
    if factors:
        its = _with_factors(its, *factors)
    for layer in its.layers:
        mixer = layer.mixer
        if isinstance(mixer, Recurrence):
            widths = [mixer.key_heads, mixer.value_heads, mixer.kernel, mixer.channels]
            widths += [size * _MOST_WIDTH // _MOST_DELTA for size in (mixer.key_dim, mixer.value_dim)]
        elif mixer is None:
            widths = []
        else:
            widths = [mixer.kernel] if isinstance(mixer, Convolution) else [mixer.heads, mixer.kv_heads, mixer.dim]
        widths += [layer.inner] if layer.inner or not (layer.experts or _FAMILIES[its.kind].apart) else []
        if layer.experts is not None:
            widths += _experts_checked(layer.experts)
        uneven = isinstance(mixer, Attention) and mixer.kv_heads and mixer.heads % mixer.kv_heads
        uneven = uneven or (isinstance(mixer, Recurrence) and mixer.key_heads and mixer.value_heads % mixer.key_heads)
        if uneven or not all(0 < each <= _MOST_WIDTH for each in widths):
            raise ValueError("Its layers have impossible sizes.")
    if not 0 <= its.per_layer <= _MOST_WIDTH:
        raise ValueError("Its embeddings by layer have an impossible size.")
    if not its.pools:
        raise refusal(its.kind, "none of its layers has attention")
    return its


def _experts_checked(its: Experts) -> list[int]:
    """Return the widths of experts whose numbers are possible; raises ValueError."""
    count = its.count
    if its.groups:
        size, left = divmod(count, its.groups)
        if left or size == 1 or not 0 < its.used_groups <= its.groups:
            raise ValueError("Its groups of experts are impossible.")
        count = size * its.used_groups
    if not 0 < its.used <= count:
        raise ValueError("It uses an impossible number of experts.")
    if not _LEAST_FACTOR <= its.factor <= _MOST_FACTOR:
        raise ValueError("The factor of its experts is impossible.")
    return [its.count, its.inner, its.latent or 1, its.shared if its.groups else 1]


def _with_factors(its: Geometry, scores: float, embedding: float, added: float, logits: float) -> Geometry:
    """Return a Granite with its factors: of scores, of embeddings, of what a layer adds, and the divisor of logits.

    Instead of multiplying what is added, what it is added to is divided: norms remove that, with an epsilon to match.
    """
    if not all(_LEAST_FACTOR <= each <= _MOST_FACTOR for each in (scores, embedding, added, logits)):
        raise ValueError("Its factors are impossible.")
    layers = [
        replace(layer, mixer=replace(layer.mixer, scale=scores)) if isinstance(layer.mixer, Attention) else layer
        for layer in its.layers
    ]
    return replace(
        its, layers=tuple(layers), embedding_scale=embedding / added, eps=its.eps / added**2, logit_scale=1 / logits
    )


def _sliding(count: int, whole_every: int | None) -> list[bool]:
    """Return by layer whether it has a window."""
    if not whole_every:
        return [whole_every == 0] * count
    return [(number + 1) % whole_every != 0 for number in range(count)]


def _sources(sliding: Sequence[bool], shared: int) -> list[int | None]:
    """Return by layer where its keys and values are: the last `shared` layers read those of the last of their kind."""
    first = len(sliding) - shared
    if not 0 < first <= len(sliding):
        raise ValueError("All of its layers share keys and values.")
    return [
        None if number < first else max(other for other in range(first) if sliding[other] == mine)
        for number, mine in enumerate(sliding)
    ]


def _other_mixer_of_gguf(kind: str, family: _Family, of: Callable[..., Any]) -> Mixer | None:
    """Return the mixer of layers without attention, or None if all have attention."""
    if kind == "lfm2":
        return Convolution(width=int(of("embedding_length")), kernel=int(of("shortconv.l_cache")))
    if not family.delta and kind not in _MAMBA:
        return None
    value_heads = int(of("ssm.time_step_rank"))
    value_dim, left = divmod(int(of("ssm.inner_size")), value_heads)
    if left:
        raise ValueError("Its heads of values have an impossible size.")
    return Recurrence(
        is_mamba=kind in _MAMBA,
        key_heads=int(of("ssm.group_count")),
        value_heads=value_heads,
        key_dim=int(of("ssm.state_size")),
        value_dim=value_dim,
        kernel=int(of("ssm.conv_kernel")),
        eps=_eps_of_gguf(of),
        in_turn=kind in ("qwen35", "qwen35moe"),
    )


def _experts_of_gguf(kind: str, family: _Family, of: Callable[..., Any]) -> Experts | None:
    count = int(of("expert_count", 0))
    if family.experts is not None and family.experts != (count > 0):
        raise refusal(kind, f"it has {count} experts")
    if not count:
        return None
    inner = int(of("feed_forward_length" if kind in ("llama", _GRANITE) else "expert_feed_forward_length"))
    found = Experts(
        count=count,
        used=int(of("expert_used_count")),
        inner=inner,
        normalized=kind != "qwen2moe",
        shared=int(of("expert_shared_feed_forward_length", 0)),
        shared_gated=kind not in _MAMBA,
        has_biases=kind == "gpt-oss",
        scaled=kind == "gemma4",
    )
    if kind not in _NEMOTRON:
        return found
    groups = int(of("expert_group_count", 0)) or 1
    return replace(
        found,
        normalized=bool(of("expert_weights_norm", 0)),
        groups=groups,
        used_groups=int(of("expert_group_used_count", 0)) if groups > 1 else 1,
        factor=float(of("expert_weights_scale", 0.0) or 1.0),
        latent=int(of("moe_latent_size", 0)),
    )


def _ropes_of_gguf(
    kind: str, family: _Family, dims: tuple[int, int], of: Callable[..., Any], vector: _Vector
) -> tuple[tuple[Rope, Rope], int]:
    """Return the rotary embeddings of layers without and with a window, and the longest sequence that they serve."""
    context, original = int(of("context_length")), int(of("rope.scaling.original_context_length", 0))
    widths = [
        int(of(f"rope.dimension_count{end}", other)) for end, other in (("", dims[0]), ("_swa", dims[1]))
    ] if kind == "gemma4" else [int(of("rope.dimension_count", dims[0]))] * 2  # fmt: skip
    if any(not 0 < width <= dim for width, dim in zip(widths, dims, strict=True)) or not 0 < context <= _MOST_CONTEXT:
        raise ValueError("Its rotary embedding has an impossible size.")
    scaling: dict[str, Any] = {
        "rope_type": str(of("rope.scaling.type", "none")),
        "factor": float(of("rope.scaling.factor", 1.0)),
        "original_max_position_embeddings": original or context,
        "truncate": kind != "gpt-oss",  # a GGUF does not say it
    }
    short, factors = vector("rope_factors_short.weight"), vector("rope_freqs.weight")
    if short is not None:
        scaling |= {
            "rope_type": "longrope",
            "short_factor": short,
            "attention_factor": of("rope.scaling.attn_factor", 1),
        }
        context = min(context, original or context)
    whole = _rope(kind, float(of("rope.freq_base", 10_000.0)), widths[0], scaling)
    if factors is not None:
        whole = Rope(whole.frequencies / factors, whole.scale)
    if whole.frequencies.shape != (-(-widths[0] // 2),):
        raise ValueError("The factors of its rotary embedding have another size.")
    local = _rope(kind, float(of("rope.freq_base_swa", _LOCAL_BASE)), widths[1], {}) if family.local_base else whole
    return (whole, local), context


def of_config(config: Mapping[str, Any], generation: Mapping[str, Any]) -> Geometry:
    """Return the geometry of a config.json; `generation` is the generation_config.json, which names end tokens.

    Raises `UnsupportedModel` for architectures that are not served, KeyError where a value is missing.
    """
    outer, config = config, config.get("text_config", config)
    kind = str(config["model_type"])
    kind = _OF_CONFIG.get(kind, kind)
    family = _FAMILIES.get(kind)
    if family is None:
        raise refusal(kind)
    if kind in _NEMOTRON:
        config = _of_nemotron(config)
    _check_config(kind, family, config)
    count, hidden, heads = (int(config[name]) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    dim = int(config.get("head_dim") or hidden // heads)
    windows = _windows(kind, family, config, count)
    whole_dim, whole_kv_heads = _whole_heads(config) if kind == "gemma4" else (dim, kv_heads)
    (whole, local), limit = _ropes_of_config(kind, family, config, (whole_dim, dim))
    without = _without_rope(kind, config, count)
    shared = int(config.get("num_kv_shared_layers") or 0)
    sources = _sources([bool(window) for window in windows], shared)
    kinds = config.get("layer_types") or ()
    has_experts = family.experts or config.get("enable_moe_block") or "moe" in kinds
    if kind == _GRANITE:
        has_experts = config["num_local_experts"]
    experts = _experts_of_config(kind, config) if has_experts else None
    inner = _inner_of_config(kind, config) if experts is None or experts.scaled else 0
    others = _other_mixers(kind, family, config, count)
    scale = 1.0 if kind == "gemma4" else float(config.get("query_pre_attn_scalar") or dim) ** -0.5
    layers = [
        Layer(
            mixer=others.get(number)
            or Attention(
                heads=heads,
                kv_heads=(kv_heads if window else whole_kv_heads),
                dim=dim if window else whole_dim,
                scale=scale,
                rope=None if number in without else local if window else whole,
                window=window,
                cap=float(config.get("attn_logit_softcapping") or 0.0),
                source=sources[number],
                heads_normalized=family.heads_normalized,
                values_normalized=kind == "gemma4",
                has_values=bool(window) or not config.get("attention_k_eq_v"),
                has_sinks=kind == "gpt-oss",
                is_gated=family.delta,
            ),
            inner=inner * (2 if sources[number] is not None and config.get("use_double_wide_mlp") else 1),
            experts=experts,
        )
        for number, window in enumerate(windows)
    ]
    layers = _apart(layers, [inner or 1 if each in ("mlp", "moe") else 0 for each in kinds]) if family.apart else layers
    context = int(config["max_position_embeddings"])
    return _checked(
        Geometry(
            kind=kind,
            layers=tuple(layers),
            hidden=hidden,
            rows=int(config["vocab_size"]),
            context=min(context, limit or context),
            eps=float(config.get("rms_norm_eps") or config.get("norm_eps") or 1e-6),
            end_tokens=next(
                (ends for each in (generation, outer, config) if (ends := _ids([each.get("eos_token_id")]))), ()
            ),
            activation=family.activation,
            embedding_scale=hidden**0.5 if family.scaled_embedding else 1.0,
            cap=float(config.get("final_logit_softcapping") or 0.0),
            sandwich=family.sandwich,
            feed_norm=family.feed_norm,
            output_norm=family.output_norm,
            per_layer=int(config.get("hidden_size_per_layer_input") or 0),
        ),
        [float(config.get(name) or 1.0) for name in _GRANITE_FACTORS] if kind == _GRANITE else [],
    )


def _of_nemotron(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the names that Granite's has."""
    found = {"rms_norm_eps": 1e-5, "hidden_act": "relu2", **config}
    found |= {new: config[old] for old, new in _NEMOTRON_NAMES.items() if config.get(old) is not None}
    found["layer_types"] = [_NEMOTRON_LAYERS.get(each, each) for each in found["layer_types"]]
    return found | {"num_hidden_layers": len(found["layer_types"])}


def _other_mixers(kind: str, family: _Family, config: Mapping[str, Any], count: int) -> dict[int, Mixer]:
    """Return the mixers of layers without attention, by layer."""
    kinds = config.get("layer_types")
    if kind == "lfm2":
        whole = config["full_attn_idxs"] if not kinds else [place for place, each in enumerate(kinds) if each != "conv"]
        convolution = Convolution(width=int(config["hidden_size"]), kernel=int(config["conv_L_cache"]))
        return {number: convolution for number in range(count) if number not in whole}
    if kind in _MAMBA:
        groups, heads, size, kernel = (
            int(config[f"mamba_{name}"]) for name in ("n_groups", "n_heads", "d_state", "d_conv")
        )
        own = kind in _NEMOTRON
        mamba = Recurrence(
            is_mamba=True, key_heads=groups, value_heads=heads, key_dim=size,
            value_dim=int(config["mamba_d_head"] if own else config["mamba_expand"] * config["hidden_size"] // heads),
            kernel=kernel, eps=float(config["rms_norm_eps"]),
        )  # fmt: skip
        return {number: mamba for number, each in enumerate(config["layer_types"]) if each in ("mamba", _LINEAR)}
    if not family.delta:
        return {}
    every = int(config.get("full_attention_interval") or _DELTA_PATTERN)
    kinds = kinds or [_LINEAR if (number + 1) % every else "" for number in range(count)]
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    key_heads, value_heads, key_dim, value_dim, kernel = (int(config[f"linear_{name}"]) for name in names)
    delta = Recurrence(
        is_mamba=False, key_heads=key_heads, value_heads=value_heads, key_dim=key_dim, value_dim=value_dim,
        kernel=kernel, eps=float(config.get("rms_norm_eps") or 1e-6),
    )  # fmt: skip
    return {number: delta for number, each in enumerate(kinds) if each == _LINEAR}


def _check_config(kind: str, family: _Family, config: Mapping[str, Any]) -> None:
    """Refuse what a config asks for and the engine has not."""
    gelu = family.activation is Activation.GELU
    wanted = {Activation.GELU: "gelu_pytorch_tanh", Activation.SQUARED: "relu2"}.get(family.activation, "silu")
    activation = config.get("hidden_activation", wanted) if gelu else config.get("hidden_act", wanted)
    if activation != wanted:
        raise refusal(kind, f"it uses {activation} as activation")
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise refusal(kind, "some of its layers have no experts")
    if config.get("conv_bias"):
        raise refusal(kind, "its convolutions have biases")
    if kind == "qwen3next":
        raise refusal(kind, "a folder has the projections of its states in another order")
    if kind in _MAMBA:
        _check_mamba(kind, config)
    shortest, longest = config.get("time_step_limit") or (0.0, math.inf)
    if shortest or (isinstance(longest, int | float) and math.isfinite(longest)):
        raise refusal(kind, "it limits its time steps")
    if config.get("use_bidirectional_attention") == "all":
        raise refusal(kind, "its tokens see those that follow")
    limits = config.get("swiglu_limit", _OSS_LIMIT), config.get("swiglu_alpha", _OSS_ALPHA)
    if family.activation is Activation.CLAMPED and limits != (_OSS_LIMIT, _OSS_ALPHA):
        raise refusal(kind, f"it limits its activations to {limits[0]}")
    if family.sandwich and kind != "gemma2" and config.get("attn_logit_softcapping"):
        raise refusal(kind, "it caps its scores")


def _check_mamba(kind: str, config: Mapping[str, Any]) -> None:
    if config.get("mamba_hidden_act", "silu") != "silu":
        raise refusal(kind, f"it uses {config['mamba_hidden_act']} as activation")
    if {"mlp", "moe"} <= set(config["layer_types"]):
        raise refusal(kind, "some of its layers have no experts")
    if not config.get("mamba_conv_bias", True):
        raise refusal(kind, "its convolutions have no biases")


def _inner_of_config(kind: str, config: Mapping[str, Any]) -> int:
    if kind != "lfm2":
        return int(config["shared_intermediate_size" if kind == _GRANITE else "intermediate_size"])
    inner = int(config.get("block_ff_dim") or config["intermediate_size"])
    if config.get("block_auto_adjust_ff_dim", True):
        multiple = int(config.get("block_multiple_of", 256))
        inner = int(float(config.get("block_ffn_dim_multiplier") or 1.0) * int(2 * inner / 3))
        inner = -(-inner // multiple) * multiple
    return inner


def _whole_heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the size of a head of Gemma 4's layers without a window, and their number of key and value heads."""
    found = {"head_dim": config.get("global_head_dim") or 512, **config}
    found["num_key_value_heads"] = (
        config.get("attention_k_eq_v") and config.get("num_global_key_value_heads")
    ) or config["num_key_value_heads"]
    found["head_dim"] = config.get("global_head_dim") or 512
    for its in (config.get("per_layer_config") or {}).values():  # transformers writes only what differs
        found |= its
    return int(found["head_dim"]), int(found["num_key_value_heads"])


def _experts_of_config(kind: str, config: Mapping[str, Any]) -> Experts:
    names = ["top_k_experts", "num_experts_per_tok"]
    shared = f"shared_{'' if kind in _MAMBA else 'expert_'}intermediate_size"
    found = Experts(
        count=int(config.get("num_experts") or config["num_local_experts"]),
        used=int(next(config[name] for name in names if config.get(name))),
        inner=int(config.get("moe_intermediate_size") or config["intermediate_size"]),
        normalized=bool(config.get("norm_topk_prob", False)) if kind in ("qwen2moe", "qwen3moe") else True,
        shared=int(config[shared]) if kind in ("qwen2moe", "qwen35moe", *_MAMBA) else 0,
        shared_gated=kind not in _MAMBA,
        has_biases=kind == "gpt-oss",
        scaled=kind == "gemma4",
    )
    if kind not in _NEMOTRON:
        return found
    return replace(
        found,
        normalized=bool(config.get("norm_topk_prob", True)),
        groups=int(config.get("n_group", 1)),
        used_groups=int(config.get("topk_group", 1)),
        factor=float(config.get("routed_scaling_factor", 1.0)),
        latent=int(config.get("moe_latent_size") or 0),
    )


def _ids(found: Sequence[Any]) -> tuple[int, ...]:
    flat = [each for part in found if part is not None for each in (part if isinstance(part, list | tuple) else [part])]
    return tuple(sorted({int(each) for each in flat}))


def _windows(kind: str, family: _Family, config: Mapping[str, Any], layers: int) -> list[int]:
    window = int(config.get("sliding_window") or 0)
    kinds = config.get("layer_types")
    if kinds is not None:
        sliding = [each == _SLIDING for each in kinds]
    elif kind in ("qwen2", "qwen3", "smollm3", "qwen2moe", "qwen3moe"):
        first = int(config.get("max_window_layers", 0)) if config.get("use_sliding_window") else layers
        sliding = [layer >= first for layer in range(layers)]
    else:
        every = 0 if kind in ("mistral", "mixtral") else family.whole_every
        sliding = _sliding(layers, int(config.get("sliding_window_pattern", every)) if every else every)
    return [window if each else 0 for each in sliding]


def _ropes_of_config(
    kind: str, family: _Family, config: Mapping[str, Any], dims: tuple[int, int]
) -> tuple[tuple[Rope, Rope], int]:
    """Return the rotary embeddings of layers without and with a window, and the longest sequence that they serve.

    0 stands for any length. `dims` are the sizes of the heads of such layers.
    """
    given = config.get("rope_parameters")
    base = float(config.get("rope_theta", 1e6 if family.local_base else 10_000.0))
    if given is None and kind == "gemma4":
        given = {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": base},
            _SLIDING: {"rope_theta": _LOCAL_BASE},
        }
    if given is None:
        whole = {"rope_theta": base, **(config.get("rope_scaling") or {})}
        local = {"rope_theta": float(config.get("rope_local_base_freq", _LOCAL_BASE))} if family.local_base else whole
    elif "rope_type" in given or "rope_theta" in given:
        whole = local = given
    else:
        whole, local = given["full_attention"], given[_SLIDING]
    original = whole.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    made = []
    for its, dim in zip((whole, local), dims, strict=True):
        usual = _DELTA_TURNED if family.delta else 1.0
        part = float(its.get("partial_rotary_factor") or config.get("partial_rotary_factor") or usual)
        scaling = {**its, "original_max_position_embeddings": original or config["max_position_embeddings"]}
        name = scaling.get("rope_type", scaling.get("type"))
        if name in ("longrope", "su") and original:
            scaling["factor"] = config["max_position_embeddings"] / original
        width = dim if name == "proportional" else int(dim * part)
        made.append(_rope(kind, float(its.get("rope_theta", base)), width, scaling))
    changing = str(whole.get("rope_type", whole.get("type"))) in ("longrope", "su", "dynamic")
    same = whole is local and dims[0] == dims[1]
    return (made[0], made[0] if same else made[1]), int(original or 0) if changing else 0


def _without_rope(kind: str, config: Mapping[str, Any], layers: int) -> set[int]:
    if kind in _MAMBA and config.get("position_embedding_type") != "rope":
        return set(range(layers))
    if kind != "smollm3":
        return set()
    uses = config.get("no_rope_layers")  # 1 where a layer has one, whatever the name says
    if uses is None:
        step = int(config.get("no_rope_layer_interval", _SMOLLM3_PATTERN))
        uses = [(layer + 1) % step for layer in range(layers)]
    return {layer for layer, use in enumerate(uses) if not use}


def _rope(kind: str, base: float, width: int, scaling: Mapping[str, Any]) -> Rope:
    found = rope(base, width, scaling)
    if found is None:
        raise refusal(kind, f"its rotary embedding is scaled by {scaling.get('rope_type', scaling.get('type'))}")
    return found

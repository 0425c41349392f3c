"""Architectures: the shape and the constants of a model, from the metadata of a GGUF or from a config.json."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fleet_edge.verifiers.contract import RUNNING_STATE, UnsupportedModel, running_state

ARCHITECTURES: Final = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma3", "qwen3moe")

_OF_CONFIG: Final = {"gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"}
"""Names of architectures in a config.json that differ from those in a GGUF."""

_SLIDING: Final = "sliding_attention"
_GEMMA_PATTERN: Final = 6
"""Every sixth layer of Gemma 3 sees the whole sequence."""
_GEMMA_27B_LAYERS: Final = 62
_SMOLLM3_PATTERN: Final = 4
"""Every fourth layer of SmolLM3 has no rotary embedding."""
_LOCAL_BASE: Final = 10_000.0
_MOST_LAYERS: Final = 1 << 10
_MOST_WIDTH: Final = 1 << 17
_MOST_CONTEXT: Final = 1 << 22
"""Bounds of a GGUF's numbers, by which memory is taken: widths are those of hidden states, heads, a head's numbers and
feed-forward layers."""

_NORMALIZED_HEADS: Final = ("qwen3", "qwen3moe", "gemma3")
"""Architectures that normalize the queries and keys of each head."""


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """Rotary embedding: the angle per position of each pair of numbers, and a factor of cosines and sines."""

    frequencies: npt.NDArray[np.float64]
    scale: float = 1.0


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Geometry:
    """Shape and constants of a model.

    Attributes:
        inner: Width of the feed-forward layers, or of an expert.
        rows: Size of the vocabulary, padding included.
        windows: By layer, the number of tokens that a token sees; 0 is all.
        ropes: By layer, its rotary embedding; None if it has none.
        neighbours: Whether rows of queries and keys lie such that neighbours are rotated together, as a GGUF of Llama
            has them, and not the first with the second half of a head.
        experts: Number of experts of each layer; 0 if there are none.
    """

    kind: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    rows: int
    context: int
    eps: float
    windows: tuple[int, ...]
    ropes: tuple[Rope | None, ...]
    end_tokens: tuple[int, ...]
    attention_scale: float
    embedding_scale: float = 1.0
    gelu: bool = False
    neighbours: bool = False
    experts: int = 0
    experts_used: int = 0
    experts_normalized: bool = True


def refusal(kind: str, reason: str = "") -> UnsupportedModel:
    """Return the error that refuses a model by the name of its architecture."""
    if kind in RUNNING_STATE:
        return running_state(kind, "blocks")
    because = reason or f"it serves {', '.join(ARCHITECTURES)}"
    return UnsupportedModel(
        f"The engine blocks cannot serve this {kind} model, because {because}; set engine to llama.cpp and target to a "
        "GGUF of it, or set engine to torch."
    )


def of_gguf(get: Callable[..., Any], vector: Callable[[str], npt.NDArray[np.float32] | None]) -> Geometry:
    """Return the geometry of a GGUF; `get(key, default)` reads its metadata, `vector(name)` a small tensor.

    Raises `UnsupportedModel` for architectures that are not served, KeyError where metadata is missing.
    """
    kind = str(get("general.architecture"))
    if kind not in ARCHITECTURES:
        raise refusal(kind)

    def of(key: str, *default: Any) -> Any:
        return get(f"{kind}.{key}", *default)

    experts, layers, hidden = (int(of(key, 0)) for key in ("expert_count", "block_count", "embedding_length"))
    heads = of("attention.head_count")
    kv_heads = of("attention.head_count_kv", heads)
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise refusal(kind, "its layers differ in their number of heads")
    head_dim = int(of("attention.key_length", hidden // heads))
    inner = int(of("expert_feed_forward_length") if experts else of("feed_forward_length"))
    used = int(of("expert_used_count", 0))
    widths = (hidden, heads, kv_heads, head_dim, inner)
    if not 0 < layers <= _MOST_LAYERS or not all(0 < each <= _MOST_WIDTH for each in widths) or heads % kv_heads:
        raise ValueError("Its layers have impossible sizes.")
    if experts and not 0 < used <= experts:
        raise ValueError("It uses an impossible number of experts.")
    if int(of("attention.value_length", head_dim)) != head_dim:
        raise refusal(kind, "its keys and values differ in size")
    if (experts > 0) != (kind == "qwen3moe"):
        raise refusal(kind, f"it has {experts} experts")
    ropes, windows, context = _layers_of_gguf(kind, layers, head_dim, of, vector)
    large_gemma = kind == "gemma3" and layers == _GEMMA_27B_LAYERS
    return Geometry(
        kind=kind,
        layers=layers,
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rows=len(get("tokenizer.ggml.tokens")),
        context=context,
        eps=float(of("attention.layer_norm_rms_epsilon")),
        windows=tuple(windows),
        ropes=tuple(ropes),
        end_tokens=_ids([get("tokenizer.ggml.eos_token_id", None), get("tokenizer.ggml.eot_token_id", None)]),
        attention_scale=(hidden // heads if large_gemma else head_dim) ** -0.5,
        embedding_scale=hidden**0.5 if kind == "gemma3" else 1.0,
        gelu=kind == "gemma3",
        neighbours=kind in ("llama", "smollm3"),
        experts=experts,
        experts_used=used,
    )


def _layers_of_gguf(
    kind: str,
    layers: int,
    head_dim: int,
    of: Callable[..., Any],
    vector: Callable[[str], npt.NDArray[np.float32] | None],
) -> tuple[list[Rope | None], list[int], int]:
    """Return rotary embeddings and windows by layer, and the longest sequence for which they are constant."""
    context, original = int(of("context_length")), int(of("rope.scaling.original_context_length", 0))
    width, base = int(of("rope.dimension_count", head_dim)), float(of("rope.freq_base", 10_000.0))
    if not 0 < width <= head_dim or not 0 < context <= _MOST_CONTEXT:
        raise ValueError("Its rotary embedding has an impossible size.")
    scaling: dict[str, Any] = {
        "rope_type": str(of("rope.scaling.type", "none")),
        "factor": float(of("rope.scaling.factor", 1.0)),
        "original_max_position_embeddings": original or context,
    }
    short, factors = vector("rope_factors_short.weight"), vector("rope_freqs.weight")
    if short is not None:
        scaling |= {
            "rope_type": "longrope",
            "short_factor": short,
            "attention_factor": of("rope.scaling.attn_factor", 1),
        }
        context = min(context, original or context)
    rope = _rope(kind, base, width, scaling)
    if factors is not None:
        rope = Rope(rope.frequencies / factors, rope.scale)
    if rope.frequencies.shape != (-(-width // 2),):
        raise ValueError("The factors of its rotary embedding have another size.")
    window = int(of("attention.sliding_window", 0)) if kind in ("gemma3", "phi3") else 0
    if kind == "gemma3":
        local = _rope(kind, float(of("rope.freq_base_swa", _LOCAL_BASE)), width, {})
        whole = [(layer + 1) % _GEMMA_PATTERN == 0 for layer in range(layers)]
        return [rope if each else local for each in whole], [0 if each else window for each in whole], context
    skipped = _SMOLLM3_PATTERN if kind == "smollm3" else layers + 1
    return [None if (layer + 1) % skipped == 0 else rope for layer in range(layers)], [window] * layers, context


def unfit_tensor(its: Geometry, shape: Callable[[str], tuple[int, ...] | None]) -> str | None:
    """Return the name of a tensor that is missing, or has not the shape that the geometry demands; None if all fit.

    `shape(name)` returns the shape of a tensor by its name in a GGUF, None if there is none.
    """
    expected: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (its.rows, its.hidden),
        "output_norm.weight": (its.hidden,),
    }
    if shape("output.weight") is not None:
        expected["output.weight"] = (its.rows, its.hidden)
    for number in range(its.layers):
        at = f"blk.{number}."
        names = [name for name in _OPTIONAL if shape(f"{at}{name}.weight") is not None]
        vectors, products = _of_layer(its, names)
        expected |= {f"{at}{name}.weight": each for name, each in vectors.items()}
        for together in products:
            expected |= {f"{at}{name}.weight": each for name, each in together.items()}
            if any(shape(f"{at}{name}.bias") is not None for name in together):
                expected |= {f"{at}{name}.bias": each[:1] for name, each in together.items()}
    return next((name for name, each in expected.items() if shape(name) != each), None)


_Shapes = dict[str, tuple[int, ...]]
_OPTIONAL: Final = ("attn_q_norm", "attn_k_norm", "attn_qkv", "ffn_gate")


def _of_layer(its: Geometry, optional: Sequence[str]) -> tuple[_Shapes, list[_Shapes]]:
    """Return the shapes of a layer's vectors and router, and of its products, together those that share their inputs.

    `optional` are the names of `_OPTIONAL` that the layer has.
    """
    vectors: _Shapes = {"attn_norm": (its.hidden,), "ffn_norm": (its.hidden,)}
    if its.kind == "gemma3":
        vectors |= {"post_attention_norm": (its.hidden,), "post_ffw_norm": (its.hidden,)}
    vectors |= {
        name: (its.head_dim,)
        for name in ("attn_q_norm", "attn_k_norm")
        if its.kind in _NORMALIZED_HEADS or name in optional
    }
    queries, keys = its.heads * its.head_dim, its.kv_heads * its.head_dim
    if "attn_qkv" in optional:
        attention: _Shapes = {"attn_qkv": (queries + 2 * keys, its.hidden)}
    else:
        attention = {"attn_q": (queries, its.hidden), "attn_k": (keys, its.hidden), "attn_v": (keys, its.hidden)}
    up, down = (its.inner, its.hidden), (its.hidden, its.inner)
    if its.experts:
        vectors["ffn_gate_inp"] = its.experts, its.hidden
        feed: list[_Shapes] = [
            {"ffn_gate_exps": (its.experts, *up), "ffn_up_exps": (its.experts, *up)},
            {"ffn_down_exps": (its.experts, *down)},
        ]
    elif "ffn_gate" in optional:
        feed = [{"ffn_gate": up, "ffn_up": up}, {"ffn_down": down}]
    else:
        feed = [{"ffn_up": (2 * its.inner, its.hidden)}, {"ffn_down": down}]
    return vectors, [attention, {"attn_output": (its.hidden, queries)}, *feed]


def of_config(config: Mapping[str, Any], generation: Mapping[str, Any]) -> Geometry:
    """Return the geometry of a config.json; `generation` is the generation_config.json, which names end tokens.

    Raises `UnsupportedModel` for architectures that are not served, KeyError where a value is missing.
    """
    outer, config = config, config.get("text_config", config)
    kind = str(config["model_type"])
    kind = _OF_CONFIG.get(kind, kind)
    if kind not in ARCHITECTURES:
        raise refusal(kind)
    gemma = kind == "gemma3"
    wanted = "gelu_pytorch_tanh" if gemma else "silu"
    activation = config.get("hidden_activation", wanted) if gemma else config.get("hidden_act", wanted)
    if activation != wanted:
        raise refusal(kind, f"it uses {activation} as activation")
    if config.get("attn_logit_softcapping") or config.get("final_logit_softcapping"):
        raise refusal(kind, "it caps its logits")
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise refusal(kind, "some of its layers have no experts")
    layers, hidden, heads = (int(config[name]) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    head_dim = int(config.get("head_dim") or hidden // heads)
    context = int(config["max_position_embeddings"])
    windows = _windows(kind, config, layers)
    ropes, limit = _ropes_of_config(kind, config, head_dim, windows)
    return Geometry(
        kind=kind,
        layers=layers,
        hidden=hidden,
        inner=int(config["moe_intermediate_size" if kind == "qwen3moe" else "intermediate_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        rows=int(config["vocab_size"]),
        context=min(context, limit or context),
        eps=float(config.get("rms_norm_eps", 1e-6)),
        windows=windows,
        ropes=ropes,
        end_tokens=next(
            (ends for each in (generation, outer, config) if (ends := _ids([each.get("eos_token_id")]))), ()
        ),
        attention_scale=float(config.get("query_pre_attn_scalar") or head_dim if gemma else head_dim) ** -0.5,
        embedding_scale=hidden**0.5 if gemma else 1.0,
        gelu=gemma,
        experts=int(config.get("num_experts") or config["num_local_experts"]) if kind == "qwen3moe" else 0,
        experts_used=int(config["num_experts_per_tok"]) if kind == "qwen3moe" else 0,
        experts_normalized=bool(config.get("norm_topk_prob", False)),
    )


def _ids(found: Sequence[Any]) -> tuple[int, ...]:
    flat = [each for part in found if part is not None for each in (part if isinstance(part, list | tuple) else [part])]
    return tuple(sorted({int(each) for each in flat}))


def _windows(kind: str, config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    window = int(config.get("sliding_window") or 0)
    kinds = config.get("layer_types")
    if kinds is None and kind == "gemma3":
        pattern = int(config.get("sliding_window_pattern", _GEMMA_PATTERN))
        kinds = [_SLIDING if (layer + 1) % pattern else "full_attention" for layer in range(layers)]
    elif kinds is None and kind in ("qwen2", "qwen3", "smollm3", "qwen3moe"):
        first = int(config.get("max_window_layers", 0)) if config.get("use_sliding_window") else layers
        kinds = [_SLIDING if layer >= first else "full_attention" for layer in range(layers)]
    elif kinds is None:
        kinds = [_SLIDING if kind in ("mistral", "phi3") else "full_attention"] * layers
    return tuple(window if each == _SLIDING else 0 for each in kinds)


def _ropes_of_config(
    kind: str, config: Mapping[str, Any], head_dim: int, windows: Sequence[int]
) -> tuple[tuple[Rope | None, ...], int]:
    """Return the rotary embeddings of the layers, and the longest sequence for which they are constant (0: any)."""
    given = config.get("rope_parameters")
    base = float(config.get("rope_theta", 1e6 if kind == "gemma3" else 10_000.0))
    if given is None:
        whole = {"rope_theta": base, **(config.get("rope_scaling") or {})}
        local = {"rope_theta": float(config.get("rope_local_base_freq", _LOCAL_BASE))} if kind == "gemma3" else whole
    elif "rope_type" in given or "rope_theta" in given:
        whole = local = given
    else:
        whole, local = given["full_attention"], given[_SLIDING]
    original = whole.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    made = []
    for rope in (whole, local):
        part = float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
        scaling = {"original_max_position_embeddings": original or config["max_position_embeddings"], **rope}
        scaling["original_max_position_embeddings"] = original or config["max_position_embeddings"]
        if scaling.get("rope_type", scaling.get("type")) in ("longrope", "su") and original:
            scaling["factor"] = config["max_position_embeddings"] / original
        made.append(_rope(kind, float(rope.get("rope_theta", base)), int(head_dim * part), scaling))
    without = _without_rope(kind, config, len(windows))
    ropes = tuple(
        None if layer in without else made[bool(window) and kind == "gemma3"] for layer, window in enumerate(windows)
    )
    changing = str(whole.get("rope_type", whole.get("type"))) in ("longrope", "su", "dynamic")
    return ropes, int(original or 0) if changing else 0


def _without_rope(kind: str, config: Mapping[str, Any], layers: int) -> set[int]:
    if kind != "smollm3":
        return set()
    uses = config.get("no_rope_layers")  # 1 where a layer has one, whatever the name says
    if uses is None:
        step = int(config.get("no_rope_layer_interval", _SMOLLM3_PATTERN))
        uses = [(layer + 1) % step for layer in range(layers)]
    return {layer for layer, use in enumerate(uses) if not use}


def _rope(kind: str, base: float, width: int, scaling: Mapping[str, Any]) -> Rope:
    """Return a rotary embedding over `width` numbers of a head, scaled as transformers and llama.cpp do it."""
    places = np.arange(0, width, 2, dtype=np.float64)
    plain = base ** (-places / width)
    name = str(scaling.get("rope_type", scaling.get("type", "default")))
    factor = float(scaling.get("factor") or 1.0)
    original = int(scaling.get("original_max_position_embeddings") or 0)
    if name in ("default", "none", "dynamic"):
        return Rope(plain)
    if name == "linear":
        return Rope(plain / factor)
    given = scaling.get("attention_factor")
    if name == "yarn":
        ramp = _yarn_ramp(base, width, original, scaling)
        mixed = plain / factor * ramp + plain * (1 - ramp)
        usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        return Rope(mixed, float(given or usual))
    if name == "llama3":
        return Rope(_llama3(plain, factor, original, scaling))
    if name in ("longrope", "su") and scaling.get("short_factor") is not None:
        usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return Rope(plain / np.asarray(scaling["short_factor"], np.float64), float(given or usual))
    raise refusal(kind, f"its rotary embedding is scaled by {name}")


def _yarn_ramp(base: float, width: int, original: int, scaling: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Return how far each pair is interpolated, 0 to 1."""

    def place(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(place(float(scaling.get("beta_fast") or 32))), 0)
    high = min(math.ceil(place(float(scaling.get("beta_slow") or 1))), width - 1)
    return np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0, 1)


def _llama3(
    plain: npt.NDArray[np.float64], factor: float, original: int, scaling: Mapping[str, Any]
) -> npt.NDArray[np.float64]:
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = original * plain / (2 * math.pi)  # of a pair within the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * plain / factor + smooth * plain

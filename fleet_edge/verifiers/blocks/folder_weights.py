"""Weights of a folder with a config.json and safetensors, quantized one tensor at a time."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from fleet_edge.verifiers.blocks.architectures import of_config, refusal
from fleet_edge.verifiers.blocks.geometry import Geometry
from fleet_edge.verifiers.blocks.tensors import unfit_tensor
from fleet_edge.verifiers.contract import UnsupportedModel
from fleet_edge.verifiers.safetensors import folder_tensors

if TYPE_CHECKING:
    from fleet_edge.verifiers.blocks.weights import Weights

_MATRIX: Final = 2
_TYPES: Final[dict[str, npt.DTypeLike]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}

# Where a model that reads images as well keeps its language model.
_PREFIXES: Final = ("model.language_model.", "language_model.model.", "language_model.", "model.", "backbone.")

_NAMES: Final = {
    "token_embd": "embed_tokens",
    "per_layer_token_embd": "embed_tokens_per_layer",
    "per_layer_model_proj": "per_layer_model_projection",
    "per_layer_proj_norm": "per_layer_projection_norm",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
_OF_GEMMA: Final = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OF_DELTA: Final = {
    "post_attention_norm": "post_attention_layernorm",
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_OF_MAMBA: Final = {
    "ssm_in": "in_proj", "ssm_conv1d": "conv1d", "ssm_dt.bias": "dt_bias", ".ssm_a": "A_log", ".ssm_d": "D",
    "ssm_norm": "norm", "ssm_out": "out_proj",
}  # fmt: skip
_OF_KIND: Final = {
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    "gemma2": _OF_GEMMA,
    "gemma3": _OF_GEMMA,
    "gemma4": {
        **_OF_GEMMA,
        "post_ffw_norm_1": "post_feedforward_layernorm_1",
        "post_ffw_norm_2": "post_feedforward_layernorm_2",
        "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
        "ffn_gate_inp": "router.proj",
    },
    "mixtral": {"ffn_gate_inp": "block_sparse_moe.gate"},
    "nemotron_h": {
        "token_embd": "embeddings",
        "output_norm": "norm_f",
        "attn_norm": "norm",
        **{f"attn_{end}": f"mixer.{end}_proj" for end in ("q", "k", "v")},
        "attn_output": "mixer.o_proj",
        **{name: f"mixer.{own}" for name, own in _OF_MAMBA.items()},
        **{f"ffn_{end}": f"mixer.{end}_proj" for end in ("up", "down")},
        **{f"ffn_{end}_shexp": f"mixer.shared_experts.{end}_proj" for end in ("up", "down")},
        "ffn_gate_inp": "mixer.gate",
        "exp_probs_b.bias": "mixer.gate.e_score_correction_bias",
        "ffn_latent_down": "mixer.fc1_latent_proj",
        "ffn_latent_up": "mixer.fc2_latent_proj",
    },
    "granitehybrid": {
        **{name: f"mamba.{own}" for name, own in _OF_MAMBA.items()},
        "ffn_gate_inp": "block_sparse_moe.router.layer",
        "ffn_gate_up_exps.weight": "block_sparse_moe.input_linear.weight",
        "ffn_down_exps.weight": "block_sparse_moe.output_linear.weight",
        **{f"ffn_up{end}": "shared_mlp.input_linear" for end in ("", "_shexp")},
        **{f"ffn_down{end}": "shared_mlp.output_linear" for end in ("", "_shexp")},
    },
    "lfm2": {
        "token_embd_norm": "embedding_norm",
        "attn_norm": "operator_norm",
        "ffn_norm": "ffn_norm",
        "attn_output": "self_attn.out_proj",
        "attn_q_norm": "self_attn.q_layernorm",
        "attn_k_norm": "self_attn.k_layernorm",
        "shortconv.conv": "conv.conv",
        "shortconv.in_proj": "conv.in_proj",
        "shortconv.out_proj": "conv.out_proj",
        "ffn_gate": "feed_forward.w1",
        "ffn_up": "feed_forward.w3",
        "ffn_down": "feed_forward.w2",
    },
    "gpt-oss": {"post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router"},
    "qwen35": _OF_DELTA,
    "qwen35moe": _OF_DELTA,
}
_WITHOUT_ENDING: Final = {
    "layer_output_scale.weight": "layer_scalar",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
    "attn_sinks.weight": "self_attn.sinks",
    "ssm_dt.bias": "linear_attn.dt_bias",
    ".ssm_a": "linear_attn.A_log",
}
_OF_QWEN: Final = ("mlp.experts.{}", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"})
_EXPERTS: Final = {
    "qwen2moe": _OF_QWEN,
    "qwen3moe": _OF_QWEN,
    "qwen35moe": _OF_QWEN,
    "nemotron_h": ("mixer.experts.{}", {"up": "up_proj", "down": "down_proj"}),
    "mixtral": ("block_sparse_moe.experts.{}", {"gate": "w1", "up": "w3", "down": "w2"}),
}
"""Where each expert has tensors of its own."""
_OF_OSS: Final = {"gate": ("gate_up_proj", 0, 2), "up": ("gate_up_proj", 1, 2), "down": ("down_proj", 0, 1)}
"""gpt-oss: inputs before outputs, and those of gate and up in turn. The first output, and the step."""


class FolderWeights:
    """A folder, open to be loaded.

    Raises `UnsupportedModel` if files are missing or damaged, or the architecture is not served.
    """

    def __init__(self, folder: Path, *, bits: int) -> None:
        self._bits = bits
        config = _read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        try:
            self.geometry: Geometry = of_config(config, _read_json(generation) if generation.is_file() else {})
            inner = config.get("text_config", config)
            tied = inner.get("tie_embedding", self.geometry.sandwich or self.geometry.kind == "lfm2")
            self._tied = bool(inner.get("tie_word_embeddings", tied))
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(folder) from error
        self._tensors = {_without_prefix(name): each for name, each in folder_tensors(folder).items()}
        self._folder = folder
        if config.get("quantization_config"):
            raise refusal(self.geometry.kind, "its folder has quantized weights")

    @property
    def files(self) -> list[Path]:
        return [self._folder / "config.json", *sorted({each.file for each in self._tensors.values()})]

    @property
    def number_format(self) -> str:
        return f"{self._bits} bits"

    @property
    def packed_bytes(self) -> int:
        bytes_per_number = (self._bits + 0.5) / 8  # a scale of 16 bits for 32 numbers
        return int(sum(each.numbers for each in self._tensors.values()) * bytes_per_number)

    @property
    def largest_bytes(self) -> int:
        return max(each.nbytes for each in self._tensors.values())

    def __contains__(self, name: str) -> bool:
        return self._shape(name) is not None and not (self._tied and name == "output.weight")

    def require_shapes(self) -> None:
        unfit = unfit_tensor(self.geometry, lambda name: self._shape(name) if name in self else None)
        if unfit is not None:
            raise damaged(self._folder)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor by its name in a GGUF, None if there is none."""
        shapes = {tuple(each.shape) if each is not None else None for each in map(self._tensors.get, self._names(name))}
        shape = shapes.pop()
        if shapes or shape is None:
            return None
        if name.endswith("_exps.weight") and self.geometry.kind in _EXPERTS and len(shape) == _MATRIX:
            return len(self._names(name)), *shape
        if "_exps." in name and self.geometry.kind == "gpt-oss":
            step = _OF_OSS[_own(name)][2]
            return (shape[0], shape[2] // step, shape[1]) if name.endswith("weight") else (shape[0], shape[1] // step)
        return (shape[0], shape[-1]) if name.endswith(("shortconv.conv.weight", "ssm_conv1d.weight")) else shape

    def vector(self, name: str) -> npt.NDArray[np.float32] | None:
        """Return a tensor in float32; None if there is none. Norms of some have one added, as a GGUF has them."""
        if name not in self:
            return None
        floats, kind = _widened(self._array(name)), self.geometry.kind
        if name.endswith(".ssm_a"):
            return -np.exp(floats)
        if kind in ("gemma2", "gemma3", "qwen35", "qwen35moe") and "norm" in name and "ssm_norm" not in name:
            return floats + np.float32(1)
        return floats

    def pack(self, names: Sequence[str], *, orders: Sequence[npt.NDArray[np.intp] | None] = ()) -> "list[Weights]":
        """Return tensors, or the rows of them that `orders` name, quantized and packed, as one weight."""
        from fleet_edge.verifiers.blocks.weights import pack_floats  # noqa: PLC0415 - to check a folder needs no numba

        parts = [each.reshape(-1, each.shape[-1]) for each in map(self._array, names)]
        parts = [
            part if order is None else part[order]
            for part, order in zip(parts, orders or [None] * len(names), strict=True)
        ]
        if len({part.dtype for part in parts}) > 1:
            parts = [_widened(part) for part in parts]
        try:
            return [pack_floats(np.concatenate(parts) if len(parts) > 1 else parts[0], self._bits)]
        except ValueError as error:
            raise UnsupportedModel(f"The weights in {self._folder} cannot be quantized: {error}") from error

    def _names(self, name: str) -> list[str]:
        """Return the names in the files of a tensor that a GGUF calls `name`: several where experts are apart."""
        kind, parts = self.geometry.kind, name.split(".")
        block = f"layers.{parts[1]}." if parts[0] == "blk" else ""
        own, ending = ".".join(parts[2:-1] if block else parts[:-1]), parts[-1]
        together = f"{block}mlp.experts.{'gate_up' if 'gate_up' in own else 'down'}_proj"
        if own in ("ffn_gate_up_exps", "ffn_down_exps") and kind in _EXPERTS and together in self._tensors:
            return [together]
        if own.endswith("_exps") and kind in _EXPERTS and _own(name) in _EXPERTS[kind][1]:
            of_expert, names = _EXPERTS[kind]
            experts = self.geometry.layers[int(parts[1])].experts
            count = 0 if experts is None else experts.count
            return [f"{block}{of_expert.format(each)}.{names[_own(name)]}.{ending}" for each in range(count)]
        if own.endswith("_exps") and kind == "gpt-oss" and _own(name) in _OF_OSS:
            return [f"{block}mlp.experts.{_OF_OSS[_own(name)][0]}{'_bias' if ending == 'bias' else ''}"]
        known = _NAMES | _WITHOUT_ENDING | _OF_KIND.get(kind, {})
        return [f"{block}{known.get(f'{own}.{ending}') or f'{known.get(own, own)}.{ending}'}"]

    def _array(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor in the order of a GGUF, in the files' number format."""
        found = [self._read(each) for each in self._names(name)]
        whole = found[0] if len(found) == 1 else np.stack(found)
        if "_exps." in name and self.geometry.kind == "gpt-oss":
            _, first, step = _OF_OSS[_own(name)]
            whole = whole[..., first::step]
            return np.ascontiguousarray(whole.swapaxes(1, 2) if name.endswith("weight") else whole)
        return whole

    def _read(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor as the file has it, bfloat16 as uint16."""
        try:
            tensor = self._tensors[name]
            raw = np.fromfile(tensor.file, _TYPES[tensor.kind], tensor.numbers, offset=tensor.offset)
            return raw.reshape(tensor.shape)
        except (KeyError, ValueError) as error:
            raise UnsupportedModel(
                f"The weights in {self._folder} lack {name}, or have it in a number format that is not served; fetch "
                "the model again, in float32, float16 or bfloat16."
            ) from error


def _own(name: str) -> str:
    """Return `gate`, `up`, or `down` of the name of a tensor of experts."""
    return name.split(".")[-2].removeprefix("ffn_").removesuffix("_exps")


def _without_prefix(name: str) -> str:
    return next((name.removeprefix(each) for each in _PREFIXES if name.startswith(each)), name)


def _widened(raw: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    if raw.dtype == np.uint16:
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32, copy=False)


def _read_json(path: Path) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path) from error
    if not isinstance(found, dict):
        raise damaged(path)
    return found


def damaged(path: Path) -> UnsupportedModel:
    return UnsupportedModel(f"{path} is missing or damaged; fetch the model again, whole.")

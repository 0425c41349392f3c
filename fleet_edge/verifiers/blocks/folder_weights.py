"""Weights of a folder with a config.json and safetensors, quantized one tensor at a time."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from fleet_edge.verifiers.blocks.architectures import Geometry, of_config, unfit_tensor
from fleet_edge.verifiers.contract import UnsupportedModel
from fleet_edge.verifiers.safetensors import folder_tensors

if TYPE_CHECKING:
    from fleet_edge.verifiers.blocks.weights import Weights

_TYPES: Final[dict[str, npt.DTypeLike]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}

# Where a model that reads images as well keeps its language model.
_PREFIXES: Final = ("model.language_model.", "language_model.model.", "language_model.", "model.")

_NAMES: Final = {
    "token_embd": "embed_tokens",
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
}
_OF_GEMMA: Final = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OF_PHI: Final = {"ffn_up": "mlp.gate_up_proj"}
_EXPERTS: Final = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}


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
            self._tied = bool(config.get("text_config", config).get("tie_word_embeddings", self._gemma))
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(folder) from error
        self._tensors = {_without_prefix(each.name): each for each in folder_tensors(folder)}
        self._folder = folder

    @property
    def _gemma(self) -> bool:
        return self.geometry.kind == "gemma3"

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
        return self._name(name) in self._tensors and not (self._tied and name == "output.weight")

    def require_shapes(self) -> None:
        unfit = unfit_tensor(self.geometry, self._shape)
        if unfit is not None:
            raise damaged(self._folder)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        if not name.endswith("_exps.weight"):
            return tuple(self._tensors[self._name(name)].shape) if name in self else None
        experts = range(self.geometry.experts)
        found = [self._tensors.get(self._name_of_expert(name, expert)) for expert in experts]
        shapes = {None if each is None else tuple(each.shape) for each in found}
        one = shapes.pop()
        return None if shapes or one is None else (len(experts), *one)

    def vector(self, name: str) -> npt.NDArray[np.float32] | None:
        """Return a tensor in float32; None if there is none. Norms of Gemma have one added, as a GGUF has them."""
        if name not in self:
            return None
        floats = _widened(self._read(self._name(name)))
        return floats + np.float32(1) if self._gemma and "norm" in name else floats

    def pack(self, names: Sequence[str], *, orders: Sequence[npt.NDArray[np.intp] | None] = ()) -> "list[Weights]":
        """Return tensors, quantized and packed, as one weight."""
        assert not any(order is not None for order in orders), "a folder has its rows in order"
        return self._pack([self._name(name) for name in names])

    def pack_expert(self, names: Sequence[str], expert: int) -> "list[Weights]":
        """Return one expert's matrices, quantized and packed, as one weight."""
        return self._pack([self._name_of_expert(name, expert) for name in names])

    def _pack(self, names: Sequence[str]) -> "list[Weights]":
        from fleet_edge.verifiers.blocks.weights import pack_floats  # noqa: PLC0415 - to check a folder needs no numba

        parts = [self._read(name) for name in names]
        if len({part.dtype for part in parts}) > 1:
            parts = [_widened(part) for part in parts]
        try:
            return [pack_floats(np.concatenate(parts) if len(parts) > 1 else parts[0], self._bits)]
        except ValueError as error:
            raise UnsupportedModel(f"The weights in {self._folder} cannot be quantized: {error}") from error

    def _name(self, name: str) -> str:
        """Return the name in the files of a tensor that a GGUF calls `name`."""
        parts = name.split(".")
        block = f"layers.{parts[1]}." if parts[0] == "blk" else ""
        own, kind = parts[-2], parts[-1]
        names = _NAMES | {"gemma3": _OF_GEMMA, "phi3": _OF_PHI}.get(self.geometry.kind, {})
        return f"{block}{names.get(own, own)}.{kind}"

    def _name_of_expert(self, name: str, expert: int) -> str:
        block, _, rest = name.partition(".ffn")
        own = _EXPERTS[f"ffn{rest.removesuffix('.weight')}"]
        return f"layers.{block.removeprefix('blk.')}.mlp.experts.{expert}.{own}.weight"

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

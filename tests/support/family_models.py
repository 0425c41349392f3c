"""Models of many families without weights: published shapes, in sparse files."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from tests.support.tiny_gguf import CHAT_TEMPLATE, END, Row, new_gguf, tiny_rows


@dataclass(frozen=True)
class Family:
    architecture: str
    model_type: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    context: int
    kv_bytes: int
    dim: int | None = None
    window: int | None = None
    tied: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def head_dim(self) -> int:
        return self.dim or self.width // self.heads


FAMILIES = {
    "SmolLM2 135M": Family("llama", "llama", 30, 576, 9, 3, 8192, 23_040, tied=True),
    "Llama 3.2 1B": Family("llama", "llama", 16, 2048, 32, 8, 131_072, 32_768, tied=True),
    "Llama 3.1 8B": Family("llama", "llama", 32, 4096, 32, 8, 131_072, 131_072),
    "Qwen 2.5 0.5B": Family("qwen2", "qwen2", 24, 896, 14, 2, 32_768, 12_288, tied=True),
    "Qwen 3 0.6B": Family("qwen3", "qwen3", 28, 1024, 16, 8, 40_960, 114_688, dim=128, tied=True),
    "Mistral 7B": Family("llama", "mistral", 32, 4096, 32, 8, 32_768, 131_072, window=4096),
    "Gemma 2 2B": Family("gemma2", "gemma2", 26, 2304, 8, 4, 8192, 106_496, dim=256, window=4096, tied=True),
    "Gemma 3 270M": Family("gemma3", "gemma3_text", 18, 640, 4, 1, 32_768, 18_432, dim=256, window=512, tied=True),
    "Phi 2": Family("phi2", "phi", 32, 2560, 32, 32, 2048, 327_680),
    "Phi 3 mini": Family("phi3", "phi3", 32, 3072, 32, 32, 4096, 393_216, window=2047),
}


def family_gguf(
    path: Path,
    family: Family,
    *,
    rows: Sequence[Row] | None = None,
    template: str | None = CHAT_TEMPLATE,
    end: int = END,
    kind: GGMLQuantizationType = GGMLQuantizationType.Q4_0,
) -> Path:
    """Write a sparse GGUF: it has its full size, and takes no disk space."""
    rows = tiny_rows() if rows is None else rows
    writer = new_gguf(
        path, family.architecture, layers=family.layers, width=family.width, inner=4 * family.width, heads=family.heads,
        kv_heads=family.kv_heads, dim=family.dim, context=family.context, rows=rows, end=end, template=template,
        file_type=2 if kind is GGMLQuantizationType.Q4_0 else 7,
    )  # fmt: skip
    if family.window and family.architecture != "llama":
        writer.add_sliding_window(family.window)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    for name, (height, width) in _tensors(family).items():
        bytes_ = height * width // elements * size
        stored = (height, width // elements * size)  # the writer takes the shape of the bytes
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), bytes_, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        begin = gguf.GGUFWriter.ggml_pad(path.stat().st_size, gguf.GGUF_DEFAULT_ALIGNMENT)
        file.truncate(begin + weight_bytes(family, kind))
    return path


def _tensors(family: Family) -> dict[str, tuple[int, int]]:
    """Return embeddings, head, and the tensors of keys and values, which is all that is read."""
    kv = family.kv_heads * family.head_dim
    found = {"token_embd.weight": (512, family.width)}
    if not family.tied:
        found["output.weight"] = (512, family.width)
    for layer in range(family.layers):
        found[f"blk.{layer}.attn_k.weight"] = (kv, family.width)
        found[f"blk.{layer}.attn_v.weight"] = (kv, family.width)
    return found


def parameters(family: Family) -> int:
    return sum(rows * columns for rows, columns in _tensors(family).values())


def weight_bytes(family: Family, kind: GGMLQuantizationType = GGMLQuantizationType.Q4_0) -> int:
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    return int(parameters(family) // elements * size)


def family_folder(path: Path, family: Family, *, words: Sequence[str] | None = None) -> Path:
    words = [str(word) for word, _ in tiny_rows()] if words is None else words
    path.mkdir(parents=True)
    config = {
        "model_type": family.model_type,
        "num_hidden_layers": family.layers,
        "hidden_size": family.width,
        "intermediate_size": 4 * family.width,
        "num_attention_heads": family.heads,
        "num_key_value_heads": family.kv_heads,
        "max_position_embeddings": family.context,
        "vocab_size": 512,
        "eos_token_id": END,
        "tie_word_embeddings": family.tied,
        **({"head_dim": family.dim} if family.dim else {}),
        **({"sliding_window": family.window} if family.window else {}),
        **family.config,
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {word: index for index, word in enumerate(words)}}})
    )
    (path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": words[1]}, "eos_token": words[END], "chat_template": CHAT_TEMPLATE})
    )
    header, end = {}, 0
    for name, shape in _tensors(family).items():
        size = 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    return path

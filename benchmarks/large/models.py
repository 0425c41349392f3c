"""Random models in real shapes: GGUFs whose speed is that of the real ones, and whose greedy text is known.

Each token's embedding is a row of random signs, and the output projection has these rows in another order. What all
layers together add to an embedding is small, so that the likeliest token after t is `successor[t]`, a walk through the
whole vocabulary. A draft model follows the same walk, but for the share of the tokens that it is to get wrong. All
layers have the same random weights, so a file is made in about the time that the disk takes.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from benchmarks.harness import MODELS, Bench, say
from benchmarks.processes import BenchError

Bytes = NDArray[np.uint8]

VOCABULARY: Final = 152_064
FIRST: Final = 1_000
"""Ids below are control tokens and single bytes: they follow nothing but themselves."""

_SEED: Final = 20_261_129
_INTERVAL: Final = 4  # of Qwen3.5's layers, from one with attention to the next
_CHUNK: Final = 4_096  # rows that are encoded at a time
_LOGIT: Final = 30.0  # of the successor; those of others are below 1
_SPREAD: Final = 0.6  # of a product with random weights, for inputs of 1
_ADDED: Final = 0.2  # the same for what a layer adds to its input


@dataclass(frozen=True, slots=True)
class Delta:
    """Shape of the gated delta rule of Qwen3.5: heads of keys and of values, their size, and the convolution's."""

    key_heads: int
    value_heads: int
    dim: int = 128
    kernel: int = 4

    @property
    def values(self) -> int:
        return self.value_heads * self.dim

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.dim + self.values


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a Qwen2.5 model, but for the vocabulary and for the output projection, which none shares.

    With `delta` it is one of Qwen3.5, of which every fourth layer has attention, with heads of `dim`.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int = 0
    delta: Delta | None = None

    @property
    def head_dim(self) -> int:
        return self.dim or self.hidden // self.heads


SHAPES: Final[Mapping[str, Shape]] = MappingProxyType(
    {
        "tiny": Shape(24, 256, 512, 4, 2),
        "0.5b": Shape(24, 896, 4_864, 14, 2),
        "1.5b": Shape(28, 1_536, 8_960, 12, 2),
        "3b": Shape(36, 2_048, 11_008, 16, 2),
        "7b": Shape(28, 3_584, 18_944, 28, 4),
        "qwen3.5-0.8b": Shape(24, 1_024, 3_584, 8, 2, 256, Delta(16, 16)),
        "qwen3.5-9b": Shape(32, 4_096, 12_288, 16, 4, 256, Delta(16, 32)),
    }
)

FILES: Final = ("Q4_0", "Q4_K_M", "Q8_0")
"""Quantizations of files; of Q4_0 and Q4_K_M the output projection is Q6_K, as llama.cpp makes them."""


def successors(right: float = 1.0) -> NDArray[np.int64]:
    """Return the token that follows each; a share of `right` of them are those of the target."""
    random = np.random.default_rng(_SEED)
    order = random.permutation(np.arange(FIRST, VOCABULARY))
    found = np.arange(VOCABULARY)
    found[order] = np.roll(order, -1)
    wrong = random.permutation(order)[: round((1.0 - right) * len(order))]
    found[wrong] = found[np.roll(wrong, 1)]
    return found


def walk(first: int, tokens: int) -> tuple[int, ...]:
    """Return what the target writes after a token."""
    following, text = successors(), [first]
    for _ in range(tokens):
        text.append(int(following[text[-1]]))
    return tuple(text[1:])


def make(
    folder: Path, shape: str, file: str, *, vocabulary: Path, right: float = 1.0, layers: int | None = None
) -> Path:
    """Return a GGUF, made if it is missing; `vocabulary` is a GGUF with a smaller one, which is filled up."""
    its = SHAPES[shape]
    if layers is not None and layers > its.layers:
        raise BenchError(f"The shape {shape} has {its.layers} layers; choose fewer --layers.")
    if layers is not None and layers < its.layers:
        its, shape = replace(its, layers=layers), f"{shape}-{layers}"
    name = f"{shape}-{file}{'' if right == 1.0 else f'-{right:g}'}.gguf"
    path = folder / name
    if path.exists():
        return path
    if file == "Q4_K_M" and (its.hidden % 256 or its.inner % 256):
        raise BenchError(f"The shape {shape} has no Q4_K_M: its rows are no multiple of 256; choose Q4_0.")
    with new_gguf(path, "qwen2" if its.delta is None else "qwen35") as writer:
        _describe(writer, its, name, vocabulary)
        for tensor, data, kind in _tensors(its, file, successors(right)):
            writer.add_tensor(tensor, data, raw_dtype=kind)
    return path


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="(default: %(default)s)")
    parser.add_argument("--file", choices=FILES, default="Q4_0", help="(default: %(default)s)")
    parser.add_argument("--cache", type=Path, default=MODELS.parent / "random", help="of models (default: %(default)s)")


def made(bench: Bench, shape: str = "") -> Path:
    """Return the model that the options name, or one of another shape."""
    options = bench.options
    return make(options.cache, shape or options.shape, options.file, vocabulary=bench.model("Q4_0.gguf"))


@contextmanager
def new_gguf(path: Path, architecture: str) -> Iterator[gguf.GGUFWriter]:
    """Write a file with what is added here; it has its name once it is whole."""
    say(f"Making {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, architecture)
    yield writer
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(path)


def _describe(writer: gguf.GGUFWriter, its: Shape, name: str, vocabulary: Path) -> None:
    writer.add_name(f"random {name}")
    writer.add_block_count(its.layers)
    writer.add_context_length(32_768)
    writer.add_embedding_length(its.hidden)
    writer.add_feed_forward_length(its.inner)
    writer.add_head_count(its.heads)
    writer.add_head_count_kv(its.kv_heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    if its.delta is not None:
        writer.add_key_length(its.head_dim)
        writer.add_value_length(its.head_dim)
        writer.add_rope_dimension_count(its.head_dim // 4)
        writer.add_rope_dimension_sections([its.head_dim // 24] * 3 + [0])
        writer.add_full_attention_interval(_INTERVAL)
        writer.add_ssm_conv_kernel(its.delta.kernel)
        writer.add_ssm_state_size(its.delta.dim)
        writer.add_ssm_group_count(its.delta.key_heads)
        writer.add_ssm_time_step_rank(its.delta.value_heads)
        writer.add_ssm_inner_size(its.delta.values)
    add_vocabulary(writer, vocabulary, VOCABULARY)


def add_vocabulary(writer: gguf.GGUFWriter, source: Path, size: int) -> None:
    """Describe the tokenizer of a GGUF, with tokens that no text has up to `size`."""
    fields = gguf.GGUFReader(source).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields["tokenizer.ggml.pre"].contents())
    writer.add_token_list(tokens + [f"Ġzq{token}x" for token in range(len(tokens), size)])
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (size - len(tokens)))
    writer.add_token_merges(fields["tokenizer.ggml.merges"].contents())
    writer.add_bos_token_id(fields["tokenizer.ggml.bos_token_id"].contents())
    writer.add_eos_token_id(fields["tokenizer.ggml.eos_token_id"].contents())


def _tensors(its: Shape, file: str, following: NDArray[np.int64]) -> Iterable[tuple[str, NDArray[Any], Kind | None]]:
    random = np.random.default_rng(its.hidden)
    usual = Kind.Q4_K if file == "Q4_K_M" else getattr(Kind, file)
    finest = usual if file == "Q8_0" or its.hidden % 256 else Kind.Q6_K
    if its.hidden % 256:
        finest = Kind.Q8_0
    signs = random.integers(0, 256, (VOCABULARY, its.hidden // 8), dtype=np.uint8)
    # As large as there are layers: these have the same weights, so what they add goes in one direction.
    yield "token_embd.weight", _of_signs(usual, signs, its.layers), usual
    before = np.argsort(following)
    yield "output.weight", _of_signs(finest, signs[before]), finest
    yield "output_norm.weight", np.full(its.hidden, _LOGIT / its.hidden, np.float32), None
    wide, narrow = its.heads * its.head_dim, its.kv_heads * its.head_dim
    sizes = {
        "attn_q": (wide, its.hidden),
        "attn_k": (narrow, its.hidden),
        "attn_v": (narrow, its.hidden),
        "attn_output": (its.hidden, wide),
        "ffn_gate": (its.inner, its.hidden),
        "ffn_up": (its.inner, its.hidden),
        "ffn_down": (its.hidden, its.inner),
    }
    if its.delta is not None:
        sizes |= {
            "attn_q": (2 * wide, its.hidden),
            "attn_qkv": (its.delta.channels, its.hidden),
            "attn_gate": (its.delta.values, its.hidden),
            "ssm_alpha": (its.delta.value_heads, its.hidden),
            "ssm_beta": (its.delta.value_heads, its.hidden),
            "ssm_out": (its.hidden, its.delta.values),
        }
    mixed = {"attn_v", "ffn_down"} if file == "Q4_K_M" else set()
    weights: dict[tuple[str, Kind], Bytes] = {}
    for name, (rows, columns) in sizes.items():
        spread = (_ADDED if name in {"attn_output", "ffn_down", "ssm_out"} else _SPREAD) / columns**0.5
        for kind in {usual, Kind.Q6_K} if name in mixed else {usual}:
            weights[name, kind] = random_weights(kind, random, rows, columns, spread)
    for layer in range(its.layers):
        vectors: dict[str, NDArray[np.float32]] = {"attn_norm.weight": np.ones(its.hidden, np.float32)}
        of_attention = ["attn_q", "attn_k", "attn_v", "attn_output"]
        names = list(sizes)
        if its.delta is None:
            vectors |= {f"{name}.bias": np.zeros(sizes[name][0], np.float32) for name in of_attention[:3]}
            vectors["ffn_norm.weight"] = np.ones(its.hidden, np.float32)
        else:
            vectors["post_attention_norm.weight"] = np.ones(its.hidden, np.float32)
            recurrent = bool((layer + 1) % _INTERVAL)
            names = [each for each in names if each.startswith("ffn") or (each not in of_attention) == recurrent]
            vectors |= _of_delta(its.delta, random) if recurrent else _of_heads(its.head_dim)
        for name in names:
            kind = Kind.Q6_K if name in mixed and _more_bits(layer, its.layers) else usual
            yield f"blk.{layer}.{name}.weight", weights[name, kind], kind
        for name, values in vectors.items():
            yield f"blk.{layer}.{name}", values, None


def _of_heads(dim: int) -> dict[str, NDArray[np.float32]]:
    return {f"attn_{name}_norm.weight": np.ones(dim, np.float32) for name in "qk"}


def _of_delta(its: Delta, random: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    return {
        "ssm_a": np.full(its.value_heads, -0.5, np.float32),
        "ssm_dt.bias": np.zeros(its.value_heads, np.float32),
        "ssm_norm.weight": np.ones(its.dim, np.float32),
        "ssm_conv1d.weight": random.normal(0, 0.5, (its.channels, its.kernel)).astype(np.float32),
    }


def _more_bits(layer: int, layers: int) -> bool:
    """Whether llama.cpp gives a layer of a Q4_K_M more bits."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2


_SCALES_K: Final = np.array([1] * 8 + [0x11] * 4, dtype=np.uint8)
"""Scales and minimums of 1 for all parts of a block of Q4_K."""


def _half(value: float, blocks: int) -> Bytes:
    return np.full((blocks, 1), value, dtype="<f2").view(np.uint8)


def _both_ways(value: float, blocks: int) -> Bytes:
    """Return scales of alternating sign: the mean of a block's random integers is half of one below zero.

    Without that, all outputs have a part in common, which grows from layer to layer.
    """
    scales = _half(value, blocks).view("<f2")
    scales[1::2] *= -1
    return scales.view(np.uint8)


def _noise(random: np.random.Generator, blocks: int, size: int) -> Bytes:
    return np.frombuffer(random.bytes(blocks * size), dtype=np.uint8).reshape(blocks, size)


def _rows(blocks: Iterable[NDArray[Any]], rows: int) -> Bytes:
    return np.concatenate(list(blocks), axis=1).reshape(rows, -1)


def _random_q4_0(random: np.random.Generator, rows: int, columns: int, spread: float) -> Bytes:
    blocks = rows * columns // 32
    return _rows((_both_ways(spread / 4.6, blocks), _noise(random, blocks, 16)), rows)


def _random_q8_0(random: np.random.Generator, rows: int, columns: int, spread: float) -> Bytes:
    blocks = rows * columns // 32
    return _rows((_both_ways(spread / 73.9, blocks), _noise(random, blocks, 32)), rows)


def _random_q4_k(random: np.random.Generator, rows: int, columns: int, spread: float) -> Bytes:
    blocks, scale = rows * columns // 256, spread / 4.6
    scales = np.broadcast_to(_SCALES_K, (blocks, 12))
    return _rows((_half(scale, blocks), _half(7.5 * scale, blocks), scales, _noise(random, blocks, 128)), rows)


def _random_q6_k(random: np.random.Generator, rows: int, columns: int, spread: float) -> Bytes:
    blocks = rows * columns // 256
    scales = np.ones((blocks, 16), np.uint8)
    return _rows((_noise(random, blocks, 192), scales, _both_ways(spread / 18.5, blocks)), rows)


def _random_mxfp4(random: np.random.Generator, rows: int, columns: int, spread: float) -> Bytes:
    blocks = rows * columns // 32
    exponents = np.full((blocks, 1), 127 + round(np.log2(spread / 2.9)), np.uint8)
    return _rows((exponents, _noise(random, blocks, 16)), rows)


_RANDOM: Final[Mapping[Kind, Callable[[np.random.Generator, int, int, float], Bytes]]] = MappingProxyType(
    {
        Kind.Q4_0: _random_q4_0,
        Kind.Q8_0: _random_q8_0,
        Kind.Q4_K: _random_q4_k,
        Kind.Q6_K: _random_q6_k,
        Kind.MXFP4: _random_mxfp4,
    }
)


def random_weights(kind: Kind, random: np.random.Generator, rows: int, columns: int, spread: float) -> Bytes:
    """Return encoded rows of random weights of a standard deviation."""
    return _RANDOM[kind](random, rows, columns, spread)


def _of_signs(kind: Kind, signs: Bytes, size: float = 1.0) -> Bytes:
    """Return rows of weights of `size` where a bit is set and of `-size` elsewhere."""
    chunks = []
    for begin in range(0, len(signs), _CHUNK):
        some = signs[begin : begin + _CHUNK]
        chunks.append(_rows(_SIGNED[kind](np.unpackbits(some, axis=1), size), len(some)))
    return np.concatenate(chunks)


def _signed_q4_0(bits: Bytes, size: float) -> Iterable[NDArray[Any]]:
    values = (1 + 14 * bits).reshape(-1, 2, 16)
    return _half(size / 7, len(values)), values[:, 0] | values[:, 1] << 4


def _signed_q8_0(bits: Bytes, size: float) -> Iterable[NDArray[Any]]:
    values = np.where(bits, 127, -127).astype(np.int8).reshape(-1, 32)
    return _half(size / 127, len(values)), values.view(np.uint8)


def _signed_q4_k(bits: Bytes, size: float) -> Iterable[NDArray[Any]]:
    values = (15 * bits).reshape(-1, 4, 2, 32)
    blocks = len(values)
    nibbles = (values[:, :, 0] | values[:, :, 1] << 4).reshape(blocks, 128)
    return _half(size / 7.5, blocks), _half(size, blocks), np.broadcast_to(_SCALES_K, (blocks, 12)), nibbles


def _signed_q6_k(bits: Bytes, size: float) -> Iterable[NDArray[Any]]:
    # 63 or 1, as low and high bits: a block has two halves of four times 32 weights.
    low, high = (1 + 14 * bits).reshape(-1, 2, 4, 32), (3 * bits).reshape(-1, 2, 4, 32)
    blocks = len(low)
    nibbles = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(blocks, 128)
    tops = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(blocks, 64)
    return nibbles, tops, np.ones((blocks, 16), np.uint8), _half(size / 31, blocks)


_SIGNED: Final[Mapping[Kind, Callable[[Bytes, float], Iterable[NDArray[Any]]]]] = MappingProxyType(
    {Kind.Q4_0: _signed_q4_0, Kind.Q8_0: _signed_q8_0, Kind.Q4_K: _signed_q4_k, Kind.Q6_K: _signed_q6_k}
)

"""Forward pass in int8 on a CPU, for models of the llama family: fused products, and rows independent of the batch.

Weights and the inputs of products are int8 with one scale a row; the rest is float32. `kernels` computes each row in an
order of its own, so that its logits are the same to the bit whatever is computed with it, and on every processor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import numba
import numpy as np
import torch
from pydantic import BaseModel

from fleet_edge.verifiers.packed.kernels import (
    ROWS_AT_ONCE,
    TILE,
    Bytes,
    Floats,
    Integers,
    Kernels,
    kernels,
)
from fleet_edge.verifiers.packed.kv import LayerShape, Slab
from fleet_edge.verifiers.packed.layout import Part

_NONE: Final = np.empty(0, np.float32)
_MOST_KEPT: Final = 1 << 23
"""Largest array that is kept: 32 MiB, logits of 170 rows of a vocabulary of 49,152."""


class Geometry(BaseModel):
    """Shape and constants of a model.

    Attributes:
        hidden: Width of the residual stream.
        inner: Width of the feed-forward layers.
        rope_scale: Factor of cosines and sines.
        hadamard: Size of the Hadamard matrix before `down`, a power of two.
    """

    kind: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    rows: int
    hadamard: int
    eps: float
    context: int
    rope_scale: float
    without_rope: tuple[int, ...]
    end_tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """Rows in bytes with 128 for zero, and their scales."""

    rows: Bytes
    scales: Floats

    @classmethod
    def empty(cls, rows: int, width: int) -> "Quantized":
        return cls(np.empty((rows, width), np.uint8), np.empty(rows, np.float32))


class Workspace:
    """Buffers that steps reuse: to allocate them for each product would take as long as some products."""

    def __init__(self) -> None:
        self._kept: dict[str, Floats] = {}

    def floats(self, name: str, rows: int, width: int) -> Floats:
        """Return `[rows, width]`, valid until `name` is asked for again."""
        size = rows * width
        kept = self._kept.get(name, _NONE)
        if len(kept) < size:
            kept = np.empty(size, np.float32)
            if size <= _MOST_KEPT:
                self._kept[name] = kept
        return kept[:size].reshape(rows, width)


class Product:
    """Product with an int8 weight `[out, in]` that has one scale a row."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], name: str, loops: Kernels, workspace: Workspace) -> None:
        """Pack `NAME.weight` and `NAME.scale`, with any `NAME.bias`."""
        weight = tensors[f"{name}.weight"].numpy()
        outputs, inputs = weight.shape
        tiles = -(-outputs // TILE)
        padded = np.zeros((tiles * TILE, inputs), np.int8)
        padded[:outputs] = weight
        fours = padded.reshape(tiles, TILE, inputs // 4, 4).transpose(0, 2, 1, 3)
        self._tiles = np.ascontiguousarray(fours).view(np.uint8).reshape(tiles, -1)
        self._offset = 128 * padded.sum(1, dtype=np.int32)
        self._scale, self._bias = np.zeros((2, tiles * TILE), np.float32)
        self._scale[:outputs] = tensors[f"{name}.scale"].numpy()
        if f"{name}.bias" in tensors:
            self._bias[:outputs] = tensors[f"{name}.bias"].numpy()
        self._loops, self._workspace = loops, workspace
        self._place = name.rpartition(".")[2]

    def __call__(self, x: Quantized) -> Floats:
        """Return `[rows, out]`, valid until the next product of this kind; the width is rounded up to whole tiles."""
        out = self._workspace.floats(self._place, len(x.rows), len(self._scale))
        self._loops.multiply(self._tiles, x.rows, self._offset, self._scale, x.scales, self._bias, out)
        return out


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    qkv: Product
    o: Product
    gate_up: Product
    down: Product
    q_norm: Floats
    k_norm: Floats
    cos: Floats
    sin: Floats


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Rows `[begin, end)`, which are in one slab: their slots and positions, and where parts of a sequence begin."""

    slab: Slab
    begin: int
    end: int
    slots: Integers
    positions: Integers
    starts: Integers


class LeanModel:
    """A model of the llama family in int8 on a CPU."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, geometry: Geometry, tensors: Mapping[str, torch.Tensor]) -> None:
        """Prepare the weights that `int8.quantize` returns, for as many threads as torch has."""
        self.geometry = geometry
        self._threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        self._loops = loops = kernels(parallel=self._threads > 1)
        self._workspace = workspace = Workspace()
        self._eps = np.float32(geometry.eps * geometry.hidden)
        self._head_eps = np.float32(geometry.eps * geometry.head_dim)
        # A copy, so that the file that the weights were packed from is no longer mapped.
        self._embedding = tensors["embedding"].clone().numpy()
        angles = np.arange(geometry.context)[:, None] * tensors["inv_freq"].double().numpy()
        cos, sin = ((turn(angles) * geometry.rope_scale).astype(np.float32) for turn in (np.cos, np.sin))
        no_turn = np.empty((0, 0), np.float32)
        self._head = Product(tensors, "head", loops, workspace)
        self._layers = [
            _Layer(
                qkv=Product(tensors, f"{layer}.qkv", loops, workspace),
                o=Product(tensors, f"{layer}.o", loops, workspace),
                gate_up=Product(tensors, f"{layer}.gate_up", loops, workspace),
                down=Product(tensors, f"{layer}.down", loops, workspace),
                q_norm=tensors[f"{layer}.q_norm"].clone().numpy() if f"{layer}.q_norm" in tensors else _NONE,
                k_norm=tensors[f"{layer}.k_norm"].clone().numpy() if f"{layer}.k_norm" in tensors else _NONE,
                cos=no_turn if layer in geometry.without_rope else cos,
                sin=no_turn if layer in geometry.without_rope else sin,
            )
            for layer in range(geometry.layers)
        ]

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        size = self.geometry.head_dim
        return (LayerShape(self.geometry.kv_heads, size, size),) * self.geometry.layers

    def forward(self, parts: Sequence[Part], tokens: Sequence[Sequence[int]], rows: Sequence[int]) -> Floats:
        """Compute the tokens of each part; return the logits of its last `rows`, `[sum of rows, vocabulary]`."""
        its, loops = self.geometry, self._loops
        if self._threads > 1:
            numba.set_num_threads(self._threads)  # which holds for the calling thread alone
        order = sorted(range(len(parts)), key=lambda index: (id(parts[index].slot.slab), parts[index].slot.index))
        runs = _lay_out([parts[index] for index in order])
        x = self._embedding[[token for index in order for token in tokens[index]]].astype(np.float32)
        count = len(x)
        narrow, inner = Quantized.empty(count, its.hidden), Quantized.empty(count, its.inner)
        heads = Quantized.empty(count, its.heads * its.head_dim)
        attended = self._workspace.floats("attended", count, its.heads * its.head_dim)
        more = np.zeros_like(x)
        for number, layer in enumerate(self._layers):
            loops.normalize(x, more, self._eps, narrow.rows, narrow.scales)
            qkv = layer.qkv(narrow)
            for run in runs:
                keys, values = run.slab.keys[number].transpose(2, 3).numpy(), run.slab.values[number].numpy()
                mine = slice(run.begin, run.end)
                loops.place(
                    qkv[mine],
                    layer.q_norm,
                    layer.k_norm,
                    self._head_eps,
                    layer.cos,
                    layer.sin,
                    run.slots,
                    run.positions,
                    keys,
                    values,
                    its.heads,
                )
                shared = its.heads // its.kv_heads
                loops.attend(qkv[mine], run.slots, run.positions, run.starts, keys, values, shared, attended[mine])
            loops.quantize(attended, heads.rows, heads.scales)
            loops.normalize(x, layer.o(heads), self._eps, narrow.rows, narrow.scales)
            loops.gate(layer.gate_up(narrow), its.hadamard, inner.rows, inner.scales)
            more = layer.down(inner)
        wanted = _wanted(parts, order, rows)
        x, more = x[wanted], more[wanted]
        last = Quantized.empty(len(wanted), its.hidden)
        loops.normalize(x, more, self._eps, last.rows, last.scales)
        return self._head(last)[:, : its.rows]


def _lay_out(parts: Sequence[Part]) -> list[_Run]:
    """Return the runs of parts that are ordered by slab."""
    runs, first = list[_Run](), 0
    for _, own in groupby(parts, key=lambda part: id(part.slot.slab)):
        slots, positions, starts = list[int](), list[int](), [0]
        for part in own:
            slots += [part.slot.index] * part.count
            positions += range(part.start, part.start + part.count)
            starts += range(starts[-1] + ROWS_AT_ONCE, len(slots), ROWS_AT_ONCE)
            starts.append(len(slots))
        numbers = (np.array(list_, np.int32) for list_ in (slots, positions, starts))
        runs.append(_Run(part.slot.slab, first, first + len(slots), *numbers))
        first += len(slots)
    return runs


def _wanted(parts: Sequence[Part], order: Sequence[int], rows: Sequence[int]) -> list[int]:
    """Return the computed rows whose logits are asked for, in the order of the parts."""
    ends, end = dict[int, int](), 0
    for index in order:
        end += parts[index].count
        ends[index] = end
    return [row for index, count in enumerate(rows) for row in range(ends[index] - count, ends[index])]


def hadamard(size: int) -> torch.Tensor:
    """Return the Hadamard matrix of a power of two; its entries are 1 and -1."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix

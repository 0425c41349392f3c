"""Forward pass on a CPU for models of the llama family: fused products, no modules, rows independent of the batch.

A row's logits are bit-identical whatever is computed with it, because every sum whose order could change is a sum of
integers that float32 or int32 holds exactly: weights and inputs of products are int8, one scale a row; queries and keys
are rounded to a grid, a power of two per vector; attention weights and values to grids that are the same for all rows
of a layer; inputs of the Hadamard product to a grid per row. The rest is computed element by element, or within a row
in an order that depends on the row alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from pydantic import BaseModel
from torch.nn.functional import linear, silu

from fleet_edge.verifiers.packed.kv import LayerShape
from fleet_edge.verifiers.packed.layout import FEW_ROWS, Group, Layout

LEAST_KEYS: Final = 16
"""Fewest keys of an attention call: torch sums fewer numbers than a vector register holds in another order."""

_MANTISSA: Final = 24  # bits of a float32
_EXPONENT: Final = 0x7F800000
_WEIGHT_BITS: Final = 14
"""Bits of attention weights; more where a context has more keys than that."""
_SERIAL: Final = 1 << 15
"""Numbers that torch computes on one thread: if split, the last ones of a part take another code path."""
_SCORES: Final = 1 << 22
"""Most scores of a prompt in memory at once: 16 MiB."""
# As tensors, since numbers are converted to tensors of another type at each use.
_TINY: Final = torch.tensor(1e-30)
_LEVELS: Final = torch.tensor(127.0)
_ZERO: Final = torch.tensor(128.5)  # and a half to round, since conversion truncates
_EXACT_ROWS: Final = 32
"""oneDNN compiles a kernel for each number of rows: above this, numbers are rounded up."""


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
class _Layer:
    qkv: "Product"
    o: "Product"
    gate_up: "Product"
    down: "Product"
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    rope: bool


class Product:
    """Product with a weight `[out, in]`: int8 with one scale a row of either side, or float32."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], name: str, factor: float = 1.0) -> None:
        """Pack `NAME.weight`, with `NAME.scale` for int8, and any `NAME.bias`; `factor` scales int8 products only."""
        weight = tensors[f"{name}.weight"]
        self._bias = tensors.get(f"{name}.bias")
        self._float: torch.Tensor | None = None
        if weight.dtype is torch.int8:
            self._packed = torch.ops.onednn.qlinear_prepack(weight, None)
            self._scale = tensors[f"{name}.scale"] * (factor / 127)
            self._zero = torch.zeros(len(weight), dtype=torch.int64)
        else:
            self._float = weight

    def __call__(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Return `[rows, out]`: the product with rows of `x`, each times its scale `[rows, 1]`."""
        if self._float is not None:
            y = linear(x if scale is None else x * scale, self._float)
        else:
            rows, width = x.shape
            top = x.abs().amax(1, keepdim=True).clamp_min_(_TINY)
            # Unsigned with 128 for zero: oneDNN computes signed inputs a thousand times slower.
            found = torch.mul(x, _LEVELS / top).add_(_ZERO)
            if (padded := _padded(rows)) > rows:
                quantized = torch.empty((padded, width), dtype=torch.uint8)
                quantized[:rows].copy_(found)
            else:
                quantized = found.to(torch.uint8)
            y = torch.ops.onednn.qlinear_pointwise(
                quantized, 1.0, 128, self._packed, self._scale, self._zero, None, 1.0, 0, torch.float32, "none", [], ""
            )
            if padded > rows:
                y = y[:rows]
            y.mul_(top if scale is None else top.mul_(scale))
        return y if self._bias is None else y.add_(self._bias)


def _padded(rows: int) -> int:
    step = 1 if rows <= _EXACT_ROWS else 8 if rows <= 4 * _EXACT_ROWS else _EXACT_ROWS
    return -(-rows // step) * step


class LeanModel:
    """A model of the llama family on a CPU.

    `exact`: weights are int8 and rows independent of the batch; with float32 weights nothing is rounded.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, geometry: Geometry, tensors: Mapping[str, torch.Tensor]) -> None:
        """Prepare the weights that `int8.rotate` or `int8.quantize` return."""
        self.geometry = geometry
        self.exact = tensors["head.weight"].dtype is torch.int8
        self._largest_value = float(1 << value_bits(geometry.context))
        # Sums of attention weights exceed 1 by their rounding, half a unit a key.
        unit = (1 << _MANTISSA) / self._largest_value - geometry.context // 2
        self._weight_unit = torch.tensor(unit)
        self._eps = torch.tensor(geometry.eps * geometry.hidden)
        self._head_eps = torch.tensor(geometry.eps * geometry.head_dim)
        self._embedding = tensors["embedding"]
        self._head = Product(tensors, "head")
        self._layers = [
            _Layer(
                qkv=Product(tensors, f"{layer}.qkv"),
                o=Product(tensors, f"{layer}.o", float(tensors[f"{layer}.value_grid"]) / unit),
                gate_up=Product(tensors, f"{layer}.gate_up"),
                down=Product(tensors, f"{layer}.down"),
                q_norm=tensors.get(f"{layer}.q_norm"),
                k_norm=tensors.get(f"{layer}.k_norm"),
                rope=layer not in geometry.without_rope,
            )
            for layer in range(geometry.layers)
        ]
        angles = torch.arange(geometry.context, dtype=torch.float64)[:, None] * tensors["inv_freq"].double()
        cos, sin = (turn.mul_(geometry.rope_scale).float() for turn in (angles.cos(), angles.sin()))
        self._turns = torch.stack((cos, cos, -sin, sin), 1).view(len(angles), 2, 1, 2, -1)
        size = geometry.hadamard
        small = 1 << (size.bit_length() // 2)
        self._left, self._right = hadamard(size // small), hadamard(small)
        self._score_bits = (_MANTISSA - (geometry.head_dim - 1).bit_length()) // 2
        self._spread_bits = _MANTISSA - (size - 1).bit_length()

    def warm_up(self) -> None:
        """Compile the kernels of all small numbers of rows, each of which takes milliseconds at its first use."""
        layer, its = self._layers[0], self.geometry
        with torch.inference_mode():
            for rows in range(1, _EXACT_ROWS + 1):
                for product in (layer.qkv, layer.gate_up, self._head):
                    product(torch.ones(rows, its.hidden))
                layer.o(torch.ones(rows, its.heads * its.head_dim))
                layer.down(torch.ones(rows, its.inner))

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        size = self.geometry.head_dim
        return (LayerShape(self.geometry.kv_heads, size, size),) * self.geometry.layers

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, layout: Layout, wanted: torch.Tensor) -> torch.Tensor:
        turns = self._turns.index_select(0, positions)
        x = self._embedding[ids].float()
        for number, layer in enumerate(self._layers):
            x = self._feed(layer, self._attend(number, layer, x, turns, layout))
        x = x[wanted]
        return self._head(x, self._norm(x)) if len(x) else x.new_empty(0, self.geometry.rows)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        """Return the RMSNorm factors `[rows, 1]` over the root of the width; the rest is in the weights."""
        norm: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return norm.mul_(norm).add_(self._eps if x.dim() == 2 else self._head_eps).rsqrt_()  # noqa: PLR2004

    def _attend(self, number: int, layer: _Layer, x: torch.Tensor, turns: torch.Tensor, layout: Layout) -> torch.Tensor:
        its = self.geometry
        rows = len(x)
        heads = layer.qkv(x, self._norm(x)).view(rows, its.heads + 2 * its.kv_heads, its.head_dim)
        both, value = heads[:, : -its.kv_heads], heads[:, -its.kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            norm = self._norm(both)
            both[:, : its.heads].mul_(norm[:, : its.heads]).mul_(layer.q_norm)
            both[:, its.heads :].mul_(norm[:, its.heads :]).mul_(layer.k_norm)
        if layer.rope:
            pairs = both.view(rows, -1, 2, its.head_dim // 2)
            both = (pairs * turns[:, 0]).add_(pairs.flip(2).mul_(turns[:, 1])).view(both.shape)
        if self.exact:
            both = _to_grid(both, self._score_bits)
            value.round_().clamp_(-self._largest_value, self._largest_value)
        query, key = both[:, : its.heads], both[:, its.heads :]
        for write in layout.writes:
            slots, places = write.slots.tensor, write.places.tensor
            write.slab.keys[number].transpose(1, 2)[slots, places] = key[write.begin : write.end]
            write.slab.values[number].transpose(1, 2)[slots, places] = value[write.begin : write.end]
        found = [
            self._long(group, number, query) if group.width > FEW_ROWS else self._short(group, number, query)
            for group in layout.groups
        ]
        output = found[0] if len(found) == 1 else torch.cat(found)
        return layer.o(output).add_(x)

    def _short(self, group: Group, number: int, query: torch.Tensor) -> torch.Tensor:
        """Return the output of neighbouring sequences with few rows each, `[rows, heads * head_dim]`."""
        its = self.geometry
        n, width, shared = group.sequences, group.width, its.heads // its.kv_heads
        query = query[group.begin : group.end]
        if group.gather is not None:
            query = query.index_select(0, group.gather.tensor)
        query = query.reshape(n, width, its.kv_heads, shared, its.head_dim).permute(0, 2, 3, 1, 4)
        query = query.reshape(n * its.kv_heads, shared * width, its.head_dim)
        slots = slice(group.first, group.first + n)
        keys = group.slab.keys[number][slots, :, : group.longest].flatten(0, 1)
        values = group.slab.values[number][slots, :, : group.longest].flatten(0, 1)
        scores = torch.bmm(query, keys.transpose(1, 2))
        if width > 1 or n > 1 or group.longest <= LEAST_KEYS:
            _, mask = group.mask(None, heads=shared, dtype=scores.dtype)
            scores.view(n, its.kv_heads, shared * width, -1).add_(mask)
        found = torch.bmm(self._weights(scores), values).view(n, its.kv_heads, shared, width, its.head_dim)
        found = found.permute(0, 3, 1, 2, 4).reshape(n * width, its.heads * its.head_dim)
        return found if group.scatter is None else found.index_select(0, group.scatter.tensor)

    def _long(self, group: Group, number: int, query: torch.Tensor) -> torch.Tensor:
        """Return the output of one sequence with many rows, a bounded number of them at a time."""
        its = self.geometry
        shared = its.heads // its.kv_heads
        keys = group.slab.keys[number][group.first, :, : group.longest]
        values = group.slab.values[number][group.first, :, : group.longest]
        _, mask = group.mask(None, heads=1, dtype=query.dtype)
        at_once = max(1, _SCORES // (its.heads * group.longest))
        found: list[torch.Tensor] = []
        for first in range(group.begin, group.end, at_once):
            piece = query[first : min(first + at_once, group.end)]
            width = len(piece)
            rows = piece.view(width, its.kv_heads, shared, its.head_dim).permute(1, 2, 0, 3)
            scores = torch.bmm(rows.reshape(its.kv_heads, shared * width, its.head_dim), keys.transpose(1, 2))
            begin = first - group.begin
            scores.view(its.kv_heads, shared, width, -1).add_(mask[0, 0, begin : begin + width])
            part = torch.bmm(self._weights(scores), values).view(its.kv_heads, shared, width, its.head_dim)
            found.append(part.permute(2, 0, 1, 3).reshape(width, its.heads * its.head_dim))
        return torch.cat(found)

    def _weights(self, scores: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(scores, -1)
        return weights.mul_(self._weight_unit).round_() if self.exact else weights

    def _feed(self, layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        inner = self.geometry.inner
        both = layer.gate_up(x, self._norm(x))
        gate = both[:, :inner]
        at_once = max(1, _SERIAL // inner)
        parts = [silu(gate[begin : begin + at_once]) for begin in range(0, len(gate), at_once)]
        gate = parts[0] if len(parts) == 1 else torch.cat(parts)
        return layer.down(self._spread(gate.mul_(both[:, inner:]))).add_(x)

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        """Return the Hadamard product, without its factor, as that of two small matrices."""
        if self.exact:
            x = _to_grid(x, self._spread_bits)
        y = (x.view(-1, len(self._right)) @ self._right).view(-1, len(self._left), len(self._right))
        return torch.matmul(self._left, y).view(x.shape)


def _to_grid(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Return vectors rounded to multiples of a power of two; the largest multiple is below `2 ** bits`."""
    top = x.abs().amax(-1, keepdim=True)
    power = top.view(torch.int32).bitwise_and_(_EXPONENT).view(torch.float32)
    # A float32 of this size has no finer bits than the unit, 2 ** (1 - bits) powers.
    large = power.mul_(1.5 * 2.0 ** (_MANTISSA - bits))
    return (x + large).sub_(large)


def value_bits(context: int) -> int:
    """Return the bits of values, without sign, for which their sums over a context are exact."""
    return _MANTISSA - max(_WEIGHT_BITS, (context - 1).bit_length())


def hadamard(size: int) -> torch.Tensor:
    """Return the Hadamard matrix of a power of two; its entries are 1 and -1."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix

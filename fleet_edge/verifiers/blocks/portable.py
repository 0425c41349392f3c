"""Product with a tile in plain loops, for processors that no kernel serves; it also says what the kernels compute."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fleet_edge.verifiers.blocks.compiler import compiled
from fleet_edge.verifiers.blocks.layout import BLOCK, FOUR, TILE, Format

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

PlainInputs = tuple[npt.NDArray[np.int8], Floats, npt.NDArray[np.int32]]
"""Values, scales and sums of `Inputs`, for compiled loops."""
PlainFormat = tuple[int, int, bool, np.float32, Bytes]
"""Bits, zero, whether there are minimums, the factor of all scales, and the values of four bits."""

MAGIC: Final = np.float32(1.5 * 2**23)
MAGIC_BITS: Final = 0x4B400000

_f32 = np.float32
_FOUR_BITS: Final = FOUR.bits


@intrinsic  # type: ignore[untyped-decorator]
def fma(_context: Any, _a: Any, _b: Any, _c: Any) -> Any:
    """`a * b + c`, rounded once."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def bits_of(_context: Any, _number: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def from_bits(_context: Any, _bits: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@compiled
def from_half(bits: int) -> Any:
    """Return the float32 of a float16; one that is no number counts as infinite."""
    positive = from_bits(np.int32((bits & 0x7FFF) << 13)) * _f32(2.0**112)
    if positive >= _f32(2**16):
        positive = _f32(np.inf)
    return -positive if bits & 0x8000 else positive


@compiled
def half_at(halves: Bytes, index: int) -> Any:
    return from_half(halves[2 * index] | halves[2 * index + 1] << 8)


def values_of(kind: Format) -> Bytes:
    """Return the values that four bits stand for."""
    return np.array(kind.table or range(16), np.uint8)


@compiled
def _unpack(block: Bytes, bits: int, table: Bytes, values: Bytes) -> None:
    if bits == _FOUR_BITS:
        half = len(values) // 2
        for i in range(half):
            values[i], values[half + i] = table[block[i] & 15], table[block[i] >> 4]
    else:
        values[:] = block[: len(values)]


@compiled
def _add(weights: Bytes, inputs: npt.NDArray[np.int8], sums: npt.NDArray[np.int32]) -> None:
    for step in range(BLOCK // 4):
        a, b = np.int32(inputs[4 * step]), np.int32(inputs[4 * step + 1])
        c, d = np.int32(inputs[4 * step + 2]), np.int32(inputs[4 * step + 3])
        for i in range(TILE):
            four = weights[step, i]
            sums[i] += four[0] * a + four[1] * b + four[2] * c + four[3] * d


@compiled
def cleared(scale: np.float32) -> Any:
    """Return a scale whose two lowest bits are zero."""
    return from_bits(bits_of(scale) & np.int32(-4))


@compiled
def portable_tile(tile: Bytes, inputs: PlainInputs, kind: PlainFormat, bias: Floats, out: Floats) -> None:
    values, input_scales, input_sums = inputs
    bits, zero, minimums, factor, table = kind
    blocks = input_scales.shape[1]
    size = len(tile) // blocks
    unpacked = np.empty((BLOCK // 4, TILE, 4), np.uint8)
    scales, least, sums = np.empty(TILE, np.float32), np.zeros(TILE, np.float32), np.empty(TILE, np.int32)
    out[:] = _f32(0)
    for block in range(blocks):
        mine = tile[block * size : block * size + size]
        _unpack(mine, bits, table, unpacked.reshape(-1))
        factors = mine[TILE * BLOCK * bits // 8 :]
        for i in range(TILE):
            scales[i] = half_at(factors, i)
            if minimums:
                least[i] = half_at(factors, TILE + i)
        for row in range(len(out)):
            sums[:] = -zero * input_sums[row, block]
            _add(unpacked, values[row, block * BLOCK : block * BLOCK + BLOCK], sums)
            scale = cleared(input_scales[row, block]) * factor
            of_inputs = scale * _f32(input_sums[row, block])
            for i in range(TILE):
                total = fma(_f32(sums[i]) * scale, scales[i], out[row, i])
                out[row, i] = fma(of_inputs, least[i], total) if minimums else total
    for row in range(len(out)):
        for i in range(TILE):
            out[row, i] += bias[i]

"""Products of quantized inputs with packed weights.

An output is the same bits for any batch, number of threads and processor: the sum of a block is a sum of integers, and
the blocks of a row are added in their order, each with fused operations,

    total = fma(float32(sum) * input_scale, scale, total)
    total = fma(float32(sum_of_inputs) * input_scale, minimum, total)    # where the format has minimums

then the bias is added. The two lowest bits of an input's scale count as zero.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import prange, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from fleet_edge.verifiers.blocks import kernels
from fleet_edge.verifiers.blocks.layout import BLOCK, TILE, Format
from fleet_edge.verifiers.blocks.portable import (
    MAGIC,
    MAGIC_BITS,
    Bytes,
    Floats,
    bits_of,
    compiled,
    from_bits,
    portable_tile,
)
from fleet_edge.verifiers.blocks.weights import Weights

PORTABLE: Final = "portable"

_f32 = np.float32


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Quantized rows: `values * scales`, with a scale and the sum of values for each block."""

    values: npt.NDArray[np.int8]  # [rows, inputs], -127 to 127
    scales: Floats  # [rows, inputs / 32]
    sums: npt.NDArray[np.int32]  # [rows, inputs / 32]

    @classmethod
    def empty(cls, rows: int, width: int) -> "Inputs":
        blocks = width // BLOCK
        return cls(
            np.empty((rows, width), np.int8), np.empty((rows, blocks), np.float32), np.empty((rows, blocks), np.int32)
        )


@intrinsic  # type: ignore[untyped-decorator]
def _call(
    _context: Any, address: Any, tile: Any, values: Any, prepared: Any, bias: Any, out: Any, groups: Any, stride: Any
) -> Any:
    """Call a compiled kernel."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        integer, pointer = ir.IntType(64), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer] * 5 + [integer] * 2)
        pointers = [builder.inttoptr(arg, pointer) for arg in args[1:6]]
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [*pointers, *args[6:]])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


@compiled
def _prepare(scales: Floats, sums: npt.NDArray[np.int32], zero: int, factor: np.float32, into: Floats) -> None:
    """Write what kernels read for each row and block."""
    for row in range(len(scales)):
        for block in range(scales.shape[1]):
            scale = from_bits(bits_of(scales[row, block]) & np.int32(-4)) * factor
            into[row, block, 0] = scale
            into[row, block, 1] = scale * -MAGIC
            into[row, block, 2] = from_bits(np.int32(MAGIC_BITS - zero * sums[row, block]))
            into[row, block, 3] = scale * _f32(sums[row, block])


def _multiply_portable(
    tiles: Bytes,
    values: npt.NDArray[np.int8],
    prepared: Floats,
    bits: int,
    minimums: bool,
    bias: Floats,
    out: Floats,
    column: int,
) -> None:
    for number in prange(len(tiles)):
        begin = number * TILE
        its = out[:, column + begin : column + begin + TILE]
        portable_tile(tiles[number], values, prepared, (bits, minimums), bias[begin : begin + TILE], its)


def _multiply(
    addresses: npt.NDArray[np.int64],
    tiles: Bytes,
    values: Any,
    prepared: Floats,
    bias: Floats,
    out: Floats,
    column: int,
) -> None:
    """Multiply all rows with all tiles; `addresses` are the kernels for 1, 2, … rows."""
    rows, groups, stride = len(values), prepared.shape[1], out.shape[1]
    passes = (rows + len(addresses) - 1) // len(addresses)
    for number in prange(len(tiles)):
        for part in range(passes):
            row, end = part * rows // passes, (part + 1) * rows // passes
            _call(
                addresses[end - row - 1],
                tiles[number].ctypes.data,
                values[row].ctypes.data,
                prepared[row].ctypes.data,
                bias.ctypes.data + number * TILE * 4,
                out[row].ctypes.data + (column + number * TILE) * 4,
                groups,
                stride,
            )


@cache
def _loops(*, parallel: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return the loops over tiles: with kernels, and the portable one."""
    return compiled(_multiply, parallel=parallel), compiled(_multiply_portable, parallel=parallel)


def _features() -> Iterable[str]:
    """Return the features of the processor, or those that NUMBA_CPU_FEATURES allows."""
    features = numba.config.CPU_FEATURES
    listed = (get_host_cpu_features() if features is None else features).split(",")
    return {each.removeprefix("+") for each in listed if each.startswith("+")}


@cache
def variants() -> tuple[str, ...]:
    """Return the names of the kernels that this processor can run, best first."""
    found = set(_features())
    runs = [name for name, its in kernels.PROCESSORS.items() if its.needs <= found]
    return (*runs, PORTABLE)


@cache
def _addresses(variant: str, kind: Format) -> npt.NDArray[np.int64]:
    if variant not in variants():
        raise ValueError(f"This processor does not run the kernels for {variant}.")
    return np.array(kernels.compiled(variant, kind)[1], np.int64)


@cache
def _no_bias(outputs: int) -> Floats:
    return np.zeros(outputs, np.float32)


def multiply(
    weights: Weights,
    inputs: Inputs,
    bias: Floats | None,
    out: Floats,
    column: int = 0,
    *,
    variant: str | None = None,
) -> None:
    """Write the products to `out[:, column : column + weights.padded_outputs]`; `out` is contiguous.

    As many threads take part as `numba.set_num_threads` says.
    """
    if bias is None:
        bias = _no_bias(weights.padded_outputs)
    elif len(bias) < weights.padded_outputs:
        bias = np.pad(bias, (0, weights.padded_outputs - len(bias)))
    variant = variant or variants()[0]
    kind = weights.format
    prepared = np.empty((*inputs.scales.shape, 4), np.float32)
    _prepare(inputs.scales, inputs.sums, kind.zero, _f32(weights.factor), prepared)
    fast, portable = _loops(parallel=numba.get_num_threads() > 1)
    if variant == PORTABLE:
        portable(weights.tiles, inputs.values, prepared, kind.bits, kind.minimums, bias, out, column)
    else:
        fast(_addresses(variant, kind), weights.tiles, inputs.values, prepared, bias, out, column)

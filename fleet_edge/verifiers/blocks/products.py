"""Products of quantized inputs with packed weights.

An output is the same bits for any batch, number of threads and processor: the sum of a block is a sum of integers, and
the blocks of a row are added in their order, each with fused operations,

    total = fma(float32(sum) * input_scale, scale, total)
    total = fma(float32(sum_of_inputs) * input_scale, minimum, total)    # where the format has minimums

then the bias is added. The two lowest bits of an input's scale count as zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic

from fleet_edge.verifiers.blocks import kernels
from fleet_edge.verifiers.blocks.compiler import compiled, processor_features
from fleet_edge.verifiers.blocks.emitter import PREPARED
from fleet_edge.verifiers.blocks.layout import BLOCK, TILE, Format
from fleet_edge.verifiers.blocks.portable import (
    MAGIC,
    MAGIC_BITS,
    Bytes,
    Floats,
    PlainFormat,
    PlainInputs,
    bits_of,
    cleared,
    portable_tile,
    values_of,
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
def _call(_context: Any, address: Any, tile: Any, prepared: Any, bias: Any, out: Any, groups: Any, stride: Any) -> Any:
    """Call a compiled kernel."""

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        integer, pointer = ir.IntType(64), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer] * 4 + [integer] * 2)
        pointers = [builder.inttoptr(arg, pointer) for arg in args[1:5]]
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [*pointers, *args[5:]])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), generate


@compiled
def _prepare(
    values: npt.NDArray[np.int32],
    scales: Floats,
    sums: npt.NDArray[np.int32],
    numbers: tuple[int, np.float32],
    most: int,
    into: npt.NDArray[np.int32],
) -> None:
    """Write what kernels read, for passes of so many rows at most; `numbers` are the format's zero and the factor."""
    rows, groups = scales.shape
    passes = (rows + most - 1) // most
    at = 0
    for part in range(passes):
        begin, end = part * rows // passes, (part + 1) * rows // passes
        for block in range(groups):
            for row in range(begin, end):
                _prepare_block(values, scales, sums, numbers, row, block, into, at)
                at += PREPARED


@compiled
def _prepare_block(
    values: npt.NDArray[np.int32],
    scales: Floats,
    sums: npt.NDArray[np.int32],
    numbers: tuple[int, np.float32],
    row: int,
    block: int,
    into: npt.NDArray[np.int32],
    at: int,
) -> None:
    zero, factor = numbers
    for word in range(BLOCK // 4):
        into[at + word] = values[row, block * (BLOCK // 4) + word]
    scale, total = cleared(scales[row, block]) * factor, sums[row, block]
    into[at + BLOCK // 4] = bits_of(scale)
    into[at + BLOCK // 4 + 1] = bits_of(scale * -MAGIC)
    into[at + BLOCK // 4 + 2] = np.int32(MAGIC_BITS - zero * total)
    into[at + BLOCK // 4 + 3] = bits_of(scale * _f32(total))


@compiled
def _prepare_sorted(
    values: npt.NDArray[np.int32],
    scales: Floats,
    sums: npt.NDArray[np.int32],
    numbers: tuple[int, np.float32],
    most: int,
    rows: npt.NDArray[np.int32],
    starts: npt.NDArray[np.int32],
    into: npt.NDArray[np.int32],
) -> None:
    """Write what kernels read of rows that are sorted by expert, whose first places are `starts`."""
    at = 0
    for expert in range(len(starts) - 1):
        first, count = starts[expert], starts[expert + 1] - starts[expert]
        passes = (count + most - 1) // most
        for part in range(passes):
            begin, end = first + part * count // passes, first + (part + 1) * count // passes
            for block in range(scales.shape[1]):
                for place in range(begin, end):
                    row = rows[place]
                    _prepare_block(values, scales, sums, numbers, row, block, into, at)
                    at += PREPARED


def _multiply_portable(
    tiles: Bytes, inputs: PlainInputs, kind: PlainFormat, bias: Floats, out: Floats, column: int
) -> None:
    for number in prange(len(tiles)):
        begin = number * TILE
        its = out[:, column + begin : column + begin + TILE]
        portable_tile(tiles[number], inputs, kind, bias[begin : begin + TILE], its)


def _multiply(
    addresses: npt.NDArray[np.int64],
    tiles: Bytes,
    prepared: npt.NDArray[np.int32],
    bias: Floats,
    out: Floats,
    column: int,
) -> None:
    """Multiply all rows with all tiles; `addresses` are the kernels for 1, 2, … rows."""
    rows, stride = out.shape
    groups = len(prepared) // (rows * PREPARED)
    passes = (rows + len(addresses) - 1) // len(addresses)
    for number in prange(len(tiles)):
        for part in range(passes):
            row, end = part * rows // passes, (part + 1) * rows // passes
            _call(
                addresses[end - row - 1],
                tiles[number].ctypes.data,
                prepared.ctypes.data + row * groups * PREPARED * 4,
                bias.ctypes.data + number * TILE * 4,
                out[row].ctypes.data + (column + number * TILE) * 4,
                groups,
                stride,
            )


def _multiply_sorted(
    addresses: npt.NDArray[np.int64],
    tiles: Bytes,
    prepared: npt.NDArray[np.int32],
    starts: npt.NDArray[np.int32],
    bias: Floats,
    out: Floats,
    column: int,
) -> None:
    """Multiply rows that are sorted by expert with the tiles of their expert; one tile's `bias` serves all."""
    stride, experts = out.shape[1], len(starts) - 1
    each = len(tiles) // experts
    groups, most = len(prepared) // (len(out) * PREPARED), len(addresses)
    used = np.nonzero(starts[1:] > starts[:-1])[0]
    for task in prange(len(used) * each):
        expert, number = used[task // each], task % each
        first, count = starts[expert], starts[expert + 1] - starts[expert]
        passes = (count + most - 1) // most
        tile = expert * each + number
        for part in range(passes):
            row, end = first + part * count // passes, first + (part + 1) * count // passes
            _call(
                addresses[end - row - 1],
                tiles[tile].ctypes.data,
                prepared.ctypes.data + row * groups * PREPARED * 4,
                bias.ctypes.data + tile * TILE % len(bias) * 4,
                out[row].ctypes.data + (column + number * TILE) * 4,
                groups,
                stride,
            )


@cache
def _loops(*, parallel: bool) -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]]:
    """Return the loops over tiles: with kernels, with kernels and experts, and the portable one."""
    every = (_multiply, _multiply_sorted, _multiply_portable)
    first, second, third = (compiled(loop, parallel=parallel) for loop in every)
    return first, second, third


@cache
def variants() -> tuple[str, ...]:
    """Return the names of the kernels that this processor can run, best first."""
    runs = [name for name, its in kernels.PROCESSORS.items() if its.needs <= processor_features()]
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
    kind, factor = weights.format, _f32(weights.factor)
    fast, _, portable = _loops(parallel=numba.get_num_threads() > 1)
    if variant == PORTABLE:
        given = (inputs.values, inputs.scales, inputs.sums)
        portable(
            weights.tiles, given, (kind.bits, kind.zero, kind.minimums, factor, values_of(kind)), bias, out, column
        )
        return
    addresses = _addresses(variant, kind)
    prepared = np.empty(inputs.scales.size * PREPARED, np.int32)
    words = inputs.values.view(np.int32)
    _prepare(words, inputs.scales, inputs.sums, (kind.zero, factor), len(addresses), prepared)
    fast(addresses, weights.tiles, prepared, bias, out, column)


def multiply_experts(
    weights: Weights,
    inputs: Inputs,
    rows: npt.NDArray[np.int32],
    starts: npt.NDArray[np.int32],
    bias: Floats | None,
    out: Floats,
    column: int = 0,
    *,
    variant: str | None = None,
) -> None:
    """Write the products of rows with the weights of their experts, which follow each other in `weights`.

    `rows` are the rows of the inputs, sorted by expert; those of an expert are at `starts[expert]` and behind. The
    outputs of an expert are whole tiles.
    """
    variant = variant or variants()[0]
    kind, factor = weights.format, _f32(weights.factor)
    experts = len(starts) - 1
    if variant == PORTABLE:
        each = weights.outputs // experts
        for expert in np.nonzero(starts[1:] > starts[:-1])[0]:
            its = slice(starts[expert], starts[expert + 1])
            part = Inputs(inputs.values[rows[its]], inputs.scales[rows[its]], inputs.sums[rows[its]])
            tiles = weights.tiles[expert * each // TILE : (expert + 1) * each // TILE]
            own = None if bias is None else bias[expert * each : (expert + 1) * each]
            one = Weights(tiles, each, weights.inputs, kind, weights.factor)
            multiply(one, part, own, out[its], column, variant=variant)
        return
    addresses = _addresses(variant, kind)
    prepared = np.empty(len(rows) * inputs.scales.shape[1] * PREPARED, np.int32)
    words = inputs.values.view(np.int32)
    numbers = (kind.zero, factor)
    _prepare_sorted(words, inputs.scales, inputs.sums, numbers, len(addresses), rows, starts, prepared)
    _, fast, _ = _loops(parallel=numba.get_num_threads() > 1)
    fast(addresses, weights.tiles, prepared, starts, _no_bias(TILE) if bias is None else bias, out, column)

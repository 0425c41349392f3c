"""Loops of the int8 forward pass, compiled for the processor at hand by numba.

Results do not depend on the processor, on the number of threads, or on which rows are computed together: int8 products
are sums of integers, and float32 operations are those of IEEE 754, in an order that the row alone determines. So
nothing here may be compiled with `fastmath`, and a sum of many floats goes through `_total`.

A product of few rows is bound by memory, which five rows read as often as one. Weights lie as the multiply-add
instruction reads them: in tiles of some outputs, and in a tile four inputs of each output after the other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, TypeVar, cast

import llvmlite.binding as llvm
import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int32]
_Loop = TypeVar("_Loop", bound=Callable[..., Any])

LANES: Final = 16
"""Outputs in a vector of sums, whatever the processor's vectors hold; also terms of a sum that are added separately."""

_f32 = np.float32
_ONE: Final = np.float32(1)
_LEVELS: Final = np.float32(127)
_ZERO_POINT: Final = 128
_ROUNDING_ZERO: Final = np.float32(128.5)  # conversion to integers truncates
_TINY: Final = np.float32(1e-30)

_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_SUMS, _FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)

llvm.initialize_native_asmparser()  # for `vpdpbusd`


def has_vnni() -> bool:
    """Return whether one instruction multiplies and adds 64 pairs of 8-bit integers."""
    features = numba.config.CPU_FEATURES
    return "+avx512vnni" in (get_host_cpu_features() if features is None else features).split(",")


VNNI: Final = has_vnni()
TILE_VECTORS: Final = 4 if VNNI else 1
TILE_ROWS: Final = 6 if VNNI else 2
"""Rows that share a pass over a tile: as many as the processor has registers for."""
TILE: Final = TILE_VECTORS * LANES
"""Outputs of a tile."""
_DEPTH: Final = 4  # inputs of an output that lie together

ROWS_AT_ONCE: Final = 8
"""Rows of one sequence that read its keys and values together."""
_KEYS_AT_ONCE: Final = 128
"""Keys and values that stay in the nearest cache while these rows read them."""


def _compiled(function: _Loop) -> _Loop:
    return cast("_Loop", numba.njit(error_model="numpy", nogil=True)(function))


@intrinsic  # type: ignore[untyped-decorator]
def _fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`, rounded once."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _power_of_two(context: Any, shifted: Any) -> Any:
    """`2 ** n` for a float of `1.5 * 2 ** 23 + n`."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        exponent = builder.shl(builder.bitcast(args[0], _I32), ir.Constant(_I32, 23))
        return builder.bitcast(builder.add(exponent, ir.Constant(_I32, 0x3F800000)), _F32)

    return types.float32(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _ordered(context: Any, number: Any) -> Any:
    """An integer for a float, in the same order; a largest integer is found with vectors, a largest float is not."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _reordered(builder, builder.bitcast(args[0], _I32))

    return types.int32(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _unordered(context: Any, number: Any) -> Any:
    """The float of an integer of `_ordered`."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(_reordered(builder, args[0]), _F32)

    return types.float32(types.int32), generate


def _reordered(builder: Any, bits: Any) -> Any:
    negative = builder.ashr(bits, ir.Constant(_I32, 31))
    return builder.xor(bits, builder.and_(negative, ir.Constant(_I32, 0x7FFFFFFF)))


@_compiled
def _exp(x: Any) -> Any:
    """`exp(x)` for `x` up to 88, off by 1e-7 of it at most (coefficients of Cephes' expf)."""
    x = max(x, _f32(-87))
    shifted = _fma(x, _f32(1.44269504), _f32(12582912))
    n = shifted - _f32(12582912)
    r = _fma(n, _f32(2.12194440e-4), _fma(n, _f32(-0.693359375), x))
    p = _fma(_f32(1.9875691500e-4), r, _f32(1.3981999507e-3))
    p = _fma(p, r, _f32(8.3334519073e-3))
    p = _fma(p, r, _f32(4.1665795894e-2))
    p = _fma(p, r, _f32(1.6666665459e-1))
    p = _fma(p, r, _f32(5.0000001201e-1))
    return (_fma(p, r * r, r) + _ONE) * _power_of_two(shifted)


@_compiled
def _total(lanes: Floats) -> Any:
    """The sum of 16 partial sums, in a fixed order."""
    half = LANES // 2
    while half:
        for i in range(half):
            lanes[i] += lanes[i + half]
        half //= 2
    return lanes[0]


@_compiled
def _sum_of_squares(row: Floats, lanes: Floats) -> Any:
    for i in range(LANES):
        lanes[i] = _f32(0)
    whole = len(row) // LANES * LANES
    for begin in range(0, whole, LANES):
        part = row[begin : begin + LANES]
        for i in range(LANES):
            lanes[i] = _fma(part[i], part[i], lanes[i])
    for i in range(whole, len(row)):
        lanes[i - whole] = _fma(row[i], row[i], lanes[i - whole])
    return _total(lanes)


@_compiled
def _quantize(row: Floats, into: Bytes) -> Any:
    """Write a row as bytes with 128 for zero; return its scale."""
    largest = np.int32(0)
    for i in range(len(row)):
        largest = max(largest, _ordered(abs(row[i])))
    top = max(_unordered(largest), _TINY)
    factor = _LEVELS / top
    for i in range(len(row)):
        into[i] = np.uint8(np.int32(_fma(row[i], factor, _ROUNDING_ZERO)))
    return top / _LEVELS


@_compiled
def _hadamard(a: Floats, b: Floats) -> None:
    """Multiply `a` with the Hadamard matrix of its size; the product is in `b` for an odd power of two, else in `a`.

    Each pass is the same: sums of neighbours go to the first half, differences to the second.
    """
    half = len(a) // 2
    size = len(a)
    while size > 1:
        _butterflies(a, b[:half], b[half:])
        a, b = b, a
        size //= 2


@_compiled
def _butterflies(a: Floats, sums: Floats, differences: Floats) -> None:
    for i in range(len(sums)):
        left, right = a[2 * i], a[2 * i + 1]
        sums[i] = left + right
        differences[i] = left - right


@_compiled
def _gated(gate: Floats, up: Floats, into: Floats) -> None:
    for i in range(len(into)):
        into[i] = gate[i] / (_ONE + _exp(-gate[i])) * up[i]


@_compiled
def _turn(left: Floats, right: Floats, cos: Floats, sin: Floats) -> None:
    """Rotary embedding of a head, in place."""
    for i in range(len(left)):
        a, b = left[i], right[i]
        left[i] = _fma(a, cos[i], -(b * sin[i]))
        right[i] = _fma(b, cos[i], a * sin[i])


@_compiled
def _scores(query: Floats, keys: Floats, begin: int, end: int, into: Floats) -> None:
    """Scores of one query: `keys` are `[dim, capacity]`, so that scores of several keys are computed side by side."""
    for t in range(len(into)):
        into[t] = _f32(0)
    for d in range(0, len(query), 4):
        q0, q1, q2, q3 = query[d], query[d + 1], query[d + 2], query[d + 3]
        k0, k1 = keys[d, begin:end], keys[d + 1, begin:end]
        k2, k3 = keys[d + 2, begin:end], keys[d + 3, begin:end]
        for t in range(len(into)):
            into[t] = _fma(q3, k3[t], _fma(q2, k2[t], _fma(q1, k1[t], _fma(q0, k0[t], into[t]))))


@_compiled
def _two_scores(
    query: Floats, other: Floats, keys: Floats, begin: int, end: int, into: Floats, other_into: Floats
) -> None:
    """Compute what `_scores` does for two queries that read the keys together."""
    for t in range(len(into)):
        into[t] = _f32(0)
        other_into[t] = _f32(0)
    for d in range(0, len(query), 4):
        q0, q1, q2, q3 = query[d], query[d + 1], query[d + 2], query[d + 3]
        p0, p1, p2, p3 = other[d], other[d + 1], other[d + 2], other[d + 3]
        k0, k1 = keys[d, begin:end], keys[d + 1, begin:end]
        k2, k3 = keys[d + 2, begin:end], keys[d + 3, begin:end]
        for t in range(len(into)):
            a, b, c, e = k0[t], k1[t], k2[t], k3[t]
            into[t] = _fma(q3, e, _fma(q2, c, _fma(q1, b, _fma(q0, a, into[t]))))
            other_into[t] = _fma(p3, e, _fma(p2, c, _fma(p1, b, _fma(p0, a, other_into[t]))))


@_compiled
def _exponentials(scores: Floats, lanes: Floats) -> Any:
    """Replace scores by their exponentials, up to a factor; return the sum."""
    largest = np.int32(-(2**31))
    for t in range(len(scores)):
        largest = max(largest, _ordered(scores[t]))
    top = _unordered(largest)
    for t in range(len(scores)):
        scores[t] = _exp(scores[t] - top)
    for i in range(LANES):
        lanes[i] = _f32(0)
    whole = len(scores) // LANES * LANES
    for begin in range(0, whole, LANES):
        part = scores[begin : begin + LANES]
        for i in range(LANES):
            lanes[i] += part[i]
    for t in range(whole, len(scores)):
        lanes[t - whole] += scores[t]
    return _total(lanes)


@_compiled
def _add_values(weights: Floats, values: Floats, into: Floats) -> None:
    n = len(weights)
    whole = n // 4 * 4
    for t in range(0, whole, 4):
        w0, w1, w2, w3 = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
        v0, v1, v2, v3 = values[t], values[t + 1], values[t + 2], values[t + 3]
        for i in range(len(into)):
            into[i] = _fma(w3, v3[i], _fma(w2, v2[i], _fma(w1, v1[i], _fma(w0, v0[i], into[i]))))
    for t in range(whole, n):
        weight, value = weights[t], values[t]
        for i in range(len(into)):
            into[i] = _fma(weight, value[i], into[i])


def _tile_of(rows: int) -> Callable[..., None]:
    """Return the function that multiplies `rows` rows with a tile of weights."""

    @intrinsic  # type: ignore[untyped-decorator]
    def multiply(
        _context: Any,
        tile: Any,
        x: Any,
        row: Any,
        offset: Any,
        scale: Any,
        row_scale: Any,
        bias: Any,
        out: Any,
        column: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            arrays = [
                context.make_array(kind)(context, builder, arg) if isinstance(kind, types.Array) else None
                for kind, arg in zip(signature.args, args, strict=True)
            ]
            _emit_tile(builder, rows, arrays, args[2], args[8])
            return context.get_dummy_value()

        return types.void(tile, x, row, offset, scale, row_scale, bias, out, column), generate

    return cast("Callable[..., None]", multiply)


def _emit_tile(builder: Any, rows: int, arrays: list[Any], row: Any, column: Any) -> None:
    tile, x, _, offset, scale, row_scale, bias, out, _ = arrays
    width = cgutils.unpack_tuple(builder, x.shape)[1]
    out_width = cgutils.unpack_tuple(builder, out.shape)[1]
    zero = ir.Constant(_I64, 0)

    def at(array: Any, kind: Any, index: Any, whole: Any) -> Any:
        place = builder.gep(builder.bitcast(array.data, kind.as_pointer()), [index])
        return builder.bitcast(place, whole.as_pointer())

    def load(array: Any, kind: Any, index: Any, whole: Any) -> Any:
        found = builder.load(at(array, kind, index, whole))
        found.align = 1
        return found

    def spread(number: Any, vector: Any) -> Any:
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.Constant(_I32, 0))
        return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(_SUMS, [0] * LANES))

    numbers = [builder.add(row, ir.Constant(_I64, number)) for number in range(rows)]
    begins = [builder.mul(number, width) for number in numbers]
    before, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(_I64)
    step.add_incoming(zero, before)
    empty = ir.Constant(_accumulator(), [0] * _accumulator().count)
    sums = [[builder.phi(_accumulator()) for _ in range(TILE_VECTORS)] for _ in range(rows)]
    begin = builder.mul(step, ir.Constant(_I64, TILE * _DEPTH))
    weights = [
        load(tile, _I8, builder.add(begin, ir.Constant(_I64, LANES * _DEPTH * vector)), _SUMS)
        for vector in range(TILE_VECTORS)
    ]
    following = builder.add(step, ir.Constant(_I64, 1))
    inputs = builder.mul(step, ir.Constant(_I64, _DEPTH))
    for of_row, row_begin in zip(sums, begins, strict=True):
        four = spread(load(x, _I8, builder.add(row_begin, inputs), _I32), _SUMS)
        for vector, accumulated in enumerate(of_row):
            accumulated.add_incoming(empty, before)
            accumulated.add_incoming(_multiply_add(builder, accumulated, four, weights[vector]), loop)
    step.add_incoming(following, loop)
    more = builder.icmp_unsigned("<", builder.mul(following, ir.Constant(_I64, _DEPTH)), width)
    builder.cbranch(more, loop, after)
    builder.position_at_end(after)
    for vector in range(TILE_VECTORS):
        place = builder.add(column, ir.Constant(_I64, LANES * vector))
        zeros, factor = load(offset, _I32, place, _SUMS), load(scale, _F32, place, _FLOATS)
        added = load(bias, _F32, place, _FLOATS)
        for number, of_row in zip(numbers, sums, strict=True):
            total = builder.sub(_folded(builder, of_row[vector].incomings[1][0]), zeros)
            row_factor = spread(load(row_scale, _F32, number, _F32), _FLOATS)
            product = builder.fmul(builder.fmul(builder.sitofp(total, _FLOATS), factor), row_factor)
            into = at(out, _F32, builder.add(builder.mul(number, out_width), place), _FLOATS)
            builder.store(builder.fadd(product, added), into).align = 4


def _accumulator() -> Any:
    """Return the type of sums: with VNNI one a lane, else one of even and one of odd pairs, side by side."""
    return _SUMS if VNNI else ir.VectorType(_I32, 2 * LANES)


def _multiply_add(builder: Any, sums: Any, x: Any, weights: Any) -> Any:
    """Add to each sum the products of unsigned bytes of `x` and signed bytes of `weights`."""
    if VNNI:
        kind = ir.FunctionType(_SUMS, [_SUMS] * 3)
        return builder.asm(kind, "vpdpbusd $3, $2, $0", "=v,0,v,v", [sums, x, weights], side_effect=False)
    # The compiler knows these sums of two products as one instruction of most processors.
    count = LANES * _DEPTH
    unsigned = builder.zext(builder.bitcast(x, ir.VectorType(_I8, count)), ir.VectorType(_I16, count))
    signed = builder.sext(builder.bitcast(weights, ir.VectorType(_I8, count)), ir.VectorType(_I16, count))
    wide = ir.VectorType(_I32, count // 2)
    for first in (0, 1):
        sums = builder.add(
            sums,
            builder.mul(
                builder.sext(_every_second(builder, unsigned, first), wide),
                builder.sext(_every_second(builder, signed, first), wide),
            ),
        )
    return sums


def _folded(builder: Any, sums: Any) -> Any:
    return sums if VNNI else builder.add(_every_second(builder, sums, 0), _every_second(builder, sums, 1))


def _every_second(builder: Any, vector: Any, first: int) -> Any:
    count = vector.type.count // 2
    places = ir.Constant(ir.VectorType(_I32, count), [first + 2 * place for place in range(count)])
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), places)


_tile_1, _tile_2, _tile_3, _tile_4, _tile_5, _tile_6 = (_tile_of(min(rows, TILE_ROWS)) for rows in range(1, 7))


@_compiled
def _multiply_tile(
    tile: Bytes, x: Bytes, offset: Integers, scale: Floats, row_scale: Floats, bias: Floats, out: Floats, column: int
) -> None:
    row = 0
    while row < len(x):
        rows = min(len(x) - row, TILE_ROWS)
        if rows == 1:
            _tile_1(tile, x, row, offset, scale, row_scale, bias, out, column)
        elif rows == 2:
            _tile_2(tile, x, row, offset, scale, row_scale, bias, out, column)
        elif rows == 3:
            _tile_3(tile, x, row, offset, scale, row_scale, bias, out, column)
        elif rows == 4:
            _tile_4(tile, x, row, offset, scale, row_scale, bias, out, column)
        elif rows == 5:
            _tile_5(tile, x, row, offset, scale, row_scale, bias, out, column)
        else:
            _tile_6(tile, x, row, offset, scale, row_scale, bias, out, column)
        row += rows


@_compiled
def _score_rows(
    query: Floats, first: int, left: int, positions: Integers, keys: Floats, shared: int, scores: Floats
) -> None:
    """Write the scores of `shared` heads of some rows, whose queries begin at `left`."""
    dim, longest = len(keys), scores.shape[1]
    for begin in range(0, longest, _KEYS_AT_ONCE):
        end = min(begin + _KEYS_AT_ONCE, longest)
        for row in range(len(positions)):
            if positions[row] < begin:
                continue
            mine, at, place = query[first + row], left, row * shared
            for _ in range(shared // 2):
                one, other = mine[at : at + dim], mine[at + dim : at + 2 * dim]
                _two_scores(one, other, keys, begin, end, scores[place, begin:end], scores[place + 1, begin:end])
                at, place = at + 2 * dim, place + 2
            if shared % 2:
                _scores(mine[at : at + dim], keys, begin, end, scores[place, begin:end])


@_compiled
def _mix_rows(
    scores: Floats, positions: Integers, values: Floats, shared: int, out: Floats, first: int, left: int
) -> None:
    """Write the means of values, weighted by the exponentials of the scores."""
    dim = values.shape[1]
    lanes, totals = np.empty(LANES, np.float32), np.empty(len(scores), np.float32)
    for row in range(len(positions)):
        for place in range(row * shared, row * shared + shared):
            totals[place] = _exponentials(scores[place, : positions[row] + 1], lanes)
        out[first + row, left : left + shared * dim] = _f32(0)
    for begin in range(0, scores.shape[1], _KEYS_AT_ONCE):
        for row in range(len(positions)):
            end = min(begin + _KEYS_AT_ONCE, positions[row] + 1)
            for head in range(shared):
                into = out[first + row, left + head * dim : left + head * dim + dim]
                _add_values(scores[row * shared + head, begin:end], values[begin:end], into)
    for row in range(len(positions)):
        for head in range(shared):
            factor = _ONE / totals[row * shared + head]
            for i in range(left + head * dim, left + head * dim + dim):
                out[first + row, i] *= factor


def _multiply(
    tiles: Bytes, x: Bytes, offset: Integers, scale: Floats, row_scale: Floats, bias: Floats, out: Floats
) -> None:
    """Write the product of quantized rows with a weight to `out`, `[rows, outputs]` in whole tiles."""
    for number in prange(len(tiles)):
        _multiply_tile(tiles[number], x, offset, scale, row_scale, bias, out, number * TILE)


def _normalize(x: Floats, more: Floats, eps: np.float32, into: Bytes, scale: Floats) -> None:
    """Add `more` to `x`, and write the rows quantized; their scales include RMSNorm's factor."""
    for row in prange(len(x)):
        mine, added = x[row], more[row]
        for i in range(len(mine)):
            mine[i] += added[i]
        squares = _sum_of_squares(mine, np.empty(LANES, np.float32))
        scale[row] = _quantize(mine, into[row]) / np.float32(math.sqrt(squares + eps))


def _place(
    qkv: Floats,
    q_norm: Floats,
    k_norm: Floats,
    eps: np.float32,
    cos: Floats,
    sin: Floats,
    slots: Integers,
    positions: Integers,
    keys: Floats,
    values: Floats,
    heads: int,
) -> None:
    """Finish queries in place, and write keys `[slots, kv_heads, dim, capacity]` and values to their slots.

    Norms, `cos` and `sin` are empty where a layer has none.
    """
    kv_heads, dim = keys.shape[1], keys.shape[2]
    half = dim // 2
    for row in prange(len(positions)):
        mine, slot, at = qkv[row], slots[row], positions[row]
        for head in range(heads + kv_heads):
            its = mine[head * dim : head * dim + dim]
            if len(q_norm):
                norm = q_norm if head < heads else k_norm
                squares = _sum_of_squares(its, np.empty(LANES, np.float32))
                factor = _ONE / np.float32(math.sqrt(squares + eps))
                for i in range(dim):
                    its[i] = its[i] * factor * norm[i]
            if len(cos):
                _turn(its[:half], its[half:], cos[at], sin[at])
            if head >= heads:
                for i in range(dim):
                    keys[slot, head - heads, i, at] = its[i]
        for head in range(kv_heads):
            begin = (heads + kv_heads + head) * dim
            for i in range(dim):
                values[slot, head, at, i] = mine[begin + i]


def _attend(
    query: Floats,
    slots: Integers,
    positions: Integers,
    starts: Integers,
    keys: Floats,
    values: Floats,
    shared: int,
    out: Floats,
) -> None:
    """Write the attention of rows to `out`; `starts` are the first rows of parts of one sequence, and the end."""
    kv_heads = keys.shape[1]
    for task in prange((len(starts) - 1) * kv_heads):
        part, head = task // kv_heads, task % kv_heads
        begin, end = starts[part], starts[part + 1]
        slot = slots[begin]
        mine = positions[begin:end]
        longest = min((mine[-1] + LANES) // LANES * LANES, keys.shape[3])
        scores = np.empty(((end - begin) * shared, longest), np.float32)
        left = head * shared * keys.shape[2]
        _score_rows(query, begin, left, mine, keys[slot, head], shared, scores)
        _mix_rows(scores, mine, values[slot, head], shared, out, begin, left)


def _quantize_rows(x: Floats, into: Bytes, scale: Floats) -> None:
    for row in prange(len(x)):
        scale[row] = _quantize(x[row], into[row])


def _gate(both: Floats, hadamard: int, into: Bytes, scale: Floats) -> None:
    """Write SwiGLU's product of gate and up, in blocks times the Hadamard matrix, quantized."""
    inner = into.shape[1]
    odd = False
    size = hadamard
    while size > 1:
        odd = not odd
        size //= 2
    for row in prange(len(both)):
        mine, other = np.empty(inner, np.float32), np.empty(inner, np.float32)
        _gated(both[row, :inner], both[row, inner : 2 * inner], mine)
        for begin in range(0, inner, hadamard):
            _hadamard(mine[begin : begin + hadamard], other[begin : begin + hadamard])
        scale[row] = _quantize(other if odd else mine, into[row])


@dataclass(frozen=True, slots=True)
class Kernels:
    """The compiled loops over rows; with several threads, rows or heads are divided among them."""

    multiply: Callable[..., None]
    normalize: Callable[..., None]
    place: Callable[..., None]
    attend: Callable[..., None]
    quantize: Callable[..., None]
    gate: Callable[..., None]


@cache
def kernels(*, parallel: bool) -> Kernels:
    """Return the loops, which are compiled at their first call: some seconds."""
    loops = (_multiply, _normalize, _place, _attend, _quantize_rows, _gate)
    return Kernels(*(numba.njit(error_model="numpy", nogil=True, parallel=parallel)(loop) for loop in loops))

"""Loops of the forward pass other than products, compiled for the processor at hand by numba.

Results do not depend on the processor, on the number of threads, or on which rows are computed together: float32
operations are those of IEEE 754, in an order that the row alone determines. So nothing here may be compiled with
`fastmath`, and a sum of many floats goes through `_total`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from fleet_edge.verifiers.blocks.compiler import compiled, processor_features
from fleet_edge.verifiers.blocks.kv import PAGE, Halves
from fleet_edge.verifiers.blocks.layout import BLOCK
from fleet_edge.verifiers.blocks.portable import Floats, fma
from fleet_edge.verifiers.blocks.weights import to_half

SignedBytes = npt.NDArray[np.int8]
Integers = npt.NDArray[np.int32]

LANES: Final = 16
"""Terms of a sum that are added separately, whatever the processor's vectors hold."""

ROWS_AT_ONCE: Final = 8
"""Rows of one sequence that read its keys and values together."""

_f32 = np.float32
_ONE: Final = np.float32(1)
_LEVELS: Final = np.float32(127)
_ROUNDING_ZERO: Final = np.float32(128.5)  # conversion to integers truncates
_ZERO_POINT: Final = np.int32(128)
_TINY: Final = np.float32(1e-30)
_LARGEST_HALF: Final = np.float32(65504)

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


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


def _has_halves() -> bool:
    """Return whether the processor has instructions that convert float16; all of AVX2 and of ARM64 have."""
    return bool({"f16c", "neon"} & processor_features())


@intrinsic  # type: ignore[untyped-decorator]
def _narrowed(context: Any, number: Any) -> Any:
    """Compute what `to_half` does in one instruction."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


_to_half = _narrowed if _has_halves() else to_half


def _product_of(rows: int, vectors: int) -> Callable[..., None]:
    """Return the function that adds `rows` floats rows times float16 rows, `vectors * LANES` columns of them, to sums.

    It takes addresses and the lengths of rows: left, its row; right, its row; the number of terms; sums, their row.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def add(_context: Any, a: Any, a_row: Any, b: Any, b_row: Any, depth: Any, c: Any, c_row: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            _emit_product(builder, rows, vectors, args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return cast("Callable[..., None]", add)


def _emit_product(builder: Any, rows: int, vectors: int, args: Any) -> None:
    a, a_row, b, b_row, depth, c, c_row = args
    floats = ir.VectorType(_F32, LANES)
    kind = ir.FunctionType(floats, [floats] * 3)
    fused = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")

    def at(begin: Any, index: Any, kind: Any, size: int) -> Any:
        place = builder.add(begin, builder.mul(index, ir.Constant(_I64, size)))
        return builder.inttoptr(place, kind.as_pointer())

    def load(place: Any, align: int) -> Any:
        found = builder.load(place)
        found.align = align
        return found

    sums_at = [
        [
            at(c, builder.add(builder.mul(c_row, _I64(row)), _I64(LANES * vector)), floats, 4)
            for vector in range(vectors)
        ]
        for row in range(rows)
    ]
    begun = [[load(place, 4) for place in of_row] for of_row in sums_at]
    before, loop, after = builder.block, builder.append_basic_block("terms"), builder.append_basic_block("added")
    builder.branch(loop)
    builder.position_at_end(loop)
    term = builder.phi(_I64)
    term.add_incoming(_I64(0), before)
    sums = [[builder.phi(floats) for _ in range(vectors)] for _ in range(rows)]
    right_at = builder.mul(term, b_row)
    right = [
        _floats_of(builder, load(at(b, builder.add(right_at, _I64(LANES * vector)), ir.VectorType(_I16, LANES), 2), 2))
        for vector in range(vectors)
    ]
    for row, of_row in enumerate(sums):
        left = load(at(a, builder.add(builder.mul(a_row, _I64(row)), term), _F32, 4), 4)
        first = builder.insert_element(ir.Constant(floats, ir.Undefined), left, ir.Constant(_I32, 0))
        mask = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
        spread = builder.shuffle_vector(first, ir.Constant(floats, ir.Undefined), mask)
        for vector, total in enumerate(of_row):
            total.add_incoming(begun[row][vector], before)
            total.add_incoming(builder.call(fused, [spread, right[vector], total]), loop)
    following = builder.add(term, _I64(1))
    term.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
    builder.position_at_end(after)
    for places, of_row in zip(sums_at, sums, strict=True):
        for place, total in zip(places, of_row, strict=True):
            builder.store(total.incomings[1][0], place).align = 4


def _floats_of(builder: Any, halves: Any) -> Any:
    """Convert a vector of float16, all of which are finite."""
    if _has_halves():
        return builder.fpext(builder.bitcast(halves, ir.VectorType(ir.HalfType(), LANES)), ir.VectorType(_F32, LANES))
    wide, floats = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)
    bits = builder.zext(halves, wide)
    size = builder.shl(builder.and_(bits, ir.Constant(wide, [0x7FFF] * LANES)), ir.Constant(wide, [13] * LANES))
    scaled = builder.fmul(builder.bitcast(size, floats), ir.Constant(floats, [2.0**112] * LANES))
    sign = builder.shl(builder.and_(bits, ir.Constant(wide, [0x8000] * LANES)), ir.Constant(wide, [16] * LANES))
    return builder.bitcast(builder.or_(builder.bitcast(scaled, wide), sign), floats)


_TALL, _MIDDLE, _WIDE = (6, 3, 4) if "avx512f" in processor_features() else (2, 2, 2)
"""Rows and vectors that share a pass: as many sums as the processor has registers for."""
_tall_wide, _middle_wide, _one_wide = (_product_of(rows, _WIDE) for rows in (_TALL, _MIDDLE, 1))
_tall, _middle, _one = (_product_of(rows, 1) for rows in (_TALL, _MIDDLE, 1))


@compiled
def _exp(x: Any) -> Any:
    """`exp(x)` for `x` up to 88, off by 1e-7 of it at most (coefficients of Cephes' expf)."""
    x = max(x, _f32(-87))
    shifted = fma(x, _f32(1.44269504), _f32(12582912))
    n = shifted - _f32(12582912)
    r = fma(n, _f32(2.12194440e-4), fma(n, _f32(-0.693359375), x))
    p = fma(_f32(1.9875691500e-4), r, _f32(1.3981999507e-3))
    p = fma(p, r, _f32(8.3334519073e-3))
    p = fma(p, r, _f32(4.1665795894e-2))
    p = fma(p, r, _f32(1.6666665459e-1))
    p = fma(p, r, _f32(5.0000001201e-1))
    return (fma(p, r * r, r) + _ONE) * _power_of_two(shifted)


@compiled
def _total(lanes: Floats) -> Any:
    """The sum of 16 partial sums, in a fixed order."""
    half = LANES // 2
    while half:
        for i in range(half):
            lanes[i] += lanes[i + half]
        half //= 2
    return lanes[0]


@compiled
def _sum_of_squares(row: Floats, lanes: Floats) -> Any:
    for i in range(LANES):
        lanes[i] = _f32(0)
    whole = len(row) // LANES * LANES
    for begin in range(0, whole, LANES):
        part = row[begin : begin + LANES]
        for i in range(LANES):
            lanes[i] = fma(part[i], part[i], lanes[i])
    for i in range(whole, len(row)):
        lanes[i - whole] = fma(row[i], row[i], lanes[i - whole])
    return _total(lanes)


@compiled
def _inverse_root(row: Floats, eps: np.float32) -> Any:
    """RMSNorm's factor of a row."""
    squares = _sum_of_squares(row, np.empty(LANES, np.float32))
    return _ONE / np.float32(math.sqrt(squares / _f32(len(row)) + eps))


@compiled
def _quantize_block(block: Floats, into: SignedBytes) -> Any:
    """Write a block of 32 as signed bytes; return its scale and the sum of its bytes."""
    largest = np.int32(0)
    for i in range(BLOCK):
        largest = max(largest, _ordered(abs(block[i])))
    top = max(_unordered(largest), _TINY)
    factor = _LEVELS / top
    total = np.int32(0)
    for i in range(BLOCK):
        number = np.int32(fma(block[i], factor, _ROUNDING_ZERO)) - _ZERO_POINT
        into[i] = np.int8(number)
        total += number
    return top / _LEVELS, total


@compiled
def _quantize(row: Floats, into: SignedBytes, scales: Floats, sums: Integers) -> None:
    for block in range(len(scales)):
        begin = block * BLOCK
        scales[block], sums[block] = _quantize_block(row[begin : begin + BLOCK], into[begin : begin + BLOCK])


@compiled
def _add(row: Floats, more: Floats) -> None:
    for i in range(len(row)):
        row[i] += more[i]


@compiled
def _scale_by(row: Floats, factor: np.float32, weight: Floats, into: Floats) -> None:
    for i in range(len(row)):
        into[i] = row[i] * factor * weight[i]


@compiled
def _gated(gate: Floats, up: Floats, into: Floats) -> None:
    """SwiGLU."""
    for i in range(len(into)):
        into[i] = gate[i] / (_ONE + _exp(min(-gate[i], _f32(88)))) * up[i]


@compiled
def _gated_by_gelu(gate: Floats, up: Floats, into: Floats) -> None:
    """GeGLU with the approximation by tanh: `gelu(x) = x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x ** 3))`."""
    for i in range(len(into)):
        x = gate[i]
        inner = _f32(1.5957691216) * fma(_f32(0.044715) * x * x, x, x)
        into[i] = x / (_ONE + _exp(min(-inner, _f32(88)))) * up[i]


@compiled
def _turn(left: Floats, right: Floats, cos: Floats, sin: Floats) -> None:
    """Rotary embedding of a head, in place."""
    for i in range(len(left)):
        a, b = left[i], right[i]
        left[i] = fma(a, cos[i], -(b * sin[i]))
        right[i] = fma(b, cos[i], a * sin[i])


@compiled
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


@compiled
def _first_key(position: int, window: int) -> Any:
    """The first position that a row sees; a window of 0 is unlimited."""
    return max(0, position - window + 1) if window else 0


@compiled
def _add_product(left: Floats, begin: int, halves: Halves, out: Floats, column: int, width: int) -> None:
    """Add the product of `left[:, begin:]` and float16 rows to `width` columns of `out`.

    Each number adds its terms one after the other, so its bits do not depend on the other rows.
    """
    depth, stride = len(halves), halves.shape[1]
    row = 0
    while row < len(left):
        rows = len(left) - row
        height = _TALL if rows >= _TALL else _MIDDLE if rows >= _MIDDLE else 1
        a = left.ctypes.data + 4 * (row * left.shape[1] + begin)
        done = 0
        while done < width:
            wide = width - done >= _WIDE * LANES
            b = halves.ctypes.data + 2 * done
            c = out.ctypes.data + 4 * (row * out.shape[1] + column + done)
            if height == _TALL:
                if wide:
                    _tall_wide(a, left.shape[1], b, stride, depth, c, out.shape[1])
                else:
                    _tall(a, left.shape[1], b, stride, depth, c, out.shape[1])
            elif height == _MIDDLE:
                if wide:
                    _middle_wide(a, left.shape[1], b, stride, depth, c, out.shape[1])
                else:
                    _middle(a, left.shape[1], b, stride, depth, c, out.shape[1])
            elif wide:
                _one_wide(a, left.shape[1], b, stride, depth, c, out.shape[1])
            else:
                _one(a, left.shape[1], b, stride, depth, c, out.shape[1])
            done += (_WIDE if wide else 1) * LANES
        row += height


def _normalize(
    x: Floats, more: Floats, weight: Floats, eps: np.float32, into: SignedBytes, scales: Floats, sums: Integers
) -> None:
    """Add `more` to `x`, unless it has no columns, and write the rows normalized and quantized."""
    for row in prange(len(x)):
        mine, normal = x[row], np.empty(x.shape[1], np.float32)
        if more.shape[1]:
            _add(mine, more[row])
        _scale_by(mine, _inverse_root(mine, eps), weight, normal)
        _quantize(normal, into[row], scales[row], sums[row])


def _add_normalized(x: Floats, more: Floats, weight: Floats, eps: np.float32) -> None:
    """Add the normalized rows of `more` to `x`."""
    width = x.shape[1]
    for row in prange(len(x)):
        mine = more[row, :width]
        _scale_by(mine, _inverse_root(mine, eps), weight, mine)
        _add(x[row], mine)


def _route(x: Floats, norm: Floats, weight: Floats, eps: np.float32, out: Floats) -> None:
    """Write the logits of the experts for the normalized rows; `weight` is `[experts, hidden]`."""
    for row in prange(len(x)):
        normal, product = np.empty(x.shape[1], np.float32), np.empty(x.shape[1], np.float32)
        _scale_by(x[row], _inverse_root(x[row], eps), norm, normal)
        lanes = np.empty(LANES, np.float32)
        for expert in range(len(weight)):
            mine = weight[expert]
            for i in range(len(product)):
                product[i] = normal[i] * mine[i]
            for i in range(LANES):
                lanes[i] = _f32(0)
            for begin in range(0, len(product), LANES):
                part = product[begin : begin + LANES]
                for i in range(len(part)):
                    lanes[i] += part[i]
            out[row, expert] = _total(lanes)


def _place(
    qkv: Floats,
    q_norm: Floats,
    k_norm: Floats,
    eps: np.float32,
    scale: np.float32,
    cos: Floats,
    sin: Floats,
    tables: Integers,
    places: Integers,
    positions: Integers,
    layer: int,
    keys: Halves,
    values: Halves,
    heads: int,
) -> None:
    """Finish queries in place, and write keys and values to the pages of `tables[places[row]]`.

    Norms, `cos` and `sin` are empty where a layer has none. Queries are multiplied by `scale`.
    """
    kv_heads, dim = keys.shape[2], keys.shape[3]
    half = cos.shape[1]
    for row in prange(len(positions)):
        mine, at = qkv[row], positions[row]
        page, inside = tables[places[row], at // PAGE], at % PAGE
        for head in range(heads + kv_heads):
            its = mine[head * dim : head * dim + dim]
            if len(q_norm):
                _scale_by(its, _inverse_root(its, eps), q_norm if head < heads else k_norm, its)
            if half:
                _turn(its[:half], its[half : 2 * half], cos[at], sin[at])
            if head < heads:
                for i in range(dim):
                    its[i] *= scale
            else:
                for i in range(dim):
                    keys[page, layer, head - heads, i, inside] = _to_half(_limited(its[i]))
        for head in range(kv_heads):
            begin = (heads + kv_heads + head) * dim
            into = values[page, layer, head, inside]
            for i in range(dim):
                into[i] = _to_half(_limited(mine[begin + i]))


@compiled
def _limited(number: np.float32) -> Any:
    """The nearest number that float16 can hold."""
    return min(max(number, -_LARGEST_HALF), _LARGEST_HALF)


@compiled
def _clear(row: Floats) -> None:
    for i in range(len(row)):
        row[i] = _f32(0)


def _attend(
    query: Floats,
    tables: Integers,
    places: Integers,
    positions: Integers,
    starts: Integers,
    window: int,
    layer: int,
    keys: Halves,
    values: Halves,
    shared: int,
    out: Floats,
) -> None:
    """Write the attention of rows to `out`; `starts` are the first rows of parts of one sequence, and the end."""
    kv_heads, dim = keys.shape[2], keys.shape[3]
    padded = (dim + LANES - 1) // LANES * LANES
    for task in prange((len(starts) - 1) * kv_heads):
        part, head = task // kv_heads, task % kv_heads
        begin, end = starts[part], starts[part + 1]
        table, mine, count = tables[places[begin]], positions[begin:end], (end - begin) * shared
        page, last = _first_key(mine[0], window) // PAGE, mine[-1] // PAGE
        queries, mixed = np.empty((count, dim), np.float32), np.zeros((count, padded), np.float32)
        scores, totals = np.zeros((count, (last - page + 1) * PAGE), np.float32), np.empty(count, np.float32)
        lanes = np.empty(LANES, np.float32)
        left = head * shared * dim
        for place in range(count):
            row, at = begin + place // shared, left + place % shared * dim
            for i in range(dim):  # an assignment of slices would take seconds to compile
                queries[place, i] = query[row, at + i]
        for number in range(page, last + 1):
            _add_product(queries, 0, keys[table[number], layer, head], scores, (number - page) * PAGE, PAGE)
        for place in range(count):
            position = mine[place // shared]
            first, after = _first_key(position, window) - page * PAGE, position + 1 - page * PAGE
            totals[place] = _exponentials(scores[place, first:after], lanes)
            _clear(scores[place, :first])
            _clear(scores[place, after:])
        for number in range(page, last + 1):
            _add_product(scores, (number - page) * PAGE, values[table[number], layer, head], mixed, 0, padded)
        for place in range(count):
            factor, at = _ONE / totals[place], left + place % shared * dim
            into = out[begin + place // shared, at : at + dim]
            for i in range(dim):
                into[i] = mixed[place, i] * factor


def _quantize_rows(x: Floats, into: SignedBytes, scales: Floats, sums: Integers) -> None:
    for row in prange(len(x)):
        _quantize(x[row], into[row], scales[row], sums[row])


def _gate(both: Floats, up: int, gelu: bool, into: SignedBytes, scales: Floats, sums: Integers) -> None:
    """Write the product of the activated gate and of up, which begins at a column, quantized."""
    inner = into.shape[1]
    for row in prange(len(both)):
        mine = np.empty(inner, np.float32)
        if gelu:
            _gated_by_gelu(both[row, :inner], both[row, up : up + inner], mine)
        else:
            _gated(both[row, :inner], both[row, up : up + inner], mine)
        _quantize(mine, into[row], scales[row], sums[row])


@dataclass(frozen=True, slots=True)
class Loops:
    """The compiled loops over rows; with several threads, rows or heads are divided among them."""

    normalize: Callable[..., None]
    add_normalized: Callable[..., None]
    route: Callable[..., None]
    place: Callable[..., None]
    attend: Callable[..., None]
    quantize: Callable[..., None]
    gate: Callable[..., None]


@cache
def loops(*, parallel: bool) -> Loops:
    """Return the loops, which are compiled at their first call: some seconds, unless the cache has them."""
    every = (_normalize, _add_normalized, _route, _place, _attend, _quantize_rows, _gate)
    return Loops(*(compiled(loop, parallel=parallel) for loop in every))

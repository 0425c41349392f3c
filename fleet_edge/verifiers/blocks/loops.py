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
from numba import get_num_threads, prange, set_num_threads, types
from numba.core import cgutils
from numba.extending import intrinsic

from fleet_edge.verifiers.blocks.compiler import compiled, processor_features
from fleet_edge.verifiers.blocks.geometry import Activation
from fleet_edge.verifiers.blocks.kv import PAGE, Halves
from fleet_edge.verifiers.blocks.layout import BLOCK
from fleet_edge.verifiers.blocks.portable import Floats, bits_of, fma, from_bits, from_half
from fleet_edge.verifiers.blocks.weights import to_half

SignedBytes = npt.NDArray[np.int8]
Integers = npt.NDArray[np.int32]

LANES: Final = 16
"""Terms of a sum that are added separately, whatever the processor's vectors hold."""

ROWS_AT_ONCE: Final = 8
"""Rows of one sequence that read its keys and values together."""

_SMALL_SIZE: Final = 1 << 16
"""Numbers of several rows for which one thread takes about as long as several, with the time to wake them."""

_f32 = np.float32
_ONE: Final = np.float32(1)
_LEVELS: Final = np.float32(127)
_ROUNDING_ZERO: Final = np.float32(128.5)  # conversion to integers truncates
_ZERO_POINT: Final = np.int32(128)
_TINY: Final = np.float32(1e-30)
_LARGEST_HALF: Final = np.float32(65504)
_OSS_LIMIT: Final = np.float32(7)
_OSS_ALPHA: Final = np.float32(1.702)
_L2_EPS: Final = np.float32(1e-6)
"""Of the delta rule, whatever the epsilon of a model's other norms is."""
_SMALL: Final = np.float32(2**-6)
_SMALLEST_SHARE: Final = np.float32(1e-20)
_GELU, _CLAMPED, _SQUARED = int(Activation.GELU), int(Activation.CLAMPED), int(Activation.SQUARED)

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
    """Return the function that adds rows of floats times rows of float16 or float32 to `vectors * LANES` sums each.

    It takes addresses and the lengths of rows: left, its row; right, its row; the number of terms; sums, their row.
    Of its last parameter, which is the right side, only the type counts.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def add(_context: Any, a: Any, a_row: Any, b: Any, b_row: Any, depth: Any, c: Any, c_row: Any, right: Any) -> Any:
        halves = right.dtype == types.uint16

        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            _emit_product(builder, rows, vectors, args[:-1], halves=halves)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7, right), generate

    return cast("Callable[..., None]", add)


def _emit_product(builder: Any, rows: int, vectors: int, args: Any, *, halves: bool) -> None:
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
    places = [builder.add(right_at, _I64(LANES * vector)) for vector in range(vectors)]
    if halves:
        right = [_floats_of(builder, load(at(b, place, ir.VectorType(_I16, LANES), 2), 2)) for place in places]
    else:
        right = [load(at(b, place, floats, 4), 4) for place in places]
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
_both_wide, _both = _product_of(2, _WIDE), _product_of(2, 1)  # a query and its key


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
def _softplus(x: Any) -> Any:
    """`log(1 + exp(x))`, off by 1e-6 of it at most (coefficients of Cephes' logf)."""
    if x > _f32(80):
        return x
    y = _exp(x)
    if y < _SMALL:
        return y * fma(y, fma(y, fma(y, _f32(-0.25), _f32(1 / 3)), _f32(-0.5)), _ONE)
    bits = bits_of(_ONE + y) - np.int32(0x3F3504F3)  # of the root of a half, so that what is left is near to one
    n = _f32(bits >> 23)
    r = from_bits((bits & np.int32(0x7FFFFF)) + np.int32(0x3F3504F3)) - _ONE
    p = fma(_f32(7.0376836292e-2), r, _f32(-1.1514610310e-1))
    p = fma(p, r, _f32(1.1676998740e-1))
    p = fma(p, r, _f32(-1.2420140846e-1))
    p = fma(p, r, _f32(1.4249322787e-1))
    p = fma(p, r, _f32(-1.6668057665e-1))
    p = fma(p, r, _f32(2.0000714765e-1))
    p = fma(p, r, _f32(-2.4999993993e-1))
    p = fma(p, r, _f32(3.3333331174e-1))
    low = fma(p * r, r * r, fma(n, _f32(-2.12194440e-4), _f32(-0.5) * r * r))
    return fma(n, _f32(0.693359375), r + low)


@compiled
def _sigmoid(x: Any) -> Any:
    return _ONE / (_ONE + _exp(min(-x, _f32(88))))


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
def _copy(row: Floats, into: Floats) -> None:
    for i in range(len(into)):
        into[i] = row[i]


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
def _squared(up: Floats, into: Floats) -> None:
    """The square of ReLU."""
    for i in range(len(into)):
        x = max(up[i], _f32(0))
        into[i] = x * x


@compiled
def _turn(left: Floats, right: Floats, cos: Floats, sin: Floats) -> None:
    """Rotary embedding of a head, in place."""
    for i in range(len(left)):
        a, b = left[i], right[i]
        left[i] = fma(a, cos[i], -(b * sin[i]))
        right[i] = fma(b, cos[i], a * sin[i])


@compiled
def _gated_and_limited(gate: Floats, up: Floats, into: Floats) -> None:
    """SwiGLU of gpt-oss: gate and up are limited, and up has one added."""
    for i in range(len(into)):
        x = min(gate[i], _OSS_LIMIT)
        other = min(max(up[i], -_OSS_LIMIT), _OSS_LIMIT) + _ONE
        into[i] = x / (_ONE + _exp(min(-_OSS_ALPHA * x, _f32(88)))) * other


@compiled
def _bound(row: Floats, cap: np.float32) -> None:
    """Replace numbers by `cap * tanh(number / cap)`."""
    factor = _f32(2) / cap
    for i in range(len(row)):
        row[i] = cap - _f32(2) * cap / (_ONE + _exp(min(row[i] * factor, _f32(88))))


@compiled
def _exponentials(scores: Floats, sink: np.float32, lanes: Floats) -> Any:
    """Replace scores by their exponentials, up to a factor; return the sum, with that of a sink."""
    largest = _ordered(sink)
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
    return _total(lanes) + _exp(sink - top)


@compiled
def _first_key(position: int, window: int) -> Any:
    """The first position that a row sees; a window of 0 is unlimited."""
    return max(0, position - window + 1) if window else 0


@compiled
def _add_product(left: Floats, begin: int, right: Any, out: Floats, column: int, width: int) -> None:
    """Add the product of `left[:, begin:]` and rows of float16 or float32 to `width` columns of `out`.

    Each number adds its terms one after the other, so its bits do not depend on the other rows.
    """
    depth, stride = len(right), right.shape[1]
    row = 0
    while row < len(left):
        rows = len(left) - row
        height = _TALL if rows >= _TALL else _MIDDLE if rows >= _MIDDLE else 1
        a = left.ctypes.data + 4 * (row * left.shape[1] + begin)
        done = 0
        while done < width:
            wide = width - done >= _WIDE * LANES
            b = right.ctypes.data + right.itemsize * done
            c = out.ctypes.data + 4 * (row * out.shape[1] + column + done)
            if height == _TALL:
                if wide:
                    _tall_wide(a, left.shape[1], b, stride, depth, c, out.shape[1], right)
                else:
                    _tall(a, left.shape[1], b, stride, depth, c, out.shape[1], right)
            elif height == _MIDDLE:
                if wide:
                    _middle_wide(a, left.shape[1], b, stride, depth, c, out.shape[1], right)
                else:
                    _middle(a, left.shape[1], b, stride, depth, c, out.shape[1], right)
            elif wide:
                _one_wide(a, left.shape[1], b, stride, depth, c, out.shape[1], right)
            else:
                _one(a, left.shape[1], b, stride, depth, c, out.shape[1], right)
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


def _route(x: Floats, norm: Floats, weight: Floats, bias: Floats, eps: np.float32, out: Floats) -> None:
    """Write the logits of the experts for the normalized rows; `weight` is `[hidden, experts, rounded up]`."""
    width = out.shape[1]
    for tile in prange((len(x) + _TALL - 1) // _TALL):
        begin, end = tile * _TALL, min((tile + 1) * _TALL, len(x))
        normal = np.empty((end - begin, x.shape[1]), np.float32)
        for row in range(begin, end):
            _scale_by(x[row], _inverse_root(x[row], eps), norm, normal[row - begin])
            for i in range(width):
                out[row, i] = bias[i]
        _add_product(normal, 0, weight, out[begin:end], 0, width)


@compiled
def _take_largest(its: Floats, taken: npt.NDArray[np.uint8]) -> Any:
    """Mark the largest number that is not taken, the first of equals; return its place."""
    best = -1
    for place in range(len(taken)):
        if not taken[place] and (best < 0 or its[place] > its[best]):
            best = place
    taken[best] = 1
    return best


def _choose(logits: Floats, factors: Floats, normalized: bool, chosen: Integers, shares: Floats) -> None:
    """Choose the experts of each row, in their order, with their shares."""
    experts, used = len(factors), chosen.shape[1]
    for row in prange(len(logits)):
        its, taken = logits[row], np.zeros(experts, np.uint8)
        top = its[_take_largest(its, taken)]
        for _ in range(1, used):
            _take_largest(its, taken)
        part, whole, rank = _f32(0), _f32(0), 0
        for expert in range(experts):
            share = _exp(min(its[expert] - top, _f32(0)))
            whole += share
            if taken[expert]:
                chosen[row, rank], shares[row, rank] = expert, share
                part += share
                rank += 1
        for rank in range(used):
            shares[row, rank] = shares[row, rank] / (part if normalized else whole) * factors[chosen[row, rank]]


@compiled
def _bar_groups(its: Floats, groups: int, used_groups: int, barred: npt.NDArray[np.uint8]) -> None:
    """Mark the experts of all groups but those with the largest sums of their two best."""
    size = len(its) // groups
    sums, best = np.empty(groups, np.float32), np.zeros(groups, np.uint8)
    for group in range(groups):
        mine, two = its[group * size : (group + 1) * size], np.zeros(size, np.uint8)
        largest = mine[_take_largest(mine, two)]
        sums[group] = largest + mine[_take_largest(mine, two)]
    for _ in range(used_groups):
        _take_largest(sums, best)
    for expert in range(len(its)):
        barred[expert] = 1 - best[expert // size]


def _choose_by_sigmoid(
    logits: Floats, bias: Floats, groups: int, used_groups: int, normalized: bool, factor: np.float32,
    chosen: Integers, shares: Floats,
) -> None:  # fmt: skip
    """Choose the experts of each row, in their order, by sigmoids and a bias; their shares are the sigmoids."""
    experts, used = len(bias), chosen.shape[1]
    for row in prange(len(logits)):
        its, barred = np.empty(experts, np.float32), np.zeros(experts, np.uint8)
        for expert in range(experts):
            its[expert] = _sigmoid(logits[row, expert]) + bias[expert]
        if groups > 1:
            _bar_groups(its, groups, used_groups, barred)
        taken = barred.copy()
        for _ in range(used):
            _take_largest(its, taken)
        part, rank = _f32(0), 0
        for expert in range(experts):
            if taken[expert] != barred[expert]:
                chosen[row, rank], shares[row, rank] = expert, _sigmoid(logits[row, expert])
                part += shares[row, rank]
                rank += 1
        for rank in range(used):
            shares[row, rank] = shares[row, rank] / (part + _SMALLEST_SHARE if normalized else _ONE) * factor


def _sort(chosen: Integers, starts: Integers, rows: Integers, places: Integers) -> None:
    """Sort the uses of experts by expert: write where each begins, the row of each place, the places of each row."""
    starts[:] = 0
    for row in range(len(chosen)):
        for rank in range(chosen.shape[1]):
            starts[chosen[row, rank] + 1] += 1
    for expert in range(len(starts) - 1):
        starts[expert + 1] += starts[expert]
    following = starts.copy()
    for row in range(len(chosen)):
        for rank in range(chosen.shape[1]):
            place = following[chosen[row, rank]]
            following[chosen[row, rank]] += 1
            rows[place], places[row, rank] = row, place


def _combine(found: Floats, places: Integers, shares: Floats, total: Floats) -> None:
    """Write the weighted sum of the experts of each row, in their order."""
    for row in prange(len(total)):
        mine = total[row]
        _clear(mine)
        for rank in range(places.shape[1]):
            its, share = found[places[row, rank]], shares[row, rank]
            for i in range(len(mine)):
                mine[i] = fma(its[i], share, mine[i])


def _add_gated(total: Floats, found: Floats, logits: Floats, column: int) -> None:
    """Add rows by the sigmoid of a column of logits: the expert that every row uses."""
    for row in prange(len(total)):
        share = _ONE / (_ONE + _exp(min(-logits[row, column], _f32(88))))
        mine, its = total[row], found[row]
        for i in range(len(mine)):
            mine[i] = fma(its[i], share, mine[i])


def _bound_rows(x: Floats, cap: np.float32) -> None:
    for row in prange(len(x)):
        _bound(x[row], cap)


def _place(
    qkv: Floats,
    q_norm: Floats,
    k_norm: Floats,
    values_normalized: bool,
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
    kv_heads: int,
    values_at: int,
) -> None:
    """Finish queries in place, and write keys and values to the pages of `tables[places[row]]`.

    Norms, `cos` and `sin` are empty where a layer has none. Queries are multiplied by `scale`. A layer that reads the
    keys and values of another one has no `kv_heads`. Values begin at the column `values_at`, which may be that of keys.
    """
    dim = keys.shape[3]
    half = cos.shape[1]
    for row in prange(len(positions)):
        mine, at = qkv[row], positions[row]
        page, inside = tables[places[row], at // PAGE], at % PAGE
        for head in range(kv_heads):
            begin = values_at + head * dim
            its, into = mine[begin : begin + dim], values[page, layer, head, inside]
            factor = _inverse_root(its, eps) if values_normalized else _ONE
            for i in range(dim):
                into[i] = _to_half(_limited(its[i] * factor))
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
    cap: np.float32,
    sinks: Floats,
    layer: int,
    keys: Halves,
    values: Halves,
    shared: int,
    out: Floats,
) -> None:
    """Write the attention of rows to `out`; `starts` are the first rows of parts of one sequence, and the end.

    `cap` bounds the scores if it is not 0; the sinks of heads are minus infinity where a layer has none.
    """
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
            if cap:
                _bound(scores[place, first:after], cap)
            totals[place] = _exponentials(scores[place, first:after], sinks[head * shared + place % shared], lanes)
            _clear(scores[place, :first])
            _clear(scores[place, after:])
        for number in range(page, last + 1):
            _add_product(scores, (number - page) * PAGE, values[table[number], layer, head], mixed, 0, padded)
        for place in range(count):
            factor, at = _ONE / totals[place], left + place % shared * dim
            into = out[begin + place // shared, at : at + dim]
            for i in range(dim):
                into[i] = mixed[place, i] * factor


def _keep_gated(
    mixed: Floats, tables: Integers, places: Integers, positions: Integers, layer: int, keys: Halves, values: Halves
) -> None:
    """Write what a short convolution mixes to pages: the first third of `mixed` times the last."""
    half = keys.shape[3]
    for row in prange(len(positions)):
        mine, at = mixed[row], positions[row]
        page, inside = tables[places[row], at // PAGE], at % PAGE
        last = 4 * half
        for i in range(half):
            keys[page, layer, 0, i, inside] = _to_half(_limited(mine[i] * mine[last + i]))
            values[page, layer, 0, inside, i] = _to_half(_limited(mine[half + i] * mine[last + half + i]))


def _convolve(
    mixed: Floats,
    weight: Floats,
    tables: Integers,
    places: Integers,
    positions: Integers,
    layer: int,
    keys: Halves,
    values: Halves,
    out: Floats,
) -> None:
    """Write the convolution with the tokens before, times the second third of `mixed`; `weight` is by tap."""
    half, kernel = keys.shape[3], len(weight)
    for row in prange(len(positions)):
        mine, into = mixed[row], out[row]
        _clear(into)
        for tap in range(kernel):
            at = positions[row] + tap + 1 - kernel
            if at >= 0:
                page, inside, its = tables[places[row], at // PAGE], at % PAGE, weight[tap]
                for i in range(half):
                    into[i] = fma(from_half(keys[page, layer, 0, i, inside]), its[i], into[i])
                    into[half + i] = fma(from_half(values[page, layer, 0, inside, i]), its[half + i], into[half + i])
        for i in range(2 * half):
            into[i] *= mine[2 * half + i]


_BEGIN, _FIRST, _NEW, _SOURCE, _LOGGED, _INTO, _SETTLED, _COPY, _COPIED = range(9)
"""Columns of `replays`: of each sequence of a step, where its rows begin among those of `_extend` and among those of
the step, how many are new, and what `Replay` says."""


def _extend(
    mixed: Floats, logits: Floats, is_mamba: bool, speeds: Floats, replays: Integers, of_row: Integers, layer: int,
    inputs: Floats, logs: Floats, tail: int, whole: Floats, changes: Floats,
) -> None:  # fmt: skip
    """Write the inputs of convolutions to `whole`: the last `tail` before a state, those of its log, and new ones.

    To `changes` go how much stays of each head's state at a token, and how much of what is new it takes over; `logits`
    has first those of the latter, which in Mamba-2 is the time step itself. `of_row` has the sequence of each row of
    `whole`.
    """
    heads = len(speeds)
    for row in prange(len(whole)):
        its = replays[of_row[row]]
        place, into, change = row - its[_BEGIN], whole[row], changes[row]
        new = place - tail - its[_LOGGED]
        if new >= 0:
            mine = logits[its[_FIRST] + new]
            _copy(mixed[its[_FIRST] + new], into)
            for head in range(heads):
                step = _softplus(mine[head if is_mamba else heads + head])
                change[head] = _exp(min(speeds[head] * step, _f32(0)))
                change[heads + head] = step if is_mamba else _sigmoid(mine[head])
        elif its[_SOURCE] < 0:
            _clear(into)
        else:
            _copy(inputs[its[_SOURCE], layer, place], into)
            if place >= tail:
                _copy(logs[its[_SOURCE], layer, place - tail], change)


def _mix(
    whole: Floats, weight: Floats, bias: Floats, replays: Integers, of_row: Integers, key_dim: int, is_mamba: bool,
    out: Floats, dots: Floats,
) -> None:  # fmt: skip
    """Write queries, keys and values of all tokens behind a state, and the products of each query with its key.

    They are convolved. In the delta rule queries and keys have length one, and queries are divided by the root of
    `key_dim` as well.
    """
    tail, channels, key_heads = len(weight) - 1, whole.shape[1], dots.shape[1]
    scale = _ONE / np.float32(math.sqrt(_f32(key_dim)))
    for row in prange(len(whole)):
        if row - replays[of_row[row], _BEGIN] < tail:
            continue
        into, lanes = out[row], np.empty(LANES, np.float32)
        _copy(bias, into)
        for tap in range(tail + 1):
            its, factors = whole[row + tap - tail], weight[tap]
            for i in range(channels):
                into[i] = fma(its[i], factors[i], into[i])
        for i in range(channels):
            into[i] = into[i] * _sigmoid(into[i])
        for head in range(key_heads):
            query = into[head * key_dim : (head + 1) * key_dim]
            key = into[(key_heads + head) * key_dim : (key_heads + head + 1) * key_dim]
            if not is_mamba:
                _shorten(query, scale, lanes)
                _shorten(key, _ONE, lanes)
            dots[row, head] = _dot(query, key)


@compiled
def _shorten(row: Floats, length: np.float32, lanes: Floats) -> None:
    factor = length / np.float32(math.sqrt(_sum_of_squares(row, lanes) + _L2_EPS))
    for i in range(len(row)):
        row[i] *= factor


@compiled
def _dot(left: Floats, right: Floats) -> Any:
    total = _f32(0)
    for i in range(len(left)):
        total = fma(left[i], right[i], total)
    return total


@compiled
def _find(state: Floats, query: int, between: int, found: Floats) -> None:
    """Write the products with a part of a state of the query at an address, and of its key, `between` numbers on."""
    key_dim, width = state.shape
    _clear(found[0])
    _clear(found[1])
    for i in range(0, width, _WIDE * LANES if width == _WIDE * LANES else LANES):
        b, c = state.ctypes.data + 4 * i, found.ctypes.data + 4 * i
        if width == _WIDE * LANES:
            _both_wide(query, between, b, width, key_dim, c, width, state)
        else:
            _both(query, between, b, width, key_dim, c, width, state)


@compiled
def _change(state: Floats, row: Floats, begin: int, stays: np.float32, added: Floats) -> None:
    """Let a part of a state decay, and add the product of a key, which begins at a column, and of `added`."""
    for i in range(len(state)):
        its, factor = state[i], row[begin + i]
        for j in range(len(added)):
            its[j] = fma(factor, added[j], its[j] * stays)


@compiled
def _copy_columns(source: Floats, begin: int, into: Floats, place: int, count: int) -> None:
    for i in range(len(source)):
        for j in range(count):
            into[i, place + j] = source[i, begin + j]


def _recur(
    mixed: Floats, changes: Floats, dots: Floats, skips: Floats, replays: Integers, tail: int, in_turn: bool,
    layer: int, matrices: Floats, out: Floats,
) -> None:  # fmt: skip
    """Go from state to state, and write what the queries of new tokens find.

    Some columns of a head's matrix at once, which all tokens find in the processor's nearest memory. With what stays
    `a`, the query `q`, the key `k`, the value `v` and the rate `b`: `d = b * (v - a * k S)`, `S = a * S + k d`, and the
    result is `q S`, or `a * q S + (q k) d` with the matrix before. In Mamba-2, which has `skips` `D`, it is
    `d = b * v`, and `D * v` is added to the result.
    """
    heads, key_dim, value_dim = matrices.shape[2:]
    key_heads, most = dots.shape[1], _WIDE * LANES
    parts = (value_dim + most - 1) // most
    for task in prange(len(replays) * heads * parts):
        its, head, column = replays[task // parts // heads], task // parts % heads, task % parts * most
        key = head % key_heads if in_turn else head // (heads // key_heads)
        width = min(most, value_dim - column)
        state, found, added = (
            np.zeros((key_dim, width), np.float32), np.empty((2, width), np.float32), np.empty(width, np.float32)
        )  # fmt: skip
        if its[_SOURCE] >= 0:
            _copy_columns(matrices[its[_SOURCE], layer, head], column, state, 0, width)
        key_at, value_at = (key_heads + key) * key_dim, 2 * key_heads * key_dim + head * value_dim + column
        total = its[_LOGGED] + its[_NEW]
        for token in range(1, total + 1):
            row = its[_BEGIN] + tail + token - 1
            query = mixed.ctypes.data + 4 * (row * mixed.shape[1] + key * key_dim)
            _find(state, query, key_heads * key_dim, found)
            stays, rate, dot = changes[row, head], changes[row, heads + head], dots[row, key]
            mine = mixed[row]
            for i in range(width):
                old = _f32(0) if len(skips) else stays * found[1, i]
                added[i] = (mine[value_at + i] - old) * rate
            if token > its[_LOGGED]:
                into = out[its[_FIRST] + token - its[_LOGGED] - 1]
                for i in range(width):
                    result = fma(dot, added[i], stays * found[0, i])
                    if len(skips):
                        result = fma(skips[head], mine[value_at + i], result)
                    into[head * value_dim + column + i] = result
            if token < total or its[_SETTLED] == total or its[_COPIED] == total:
                _change(state, mine, key_at, stays, added)
            _keep_state(its, token, state, matrices[:, layer, head], column)


@compiled
def _keep_state(its: Integers, token: int, state: Floats, matrices: Floats, column: int) -> None:
    """Write columns of the state behind a token to the matrices that are to have it, if there are such."""
    if token == its[_SETTLED]:
        _copy_columns(state, 0, matrices[its[_INTO]], column, state.shape[1])
    if token == its[_COPIED]:
        _copy_columns(state, 0, matrices[its[_COPY]], column, state.shape[1])


def _log(
    whole: Floats, changes: Floats, replays: Integers, tail: int, layer: int, inputs: Floats, logs: Floats
) -> None:
    """Write the inputs of convolutions before a state that was written, and the log of the tokens behind it."""
    for part in prange(len(replays)):
        its = replays[part]
        begin, count = its[_BEGIN] + its[_SETTLED], its[_LOGGED] + its[_NEW] - its[_SETTLED]
        for place in range(tail + count):
            _copy(whole[begin + place], inputs[its[_INTO], layer, place])
        for place in range(count):
            _copy(changes[begin + tail + place], logs[its[_INTO], layer, place])
        for place in range(tail if its[_COPIED] else 0):
            _copy(whole[its[_BEGIN] + its[_COPIED] + place], inputs[its[_COPY], layer, place])


def _finish_heads(
    x: Floats, weight: Floats, dim: int, eps: np.float32, mixed: Floats, column: int, gated_first: bool
) -> None:
    """Normalize results, `dim` numbers at once, and multiply them by gates with SiLU, which begin at a column."""
    for row in prange(len(x)):
        mine, gates = x[row], mixed[row, column : column + x.shape[1]]
        if gated_first:
            _multiply_by_silu(mine, gates)
        for begin in range(0, len(mine), dim):
            its = mine[begin : begin + dim]
            _scale_by(its, _inverse_root(its, eps), weight[begin : begin + dim], its)
        if not gated_first:
            _multiply_by_silu(mine, gates)


@compiled
def _multiply_by_silu(row: Floats, gates: Floats) -> None:
    for i in range(len(row)):
        row[i] *= gates[i] * _sigmoid(gates[i])


def _gate_heads(x: Floats, mixed: Floats, column: int) -> None:
    """Multiply the results of attention by the sigmoids of gates, which begin at a column of `mixed`."""
    for row in prange(len(x)):
        gates = mixed[row, column : column + x.shape[1]]
        for i in range(x.shape[1]):
            x[row, i] *= _sigmoid(gates[i])


def _quantize_rows(x: Floats, into: SignedBytes, scales: Floats, sums: Integers) -> None:
    for row in prange(len(x)):
        _quantize(x[row], into[row], scales[row], sums[row])


def _gate(both: Floats, up: int, activation: int, into: SignedBytes, scales: Floats, sums: Integers) -> None:
    """Write the product of the activated gate and of up, which begins at a column, quantized; without a gate, of up."""
    inner = into.shape[1]
    for row in prange(len(both)):
        mine = np.empty(inner, np.float32)
        if activation == _CLAMPED:
            _gated_and_limited(both[row, :inner], both[row, up : up + inner], mine)
        elif activation == _GELU:
            _gated_by_gelu(both[row, :inner], both[row, up : up + inner], mine)
        elif activation == _SQUARED:
            _squared(both[row, :inner], mine)
        else:
            _gated(both[row, :inner], both[row, up : up + inner], mine)
        _quantize(mine, into[row], scales[row], sums[row])


@dataclass(frozen=True, slots=True)
class Loops:
    """The compiled loops over rows; with several threads, rows or heads are divided among them."""

    normalize: Callable[..., None]
    add_normalized: Callable[..., None]
    route: Callable[..., None]
    choose: Callable[..., None]
    choose_by_sigmoid: Callable[..., None]
    sort: Callable[..., None]
    combine: Callable[..., None]
    add_gated: Callable[..., None]
    bound: Callable[..., None]
    place: Callable[..., None]
    attend: Callable[..., None]
    keep_gated: Callable[..., None]
    convolve: Callable[..., None]
    extend: Callable[..., None]
    mix: Callable[..., None]
    recur: Callable[..., None]
    log: Callable[..., None]
    finish_heads: Callable[..., None]
    gate_heads: Callable[..., None]
    quantize: Callable[..., None]
    gate: Callable[..., None]


def _by_row(loop: Callable[..., None]) -> Callable[..., None]:
    """Let one thread compute a single row and what is small; the first argument has the rows.

    To wake a second thread takes microseconds, but half a millisecond where another program uses its core, and a step
    has hundreds of such loops.
    """

    def call(first: Floats, *others: Any) -> None:
        if len(first) > 1 and first.size > _SMALL_SIZE:
            loop(first, *others)
            return
        threads = get_num_threads()
        set_num_threads(1)
        try:
            loop(first, *others)
        finally:
            set_num_threads(threads)

    return call


@cache
def loops(*, parallel: bool) -> Loops:
    """Return the loops, which are compiled at their first call: some seconds, unless the cache has them."""
    of_experts = (_route, _choose, _choose_by_sigmoid, _sort, _combine, _add_gated)
    every = (
        _normalize,
        _add_normalized,
        *of_experts,
        _bound_rows,
        _place,
        _attend,
        _keep_gated,
        _convolve,
        *(_extend, _mix, _recur, _log, _finish_heads, _gate_heads),
        _quantize_rows,
        _gate,
    )
    if not parallel:
        return Loops(*(compiled(loop) for loop in every))
    found = (compiled(loop, parallel=loop is not _sort) for loop in every)
    heavy = _attend, _recur, _sort
    return Loops(*(loop if its in heavy else _by_row(loop) for loop, its in zip(found, every, strict=True)))

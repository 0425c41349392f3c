"""Loops of the forward pass other than products, compiled for the processor at hand by numba.

Results do not depend on the processor, on the number of threads, or on which rows are computed together: float32
operations are those of IEEE 754, in an order that the row alone determines. So nothing here may be compiled with
`fastmath`, and a sum of many floats goes through `_total`.
"""

import math
from collections.abc import Callable
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

from fleet_edge.verifiers.blocks.kv import PAGE, Halves
from fleet_edge.verifiers.blocks.layout import BLOCK
from fleet_edge.verifiers.blocks.portable import Floats, compiled, fma, from_half
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

_I32, _F32 = ir.IntType(32), ir.FloatType()


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
    features = numba.config.CPU_FEATURES
    known = get_host_cpu_features() if features is None else features
    return not {"+f16c", "+neon"}.isdisjoint(known.split(","))


@intrinsic  # type: ignore[untyped-decorator]
def _widened(context: Any, half: Any) -> Any:
    """Compute what `from_half` does in one instruction."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), _F32)

    return types.float32(types.uint16), generate


@intrinsic  # type: ignore[untyped-decorator]
def _narrowed(context: Any, number: Any) -> Any:
    """Compute what `to_half` does in one instruction."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


_of_half, _to_half = (_widened, _narrowed) if _has_halves() else (from_half, to_half)


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
        into[i] = gate[i] / (_ONE + _exp(-gate[i])) * up[i]


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
def _scores(query: Floats, keys: Floats, into: Floats) -> None:
    """Scores of one query and the keys of a page, `[dim, PAGE]`."""
    for t in range(PAGE):
        into[t] = _f32(0)
    for d in range(0, len(query), 4):
        q0, q1, q2, q3 = query[d], query[d + 1], query[d + 2], query[d + 3]
        k0, k1, k2, k3 = keys[d], keys[d + 1], keys[d + 2], keys[d + 3]
        for t in range(PAGE):
            into[t] = fma(q3, k3[t], fma(q2, k2[t], fma(q1, k1[t], fma(q0, k0[t], into[t]))))


@compiled
def _two_scores(query: Floats, other: Floats, keys: Floats, into: Floats, other_into: Floats) -> None:
    """Compute what `_scores` does for two queries that read the keys together."""
    for t in range(PAGE):
        into[t] = _f32(0)
        other_into[t] = _f32(0)
    for d in range(0, len(query), 4):
        q0, q1, q2, q3 = query[d], query[d + 1], query[d + 2], query[d + 3]
        p0, p1, p2, p3 = other[d], other[d + 1], other[d + 2], other[d + 3]
        k0, k1, k2, k3 = keys[d], keys[d + 1], keys[d + 2], keys[d + 3]
        for t in range(PAGE):
            a, b, c, e = k0[t], k1[t], k2[t], k3[t]
            into[t] = fma(q3, e, fma(q2, c, fma(q1, b, fma(q0, a, into[t]))))
            other_into[t] = fma(p3, e, fma(p2, c, fma(p1, b, fma(p0, a, other_into[t]))))


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
def _add_values(weights: Floats, values: Floats, into: Floats) -> None:
    n = len(weights)
    whole = n // 4 * 4
    for t in range(0, whole, 4):
        w0, w1, w2, w3 = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
        v0, v1, v2, v3 = values[t], values[t + 1], values[t + 2], values[t + 3]
        for i in range(len(into)):
            into[i] = fma(w3, v3[i], fma(w2, v2[i], fma(w1, v1[i], fma(w0, v0[i], into[i]))))
    for t in range(whole, n):
        weight, value = weights[t], values[t]
        for i in range(len(into)):
            into[i] = fma(weight, value[i], into[i])


@compiled
def _widen(halves: Halves, into: Floats) -> None:
    for row in range(len(halves)):
        half, wide = halves[row], into[row]
        for i in range(len(half)):
            wide[i] = _of_half(half[i])


@compiled
def _score_rows(
    query: Floats,
    first: int,
    left: int,
    positions: Integers,
    window: int,
    table: Integers,
    layer: int,
    head: int,
    keys: Halves,
    shared: int,
    scores: Floats,
) -> None:
    """Write the scores of `shared` heads of some rows of a sequence, whose queries begin at `left`."""
    dim = keys.shape[3]
    wide = np.empty((dim, PAGE), np.float32)
    for number in range(_first_key(positions[0], window) // PAGE, positions[-1] // PAGE + 1):
        begin, end = number * PAGE, number * PAGE + PAGE
        _widen(keys[table[number], layer, head], wide)
        for row in range(len(positions)):
            if positions[row] < begin or _first_key(positions[row], window) >= end:
                continue
            mine, at, place = query[first + row], left, row * shared
            for _ in range(shared // 2):
                one, other = mine[at : at + dim], mine[at + dim : at + 2 * dim]
                _two_scores(one, other, wide, scores[place, begin:end], scores[place + 1, begin:end])
                at, place = at + 2 * dim, place + 2
            if shared % 2:
                _scores(mine[at : at + dim], wide, scores[place, begin:end])


@compiled
def _first_key(position: int, window: int) -> Any:
    """The first position that a row sees; a window of 0 is unlimited."""
    return max(0, position - window + 1) if window else 0


@compiled
def _mix_rows(
    scores: Floats,
    positions: Integers,
    window: int,
    table: Integers,
    layer: int,
    head: int,
    values: Halves,
    shared: int,
    out: Floats,
    first: int,
    left: int,
) -> None:
    """Write the means of values, weighted by the exponentials of the scores."""
    dim = values.shape[4]
    lanes, totals = np.empty(LANES, np.float32), np.empty(len(scores), np.float32)
    wide = np.empty((PAGE, dim), np.float32)
    for row in range(len(positions)):
        begin = _first_key(positions[row], window)
        for place in range(row * shared, row * shared + shared):
            totals[place] = _exponentials(scores[place, begin : positions[row] + 1], lanes)
        out[first + row, left : left + shared * dim] = _f32(0)
    for number in range(_first_key(positions[0], window) // PAGE, positions[-1] // PAGE + 1):
        page = number * PAGE
        _widen(values[table[number], layer, head], wide)
        for row in range(len(positions)):
            begin = max(page, _first_key(positions[row], window))
            end = min(page + PAGE, positions[row] + 1)
            if begin < end:
                for each in range(shared):
                    into = out[first + row, left + each * dim : left + each * dim + dim]
                    _add_values(scores[row * shared + each, begin:end], wide[begin - page : end - page], into)
    for row in range(len(positions)):
        for each in range(shared):
            factor = _ONE / totals[row * shared + each]
            for i in range(left + each * dim, left + each * dim + dim):
                out[first + row, i] *= factor


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
    kv_heads = keys.shape[2]
    for task in prange((len(starts) - 1) * kv_heads):
        part, head = task // kv_heads, task % kv_heads
        begin, end = starts[part], starts[part + 1]
        table, mine = tables[places[begin]], positions[begin:end]
        scores = np.empty(((end - begin) * shared, (mine[-1] // PAGE + 1) * PAGE), np.float32)
        left = head * shared * keys.shape[3]
        _score_rows(query, begin, left, mine, window, table, layer, head, keys, shared, scores)
        _mix_rows(scores, mine, window, table, layer, head, values, shared, out, begin, left)


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
    """Return the loops, which are compiled at their first call: some seconds."""
    every = (_normalize, _add_normalized, _route, _place, _attend, _quantize_rows, _gate)
    return Loops(*(compiled(loop, parallel=parallel) for loop in every))

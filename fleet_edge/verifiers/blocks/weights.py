"""Weights in tiles and blocks: from GGUF's blocks, from floats, and back to floats for rows of an embedding.

Four bits with one scale (Q4_0, or by a table IQ4_NL, IQ4_XS and MXFP4), or with a scale and a minimum (Q4_1, Q4_K),
stay what they are. Everything else becomes 8 bits with a new scale. A weight is read once, tile by tile, so memory
never holds more of it than the result.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt
from gguf.quants import dequantize

from fleet_edge.verifiers.blocks.compiler import compiled
from fleet_edge.verifiers.blocks.layout import (
    BLOCK,
    EIGHT,
    FLOATS_OF_FOUR,
    FOUR,
    FOUR_WITH_MINIMUMS,
    NON_LINEAR,
    TILE,
    Format,
)
from fleet_edge.verifiers.blocks.portable import (
    MAGIC,
    MAGIC_BITS,
    Bytes,
    Floats,
    PlainFormat,
    bits_of,
    fma,
    from_bits,
    from_half,
    half_at,
    values_of,
)

_Kind = gguf.GGMLQuantizationType
_Halves = npt.NDArray[np.uint16]
_Words = npt.NDArray[np.uint32]

_FACTORS: Final = (2.0**-12, 1.0, 2.0**12)
"""Factors to try for scales in float16: the first keeps scales of very small weights exact to 11 bits."""
_LARGEST_HALF: Final = np.float32(65504)
_Q4_K_BYTES: Final = 144
_Q5_K_BYTES: Final = 176
_Q6_K_BYTES: Final = 210
_LINE: Final = 64  # bytes of a cache line, and of the widest load
_ROWS_AT_ONCE: Final = 1024

_f32 = np.float32
_FOUR_BITS: Final = FOUR.bits
_EIGHT_BITS: Final = EIGHT.bits
_Q4_BLOCK_BYTES: Final = FOUR_WITH_MINIMUMS.block_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A packed weight. Rows of zeros fill the last tile."""

    tiles: Bytes  # [tiles, bytes of a tile], as `layout` says
    outputs: int
    inputs: int
    format: Format
    factor: float = 1.0
    """A power of two for all scales and minimums, where float16 alone does not reach them."""

    @property
    def padded_outputs(self) -> int:
        return len(self.tiles) * TILE

    @property
    def nbytes(self) -> int:
        return self.tiles.nbytes


def pack(values: Bytes, scales: npt.NDArray[Any], minimums: npt.NDArray[Any] | None, bits: int) -> Weights:
    """Pack unsigned values `[outputs, inputs]` with a scale, and perhaps a minimum, for 32 inputs.

    Without minimums, 8 stands for zero in 4 bits, 128 in 8 bits.
    """
    outputs, inputs = values.shape
    kind = EIGHT if bits == EIGHT.bits else FOUR if minimums is None else FOUR_WITH_MINIMUMS
    tiles, groups = -(-outputs // TILE), inputs // BLOCK
    added = tiles * TILE - outputs
    full = np.pad(values, ((0, added), (0, 0)))
    # [tile, output, block, step, input] to [tile, block, step, output, input]
    steps: npt.NDArray[Any] = full.reshape(tiles, TILE, groups, BLOCK // 4, 4).transpose(0, 2, 3, 1, 4)
    if bits == FOUR.bits:
        steps = steps[:, :, : BLOCK // 8] | steps[:, :, BLOCK // 8 :] << 4
    parts = [steps.reshape(tiles, groups, -1)]
    for numbers in (scales, minimums):
        if numbers is not None:
            halves = np.pad(numbers.astype(np.float16), ((0, added), (0, 0)))
            parts.append(np.ascontiguousarray(halves.reshape(tiles, TILE, groups).transpose(0, 2, 1)).view(np.uint8))
    result = empty(outputs, inputs, kind)
    result.tiles[:] = np.concatenate(parts, 2).reshape(tiles, -1)
    return result


def pack_gguf(raw: Bytes, kind: gguf.GGMLQuantizationType, inputs: int) -> Weights:
    """Pack the rows of a tensor, uint8 `[outputs, bytes of a row]`, mostly without the interpreter's lock.

    Raises `ValueError` if a number is too large or none, `NotImplementedError` if the kind is unknown.
    """
    raw, factor = np.ascontiguousarray(raw), 1.0
    if kind in _RESCALED:
        raw, factor = _with_half_scales(raw, *_RESCALED[kind](raw))
        kind = _Kind.IQ4_NL if kind == _Kind.IQ4_XS else kind
    if kind in _COPIED:
        wanted, headers, mask = _COPIED[kind]
        result = empty(len(raw), inputs, wanted)
        _copy_blocks(raw.view(np.uint16), headers, np.uint16(mask), wanted.bits, result.tiles.view(np.uint16))
        return replace(result, factor=factor)
    if kind in _DECODERS:
        view, decode = _DECODERS[kind]
        return _decoded(raw.view(view), inputs, decode, EIGHT)
    if kind == _Kind.Q4_K:
        return _with_factor(
            len(raw),
            inputs,
            FOUR_WITH_MINIMUMS,
            lambda tiles, inverse: bool(_pack_q4_k(raw, inverse, tiles.view(np.uint32), tiles.view(np.uint16))),
        )
    return _with_factor(len(raw), inputs, EIGHT, lambda tiles, inverse: _dequantize(raw, kind, tiles, inverse))


def pack_floats(floats: npt.NDArray[Any], bits: int) -> Weights:
    """Quantize and pack weights `[outputs, inputs]`, float32, float16, or bfloat16 as uint16.

    Raises `ValueError` if a number is too large or none.
    """
    kind = {np.dtype(np.float32): _Kind.F32, np.dtype(np.float16): _Kind.F16, np.dtype(np.uint16): _Kind.BF16}
    view, decode = _DECODERS[kind[floats.dtype]]
    wanted = EIGHT if bits == EIGHT.bits else FOUR
    return _decoded(np.ascontiguousarray(floats).view(view), floats.shape[1], decode, wanted)


def rows(weights: Weights, ids: Sequence[int]) -> Floats:
    """Return rows as floats, `[len(ids), inputs]`: the embeddings of tokens."""
    kind = weights.format
    into = np.empty((len(ids), weights.inputs), np.float32)
    numbers = (kind.bits, kind.zero, kind.minimums, _f32(weights.factor), values_of(kind))
    _unpack_rows(weights.tiles, np.asarray(ids, np.int64), numbers, into)
    return into


def empty(outputs: int, inputs: int, kind: Format) -> Weights:
    """Return a weight without content, at the beginning of a cache line."""
    count, size = -(-outputs // TILE), inputs // BLOCK * kind.block_bytes
    memory = np.empty(count * size + _LINE, np.uint8)
    begin = -memory.ctypes.data % _LINE
    return Weights(memory[begin : begin + count * size].reshape(count, size), outputs, inputs, kind)


def _with_factor(outputs: int, inputs: int, kind: Format, fill: Callable[[Bytes, np.float32], bool]) -> Weights:
    result = empty(outputs, inputs, kind)
    for factor in _FACTORS:
        if fill(result.tiles, _f32(1 / factor)):
            return replace(result, factor=factor)
    raise ValueError("It has weights that are too large or not numbers.")


def _decoded(raw: npt.NDArray[Any], inputs: int, decode: Callable[..., None], kind: Format) -> Weights:
    return _with_factor(
        len(raw),
        inputs,
        kind,
        lambda tiles, inverse: bool(_quantize(raw, decode, inverse, kind.bits, tiles, tiles.view(np.uint16))),
    )


def _dequantize(raw: Bytes, kind: gguf.GGMLQuantizationType, tiles: Bytes, inverse: np.float32) -> bool:
    """Fill tiles from a kind that only the gguf package knows, some rows at once."""
    for begin in range(0, len(raw), _ROWS_AT_ONCE):
        numbers = np.ascontiguousarray(dequantize(raw[begin : begin + _ROWS_AT_ONCE], kind), np.float32)
        its = tiles[begin // TILE : -(-(begin + len(numbers)) // TILE)]
        if not _quantize(numbers, _copy_floats, inverse, EIGHT.bits, its, its.view(np.uint16)):
            return False
    return True


def _with_half_scales(raw: Bytes, values: Bytes, scales: Floats) -> tuple[Bytes, float]:
    """Return blocks of a scale in float16 and 16 bytes of values, `[outputs, bytes]`, and the factor of all scales."""
    largest = float(np.abs(scales).max(initial=0))
    for factor in _FACTORS:
        if largest <= float(_LARGEST_HALF) * factor:
            halves = (scales / _f32(factor)).astype(np.float16)
            blocks = np.concatenate([halves[..., None].view(np.uint8), values], 2)
            return np.ascontiguousarray(blocks.reshape(len(raw), -1)), factor
    raise ValueError("It has weights that are too large or not numbers.")


def _parts_of_mxfp4(raw: Bytes) -> tuple[Bytes, Floats]:
    """Return the values and scales of blocks `[outputs, blocks, …]`; a scale is a power of two, halved."""
    blocks = raw.reshape(len(raw), -1, 17)
    return blocks[..., 1:], np.ldexp(_f32(1), blocks[..., 0].astype(np.int32) - 128)


def _parts_of_iq4_xs(raw: Bytes) -> tuple[Bytes, Floats]:
    """Return likewise; eight blocks share a scale, of which each has a multiple of 6 bits."""
    eight = raw.reshape(len(raw), -1, 136)
    scale = np.ascontiguousarray(eight[..., :2]).view(np.float16).astype(np.float32)
    high = np.ascontiguousarray(eight[..., 2:4]).view(np.uint16)
    place = np.arange(8)
    low = eight[..., 4 + place // 2] >> (place % 2 * 4).astype(np.uint8) & 15
    multiple = (low | ((high >> 2 * place.astype(np.uint16) & 3) << 4).astype(np.uint8)).astype(np.int32) - 32
    with np.errstate(invalid="ignore"):
        scales = scale * multiple.astype(np.float32)
    return eight[..., 8:].reshape(len(raw), -1, 16), scales.reshape(len(raw), -1)


@compiled
def to_half(number: np.float32) -> Any:
    """Return the bits of the nearest float16, whose size is 65504 at most."""
    bits = bits_of(number)
    sign = (bits >> 16) & np.int32(0x8000)
    size = abs(number)
    if size < _f32(2.0**-14):
        return np.uint16(sign | (bits_of(size * _f32(2.0**24) + MAGIC) - np.int32(MAGIC_BITS)))
    positive = bits & np.int32(0x7FFFFFFF)
    rounded = (positive + np.int32(0xFFF) + ((positive >> 13) & np.int32(1))) >> 13
    return np.uint16(sign | (rounded - np.int32(112 << 10)))


@compiled
def _copy_blocks(raw: _Halves, headers: int, mask: np.uint16, bits: int, tiles: _Halves) -> None:
    """Copy blocks whose values are already in order: their words change places, and scales follow the values."""
    words = bits  # of 32 bits, in a block of 32 values
    size = headers + 2 * words
    blocks = tiles.shape[1] // (TILE * size)
    for tile in range(len(tiles)):
        rows_ = min(TILE, len(raw) - tile * TILE)
        if rows_ < TILE:
            tiles[tile] = np.uint16(0)
        for block in range(blocks):
            into = tiles[tile, block * TILE * size :]
            for output in range(rows_):
                its = raw[tile * TILE + output, block * size : block * size + size]
                for word in range(words):
                    at = word * 2 * TILE + 2 * output
                    into[at] = its[headers + 2 * word] ^ mask
                    into[at + 1] = its[headers + 2 * word + 1] ^ mask
                for header in range(headers):
                    into[(2 * words + header) * TILE + output] = its[header]


@compiled
def _k_scales(packed: Bytes, block: int) -> Any:
    """Return the 6-bit scale and minimum of a block of a K-quant."""
    if block < 4:
        return packed[block] & 63, packed[block + 4] & 63
    high, low = packed[block + 4], packed[block - 4]
    return high & 15 | (low >> 6) << 4, high >> 4 | (packed[block] >> 6) << 4


@compiled
def _pack_q4_k(raw: Bytes, inverse: np.float32, words: _Words, halves: _Halves) -> bool:
    """Write the tiles, seen as words and as halves of them; return whether all scales fit in float16."""
    for tile in range(len(words)):
        rows_ = min(TILE, len(raw) - tile * TILE)
        if rows_ < TILE:
            words[tile] = np.uint32(0)
        for eight in range(words.shape[1] * 4 // (8 * _Q4_BLOCK_BYTES)):
            begin = eight * _Q4_K_BYTES
            for output in range(rows_):
                its = raw[tile * TILE + output, begin : begin + _Q4_K_BYTES]
                _place_q4_k(its.view(np.uint32)[4:], words[tile, eight * 2 * _Q4_BLOCK_BYTES + output :])
                scale = from_half(its[0] | its[1] << 8) * inverse
                least = from_half(its[2] | its[3] << 8) * inverse
                for part in range(8):
                    factor, other = _k_scales(its[4:16], part)
                    new, minimum = scale * _f32(factor), -(least * _f32(other))
                    if not (abs(new) <= _LARGEST_HALF and abs(minimum) <= _LARGEST_HALF):
                        return False
                    at = (eight * 8 + part) * _Q4_BLOCK_BYTES // 2 + 8 * TILE + output
                    halves[tile, at], halves[tile, at + TILE] = to_half(new), to_half(minimum)
    return True


@compiled
def _place_q4_k(values: _Words, into: _Words) -> None:
    """Place 256 values of an output: first 32 low nibbles, then the 32 high ones of the same bytes, and so on."""
    low, high = np.uint32(0x0F0F0F0F), np.uint32(0xF0F0F0F0)
    for pair in range(4):
        at = pair * 2 * _Q4_BLOCK_BYTES // 4
        for step in range(4):
            first, second = values[8 * pair + step], values[8 * pair + step + 4]
            into[at + step * TILE] = (first & low) | ((second & low) << np.uint32(4))
            into[at + _Q4_BLOCK_BYTES // 4 + step * TILE] = ((first & high) >> np.uint32(4)) | (second & high)


@compiled
def _decode_q5_k(row: Bytes, block: int, into: Floats) -> None:
    begin, part = block // 8 * _Q5_K_BYTES, block % 8
    its = row[begin : begin + _Q5_K_BYTES]
    factor, least = _k_scales(its[4:16], part)
    scale = from_half(its[0] | its[1] << 8) * _f32(factor)
    minimum = from_half(its[2] | its[3] << 8) * _f32(least)
    low, high = its[48 + part // 2 * BLOCK :], its[16:]
    shift, bit = np.uint8(part % 2 * 4), np.uint8(part)
    for i in range(BLOCK):
        value = np.int32((low[i] >> shift) & 15) | np.int32((high[i] >> bit) & 1) << 4
        into[i] = scale * _f32(value) - minimum


@compiled
def _decode_q6_k(row: Bytes, block: int, into: Floats) -> None:
    begin, part = block // 8 * _Q6_K_BYTES, block % 8
    its = row[begin : begin + _Q6_K_BYTES]
    scale = from_half(its[208] | its[209] << 8)
    low = its[part // 4 * 64 + part % 2 * BLOCK :]
    high = its[128 + part // 4 * BLOCK :]
    shift, bits = np.uint8(part % 4 // 2 * 4), np.uint8(part % 4 * 2)
    for half in range(2):
        its_scale = scale * _f32(np.int8(its[192 + 2 * part + half]))
        for i in range(half * 16, half * 16 + 16):
            value = np.int32((low[i] >> shift) & 15) | np.int32((high[i] >> bits) & 3) << 4
            into[i] = its_scale * _f32(value - 32)


@compiled
def _copy_floats(row: Floats, block: int, into: Floats) -> None:
    for i in range(BLOCK):
        into[i] = row[block * BLOCK + i]


@compiled
def _decode_f16(row: _Halves, block: int, into: Floats) -> None:
    for i in range(BLOCK):
        into[i] = from_half(row[block * BLOCK + i])


@compiled
def _decode_bf16(row: _Halves, block: int, into: Floats) -> None:
    for i in range(BLOCK):
        into[i] = from_bits(np.int32(row[block * BLOCK + i]) << 16)


@compiled
def _largest(numbers: Floats) -> Any:
    """Return the size of the largest number; one that is none is larger than all others."""
    found = np.int32(0)
    for i in range(len(numbers)):
        found = max(found, bits_of(numbers[i]) & np.int32(0x7FFFFFFF))
    return from_bits(found)


@compiled
def _quantize(
    raw: Any, decode: Callable[..., None], inverse: np.float32, bits: int, tiles: Bytes, halves: _Halves
) -> bool:
    """Write the tiles; return whether all scales fit in float16."""
    size = TILE * (BLOCK * bits // 8 + 2)
    numbers, values = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uint8)
    for tile in range(len(tiles)):
        rows_ = min(TILE, len(raw) - tile * TILE)
        if rows_ < TILE:
            tiles[tile] = np.uint8(0)
        for block in range(tiles.shape[1] // size):
            begin = block * size
            for output in range(rows_):
                decode(raw[tile * TILE + output], block, numbers)
                scale = _scale(numbers, bits) * inverse
                if not abs(scale) <= _LARGEST_HALF:
                    return False
                half = to_half(scale)
                halves[tile, (begin + size) // 2 - TILE + output] = half
                _round(numbers, from_half(half) / inverse, bits, values)
                _place(values, bits, tiles[tile, begin + 4 * output : begin + size])
    return True


@compiled
def _scale(numbers: Floats, bits: int) -> Any:
    largest = _largest(numbers)
    if bits == _EIGHT_BITS:
        return largest / _f32(127)
    # The larger side gets the eighth step that the other lacks.
    for i in range(BLOCK):
        if numbers[i] == largest:
            return largest / _f32(-8)
    return largest / _f32(8)


@compiled
def _round(numbers: Floats, scale: np.float32, bits: int, values: Bytes) -> None:
    inverse = _f32(0) if scale == 0 else _f32(1) / scale
    zero = 1 << (bits - 1)
    least, most = _f32(-127 if bits == _EIGHT_BITS else -8), _f32(zero - 1)
    for i in range(BLOCK):
        nearest = bits_of(min(max(numbers[i] * inverse, least), most) + MAGIC)
        values[i] = np.uint8(nearest - np.int32(MAGIC_BITS) + np.int32(zero))


@compiled
def _place(values: Bytes, bits: int, into: Bytes) -> None:
    if bits == _EIGHT_BITS:
        for step in range(BLOCK // 4):
            for i in range(4):
                into[step * TILE * 4 + i] = values[4 * step + i]
    else:
        for step in range(BLOCK // 8):
            for i in range(4):
                into[step * TILE * 4 + i] = values[4 * step + i] | values[BLOCK // 2 + 4 * step + i] << 4


@compiled
def _unpack_rows(tiles: Bytes, ids: npt.NDArray[np.int64], kind: PlainFormat, into: Floats) -> None:
    bits, zero_point, minimums, factor, table = kind
    blocks = into.shape[1] // BLOCK
    size = tiles.shape[1] // blocks
    zero = _f32(zero_point)
    for number in range(len(ids)):
        output = ids[number] % TILE
        for block in range(blocks):
            its = tiles[ids[number] // TILE, block * size : block * size + size]
            scales = its[TILE * BLOCK * bits // 8 :]
            scale = half_at(scales, output) * factor
            least = half_at(scales, TILE + output) * factor if minimums else _f32(0)
            for i in range(BLOCK):
                place = i if bits == _EIGHT_BITS else i % 16
                value = its[place // 4 * TILE * 4 + 4 * output + i % 4]
                if bits == _FOUR_BITS:
                    value = table[np.int64(value >> 4)] if i >= BLOCK // 2 else table[np.int64(value & 15)]
                into[number, block * BLOCK + i] = fma(_f32(value) - zero, scale, least)


_COPIED: Final = {  # the format, halves before the values, and what makes values unsigned
    _Kind.Q4_0: (FOUR, 1, 0),
    _Kind.Q4_1: (FOUR_WITH_MINIMUMS, 2, 0),
    _Kind.Q8_0: (EIGHT, 1, 0x8080),
    _Kind.IQ4_NL: (NON_LINEAR, 1, 0),
    _Kind.MXFP4: (FLOATS_OF_FOUR, 1, 0),
}
_RESCALED: Final = {_Kind.MXFP4: _parts_of_mxfp4, _Kind.IQ4_XS: _parts_of_iq4_xs}
"""Kinds whose blocks get a scale in float16 first."""
_DECODERS: Final[dict[Any, tuple[Any, Callable[..., None]]]] = {
    _Kind.Q5_K: (np.uint8, _decode_q5_k),
    _Kind.Q6_K: (np.uint8, _decode_q6_k),
    _Kind.F32: (np.float32, _copy_floats),
    _Kind.F16: (np.uint16, _decode_f16),
    _Kind.BF16: (np.uint16, _decode_bf16),
}

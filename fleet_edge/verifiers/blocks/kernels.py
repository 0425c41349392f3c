"""Inner products of a tile of weights, as LLVM IR for one kind of processor.

A kernel multiplies some rows of inputs with one tile. Within a block of 32 inputs it adds integers, which is exact in
any order. Over blocks it adds floats, in one order and with fused operations, so that all kernels give the same bits.

The sums of integers start at the bits of 1.5 * 2**23 as a float. A sum of less than 2**22 then is that float plus the
sum, and `fma(bits, scale, -1.5 * 2**23 * scale)` is the rounded product of sum and scale: one operation instead of a
conversion and a product. It needs `1.5 * scale` to be exact, so scales of inputs have two zero bits at the end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, Final

import llvmlite.binding as llvm
from llvmlite import ir

from fleet_edge.verifiers.blocks.layout import BLOCK, EIGHT, FOUR, TILE, Format
from fleet_edge.verifiers.blocks.portable import MAGIC_BITS

PREPARED: Final = 16
"""Bytes that `products` prepares for a row and block: four numbers of 32 bits.

They are the scale, the scale times -1.5 * 2**23, the integer at which sums start, and the scale times the inputs' sum.
"""

_PREFETCH: Final = "llvm.prefetch.p0"
_AHEAD: Final = 32 << 10
"""Bytes; between 16 and 150 KiB there was no difference."""
_LINE: Final = 64  # bytes of a cache line
_DEPTH: Final = 4  # inputs of an output that lie together
_STEPS: Final = BLOCK // _DEPTH

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F16, _F32 = ir.HalfType(), ir.FloatType()
_BYTES = _I8.as_pointer()


@dataclass(frozen=True, slots=True)
class Processor:
    """What a kernel is compiled for, and how it multiplies."""

    triple: str
    cpu: str
    features: str
    needs: frozenset[str]
    """Features without which these kernels do not run."""
    lanes: int
    """Outputs in a vector."""
    vectors: int
    """Vectors of outputs that share a pass over the blocks."""
    rows: int
    """Rows that share a pass, as many as there are registers for."""
    multiply: "Callable[[Emitter, list[Any], list[list[Any]]], list[list[Any]]]"
    """Return sums of integers, `[rows][vectors]`, given those at which they start."""


class Emitter:
    """A kernel that is being written: its parameters, and the block that the loop is at."""

    def __init__(self, function: ir.Function, processor: Processor, kind: Format, rows: int) -> None:
        self.builder = ir.IRBuilder(function.append_basic_block())
        self.processor, self.kind, self.rows = processor, kind, rows
        self.tile, self.values, self.prepared, self.bias, self.out, self.groups, self.stride = function.args
        self.floats = ir.VectorType(_F32, processor.lanes)
        self.sums = ir.VectorType(_I32, processor.lanes)
        self.bytes = ir.VectorType(_I8, processor.lanes * _DEPTH)
        self.block: Any = None
        self.group: Any = None
        self.first = 0

    def load(self, base: Any, offset: Any, kind: Any) -> Any:
        """Load a value at a byte offset."""
        found = self.builder.load(self.at(base, offset, kind))
        found.align = 1
        return found

    def at(self, base: Any, offset: Any, kind: Any) -> Any:
        offset = ir.Constant(_I64, offset) if isinstance(offset, int) else offset
        return self.builder.bitcast(self.builder.gep(base, [offset]), kind.as_pointer())

    def spread(self, number: Any) -> Any:
        """Return a vector of one number."""
        kind = ir.VectorType(number.type, self.processor.lanes)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(_I32, 0))
        places = ir.Constant(self.sums, [0] * self.processor.lanes)
        return self.builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), places)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """Return `a * b + c`, rounded once."""
        kind = ir.FunctionType(self.floats, [self.floats] * 3)
        name = f"llvm.fma.v{self.processor.lanes}f32"
        function = self.builder.module.globals.get(name) or ir.Function(self.builder.module, kind, name)
        return self.builder.call(function, [a, b, c])

    def scaled(self, index: Any, factor: int, more: int = 0) -> Any:
        """Return `index * factor + more`."""
        product_ = self.builder.mul(index, ir.Constant(_I64, factor))
        return self.builder.add(product_, ir.Constant(_I64, more)) if more else product_

    def weights(self, step: int) -> list[Any]:
        """Load the bytes of four inputs, or of four and the sixteenth after each."""
        size = self.processor.lanes * _DEPTH
        begin = step * TILE * _DEPTH + self.first * _DEPTH
        return [self.load(self.block, begin + vector * size, self.bytes) for vector in range(self.processor.vectors)]

    def nibbles(self, step: int) -> tuple[list[Any], list[Any]]:
        """Return the weights of four inputs, and of those 16 after them."""
        packed = self.weights(step)
        mask, four = (ir.Constant(self.bytes, [number] * self.bytes.count) for number in (15, 4))
        return [self.builder.and_(each, mask) for each in packed], [self.builder.lshr(each, four) for each in packed]

    def inputs(self, row: int, step: int) -> Any:
        """Return four inputs of a row in every lane."""
        before = self.builder.mul(self.groups, ir.Constant(_I64, row * BLOCK))
        place = self.builder.add(before, self.scaled(self.group, BLOCK, step * _DEPTH))
        return self.builder.bitcast(self.spread(self.load(self.values, place, _I32)), self.bytes)

    def steps(self) -> "list[tuple[list[Any], int]]":
        """Return the weights of a block with the step of the inputs that each is multiplied with."""
        if self.kind.bits == EIGHT.bits:
            return [(self.weights(step), step) for step in range(_STEPS)]
        found = []
        for step in range(_STEPS // 2):
            low, high = self.nibbles(step)
            found += [(low, step), (high, step + _STEPS // 2)]
        return found


def _emit(module: ir.Module, processor: Processor, kind: Format, rows: int) -> None:
    kinds = [_BYTES] * 5 + [_I64] * 2
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), _name(rows))
    emitter = Emitter(function, processor, kind, rows)
    for first in range(0, TILE, processor.lanes * processor.vectors):
        emitter.first = first
        _emit_pass(emitter)
    emitter.builder.ret_void()


def _name(rows: int) -> str:
    return f"rows_{rows}"


def _emit_pass(e: Emitter) -> None:
    """Write the products of some outputs of the tile: the loop over blocks, then the bias."""
    builder, lanes = e.builder, e.processor.lanes
    places = list(product(range(e.rows), range(e.processor.vectors)))
    zero = ir.Constant(e.floats, [0.0] * lanes)
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    e.group = builder.phi(_I64)
    totals = {place: builder.phi(e.floats) for place in places}
    e.block = builder.gep(e.tile, [e.scaled(e.group, e.kind.block_bytes)])
    if not e.first:
        _emit_prefetch(e)
    found = _emit_block(e, totals)
    following = builder.add(e.group, ir.Constant(_I64, 1))
    for phi, first, then in [(e.group, ir.Constant(_I64, 0), following)] + [
        (totals[place], zero, found[place]) for place in places
    ]:
        phi.add_incoming(first, before)
        phi.add_incoming(then, loop)
    builder.cbranch(builder.icmp_unsigned("<", following, e.groups), loop, after)
    builder.position_at_end(after)
    for row, vector in places:
        offset = (e.first + vector * lanes) * _F32_BYTES
        added = builder.fadd(found[row, vector], e.load(e.bias, offset, e.floats))
        place = builder.add(builder.mul(e.stride, ir.Constant(_I64, row * _F32_BYTES)), ir.Constant(_I64, offset))
        builder.store(added, e.at(e.out, place, e.floats)).align = 4


def _emit_prefetch(e: Emitter) -> None:
    """Ask for the memory that follows: the processor's own prefetching stops at each page."""
    kind = ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32])
    function = e.builder.module.globals.get(_PREFETCH) or ir.Function(e.builder.module, kind, _PREFETCH)
    reading, second_cache, data = (ir.Constant(_I32, number) for number in (0, 2, 1))
    for offset in range(0, e.kind.block_bytes, _LINE):
        e.builder.call(function, [e.at(e.block, _AHEAD + offset, _I8), reading, second_cache, data])


_F32_BYTES: Final = 4


def _emit_block(e: Emitter, totals: dict[tuple[int, int], Any]) -> dict[tuple[int, int], Any]:
    builder, vectors = e.builder, e.processor.vectors

    def prepared(row: int, field: int, kind: Any) -> Any:
        before = builder.mul(e.groups, ir.Constant(_I64, row * PREPARED))
        place = builder.add(before, e.scaled(e.group, PREPARED, field * 4))
        return e.spread(e.load(e.prepared, place, kind))

    starts = [prepared(row, 2, _I32) for row in range(e.rows)]
    sums = e.processor.multiply(e, starts, [[start] * vectors for start in starts])
    columns = [(e.first + vector * e.processor.lanes) * 2 for vector in range(vectors)]
    halves = ir.VectorType(_F16, e.processor.lanes)
    scales, minimums = (
        [builder.fpext(e.load(e.block, begin + column, halves), e.floats) for column in columns]
        for begin in (e.kind.scales_at, e.kind.scales_at + (TILE * 2 if e.kind.minimums else 0))
    )
    found = {}
    for row in range(e.rows):
        scale, shift = prepared(row, 0, _F32), prepared(row, 1, _F32)
        for vector in range(vectors):
            bits = builder.bitcast(sums[row][vector], e.floats)
            total = e.fma(e.fma(bits, scale, shift), scales[vector], totals[row, vector])
            if e.kind.minimums:
                total = e.fma(prepared(row, 3, _F32), minimums[vector], total)
            found[row, vector] = total
    return found


def _dot(instruction: str) -> Callable[[Emitter, list[Any], list[list[Any]]], list[list[Any]]]:
    """Multiply by an instruction that adds products of four unsigned and four signed bytes to a lane."""

    def multiply(e: Emitter, _starts: list[Any], sums: list[list[Any]]) -> list[list[Any]]:
        kind = ir.FunctionType(e.sums, [e.sums, e.bytes, e.bytes])
        for weights, step in e.steps():
            for row in range(e.rows):
                inputs = e.inputs(row, step)
                sums[row] = [
                    e.builder.asm(kind, instruction, "=v,0,v,v", [total, weight, inputs], side_effect=True)
                    for total, weight in zip(sums[row], weights, strict=True)
                ]
        return sums

    return multiply


def _pairs(e: Emitter, starts: list[Any], sums: list[list[Any]]) -> list[list[Any]]:
    """Multiply by an instruction that adds two products of an unsigned and a signed byte in 16 bits.

    The sum of 16 products with 4-bit weights stays within 16 bits. An 8-bit weight is made signed, and its sign moves
    to the input, so that two products stay within 16 bits: at most 2 * 128 * 127.
    """
    builder, count = e.builder, e.bytes.count // 2
    halves = ir.VectorType(_I16, count)
    ones, zeros = (ir.Constant(halves, [number] * count) for number in (1, 0))
    pairs = ir.FunctionType(halves, [e.bytes, e.bytes])
    wide = ir.FunctionType(e.sums, [halves, halves])
    bytes_ = ir.FunctionType(e.bytes, [e.bytes, e.bytes])
    one = ir.FunctionType(e.bytes, [e.bytes])

    def call(kind: Any, instruction: str, *args: Any) -> Any:
        places = ", ".join(f"${len(args) - place}" for place in range(len(args) + 1))
        return builder.asm(kind, f"{instruction} {places}", "=x" + ",x" * len(args), args, side_effect=True)

    if e.kind.bits == FOUR.bits:
        added = [[zeros] * e.processor.vectors for _ in range(e.rows)]
        for weights, step in e.steps():
            for row in range(e.rows):
                inputs = e.inputs(row, step)
                added[row] = [
                    builder.add(total, call(pairs, "vpmaddubsw", weight, inputs))
                    for total, weight in zip(added[row], weights, strict=True)
                ]
        return [
            [builder.add(start, call(wide, "vpmaddwd", total, ones)) for total in row]
            for start, row in zip(starts, added, strict=True)
        ]
    flip = ir.Constant(e.bytes, [128] * e.bytes.count)
    sums = [[ir.Constant(e.sums, [MAGIC_BITS] * e.processor.lanes)] * e.processor.vectors for _ in range(e.rows)]
    for weights, step in e.steps():
        signed = [builder.xor(weight, flip) for weight in weights]
        sizes = [call(one, "vpabsb", weight) for weight in signed]
        for row in range(e.rows):
            inputs = e.inputs(row, step)
            for vector, (weight, size) in enumerate(zip(signed, sizes, strict=True)):
                two = call(pairs, "vpmaddubsw", size, call(bytes_, "vpsignb", inputs, weight))
                sums[row][vector] = builder.add(sums[row][vector], call(wide, "vpmaddwd", two, ones))
    return sums


PROCESSORS: Final = {
    "avx512vnni": Processor(
        "x86_64-unknown-linux-gnu",
        "icelake-server",
        "",
        frozenset({"avx512vnni", "avx512bw", "avx512vl"}),
        lanes=16,
        vectors=2,
        rows=6,
        multiply=_dot("vpdpbusd $3, $2, $0"),
    ),
    "avxvnni": Processor(
        "x86_64-unknown-linux-gnu",
        "haswell",
        "+avxvnni",
        frozenset({"avxvnni", "avx2", "fma", "f16c"}),
        lanes=8,
        vectors=2,
        rows=3,
        multiply=_dot("{vex} vpdpbusd $3, $2, $0"),
    ),
    "avx2": Processor(
        "x86_64-unknown-linux-gnu",
        "haswell",
        "",
        frozenset({"avx2", "fma", "f16c"}),
        lanes=8,
        vectors=2,
        rows=3,
        multiply=_pairs,
    ),
}


def module(name: str, kind: Format) -> ir.Module:
    """Return the IR of the kernels of a processor, one for each number of rows."""
    processor = PROCESSORS[name]
    result = ir.Module(name)
    result.triple = processor.triple
    for rows in range(1, processor.rows + 1):
        _emit(result, processor, kind, rows)
    return result


def machine(name: str) -> Any:
    """Return LLVM's description of a processor."""
    processor = PROCESSORS[name]
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.initialize_native_asmparser()
    target = llvm.Target.from_triple(processor.triple)
    return target.create_target_machine(
        cpu=processor.cpu, features=processor.features, opt=3, jit=True, reloc="pic", codemodel="small"
    )


@cache
def compiled(name: str, kind: Format) -> tuple[Any, list[int]]:
    """Compile the kernels; return what keeps them in memory, and the address of the one for 1, 2, … rows."""
    described = machine(name)
    parsed = llvm.parse_assembly(str(module(name, kind)))
    parsed.verify()
    engine = llvm.create_mcjit_compiler(parsed, described)
    engine.finalize_object()
    return engine, [engine.get_function_address(_name(rows)) for rows in range(1, PROCESSORS[name].rows + 1)]

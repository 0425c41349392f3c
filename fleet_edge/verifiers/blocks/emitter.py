"""Inner products of a tile of weights, as LLVM IR for one kind of processor.

A kernel multiplies some rows of inputs with one tile. Within a block of 32 inputs it adds integers, which is exact in
any order. Over blocks it adds floats, in one order and with fused operations, so that all kernels give the same bits.

The sums of integers start at the bits of 1.5 * 2**23 as a float. A sum of less than 2**22 then is that float plus the
sum, and `fma(bits, scale, -1.5 * 2**23 * scale)` is the rounded product of sum and scale: one operation instead of a
conversion and a product. It needs `1.5 * scale` to be exact, so scales of inputs have two zero bits at the end.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

from llvmlite import ir

from fleet_edge.verifiers.blocks.layout import BLOCK, EIGHT, TILE, Format

PREPARED: Final = 12
"""Words of 32 bits that `products` prepares for a block of a row: the values, and four numbers.

They are the scale, the scale times -1.5 * 2**23, the integer at which sums start, and the scale times the inputs' sum.
The rows of a pass lie together, block by block, so that the kernel reads on in memory.
"""

_PREFETCH: Final = "llvm.prefetch.p0"
_AHEAD: Final = 32 << 10
"""Bytes; between 16 and 150 KiB there was no difference."""
_LINE: Final = 64  # bytes of a cache line
_LOOK_UP: Final = {
    64: "llvm.x86.avx512.pshuf.b.512",
    32: "llvm.x86.avx2.pshuf.b",
    16: "llvm.aarch64.neon.tbl1.v16i8",
}
DEPTH: Final = 4  # inputs of an output that lie together
STEPS: Final = BLOCK // DEPTH
WORD: Final = 4

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
BYTES = I8.as_pointer()


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
        self.tile, self.prepared, self.bias, self.out, self.groups, self.stride = function.args
        self.floats = ir.VectorType(F32, processor.lanes)
        self.sums = ir.VectorType(I32, processor.lanes)
        self.bytes = ir.VectorType(I8, processor.lanes * DEPTH)
        self.block: Any = None
        self.rows_of_block: Any = None
        self.group: Any = None
        self.first = 0

    def load(self, base: Any, offset: Any, kind: Any) -> Any:
        """Load a value at a byte offset."""
        found = self.builder.load(self.at(base, offset, kind))
        found.align = 1
        return found

    def at(self, base: Any, offset: Any, kind: Any) -> Any:
        offset = ir.Constant(I64, offset) if isinstance(offset, int) else offset
        return self.builder.bitcast(self.builder.gep(base, [offset]), kind.as_pointer())

    def spread(self, number: Any) -> Any:
        """Return a vector of one number."""
        kind = ir.VectorType(number.type, self.processor.lanes)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(I32, 0))
        places = ir.Constant(self.sums, [0] * self.processor.lanes)
        return self.builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), places)

    def call(self, name: str, result: Any, *args: Any) -> Any:
        """Call an intrinsic function of LLVM."""
        kind = ir.FunctionType(result, [arg.type for arg in args])
        function = self.builder.module.globals.get(name) or ir.Function(self.builder.module, kind, name)
        return self.builder.call(function, args)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """Return `a * b + c`, rounded once."""
        return self.call(f"llvm.fma.v{self.processor.lanes}f32", self.floats, a, b, c)

    def scaled(self, index: Any, factor: int) -> Any:
        return self.builder.mul(index, ir.Constant(I64, factor))

    def weights(self, step: int) -> list[Any]:
        """Load the bytes of four inputs, or of four and the sixteenth after each."""
        size = self.processor.lanes * DEPTH
        begin = step * TILE * DEPTH + self.first * DEPTH
        return [self.load(self.block, begin + vector * size, self.bytes) for vector in range(self.processor.vectors)]

    def nibbles(self, step: int) -> tuple[list[Any], list[Any]]:
        """Return the weights of four inputs, and of those 16 after them."""
        packed = self.weights(step)
        mask, four = (ir.Constant(self.bytes, [number] * self.bytes.count) for number in (15, 4))
        low, high = (
            [self.builder.and_(each, mask) for each in packed],
            [self.builder.lshr(each, four) for each in packed],
        )
        if self.kind.table:
            return [self.looked_up(each) for each in low], [self.looked_up(each) for each in high]
        return low, high

    def looked_up(self, places: Any) -> Any:
        """Return the values of the format's table; instructions look 16 bytes up at once."""
        count = self.bytes.count
        table = ir.Constant(self.bytes, list(self.kind.table) * (count // 16))
        return self.call(_LOOK_UP[count], self.bytes, table, places)

    def inputs(self, row: int, step: int) -> Any:
        """Return four inputs of a row in every lane."""
        return self.builder.bitcast(self.spread(self.load(self.rows_of_block, self.place(row, step), I32)), self.bytes)

    def place(self, row: int, word: int) -> int:
        """Return where a prepared word of a row is, in bytes."""
        return (row * PREPARED + word) * WORD

    def steps(self) -> Iterator[tuple[list[Any], int]]:
        """Load a block's weights piece by piece; yield them with the step of the inputs that they are multiplied with.

        What is written in between stays in this order, if it may use memory: else the compiler loads all weights first,
        and has no registers left.
        """
        if self.kind.bits == EIGHT.bits:
            for step in range(STEPS):
                yield self.weights(step), step
            return
        for step in range(STEPS // 2):
            low, high = self.nibbles(step)
            yield low, step
            yield high, step + STEPS // 2


def emit_pass(e: Emitter) -> None:
    """Write the products of some outputs of the tile: the loop over blocks, then the bias."""
    builder, lanes = e.builder, e.processor.lanes
    places = list(product(range(e.rows), range(e.processor.vectors)))
    zero = ir.Constant(e.floats, [0.0] * lanes)
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    e.group = builder.phi(I64)
    totals = {place: builder.phi(e.floats) for place in places}
    e.block = builder.gep(e.tile, [e.scaled(e.group, e.kind.block_bytes)])
    e.rows_of_block = builder.gep(e.prepared, [e.scaled(e.group, e.place(e.rows, 0))])
    if not e.first:
        emit_prefetch(e)
    found = _emit_block(e, totals)
    following = builder.add(e.group, ir.Constant(I64, 1))
    for phi, first, then in [(e.group, ir.Constant(I64, 0), following)] + [
        (totals[place], zero, found[place]) for place in places
    ]:
        phi.add_incoming(first, before)
        phi.add_incoming(then, loop)
    builder.cbranch(builder.icmp_unsigned("<", following, e.groups), loop, after)
    builder.position_at_end(after)
    for row, vector in places:
        offset = (e.first + vector * lanes) * WORD
        added = builder.fadd(found[row, vector], e.load(e.bias, offset, e.floats))
        place = builder.add(builder.mul(e.stride, ir.Constant(I64, row * WORD)), ir.Constant(I64, offset))
        builder.store(added, e.at(e.out, place, e.floats)).align = 4


def emit_prefetch(e: Emitter) -> None:
    """Ask for the memory that follows: the processor's own prefetching stops at each page."""
    reading, second_cache, data = (ir.Constant(I32, number) for number in (0, 2, 1))
    for offset in range(0, e.kind.block_bytes, _LINE):
        place = e.at(e.block, _AHEAD + offset, I8)
        e.call(_PREFETCH, ir.VoidType(), place, reading, second_cache, data)


def _emit_block(e: Emitter, totals: dict[tuple[int, int], Any]) -> dict[tuple[int, int], Any]:
    builder, vectors = e.builder, e.processor.vectors

    def prepared(row: int, field: int, kind: Any) -> Any:
        return e.spread(e.load(e.rows_of_block, e.place(row, STEPS + field), kind))

    starts = [prepared(row, 2, I32) for row in range(e.rows)]
    sums = e.processor.multiply(e, starts, [[start] * vectors for start in starts])
    columns = [(e.first + vector * e.processor.lanes) * 2 for vector in range(vectors)]
    halves = ir.VectorType(F16, e.processor.lanes)
    scales, minimums = (
        [builder.fpext(e.load(e.block, begin + column, halves), e.floats) for column in columns]
        for begin in (e.kind.scales_at, e.kind.scales_at + (TILE * 2 if e.kind.minimums else 0))
    )
    found = {}
    for row in range(e.rows):
        scale, shift = prepared(row, 0, F32), prepared(row, 1, F32)
        for vector in range(vectors):
            bits = builder.bitcast(sums[row][vector], e.floats)
            total = e.fma(e.fma(bits, scale, shift), scales[vector], totals[row, vector])
            if e.kind.minimums:
                total = e.fma(prepared(row, 3, F32), minimums[vector], total)
            found[row, vector] = total
    return found

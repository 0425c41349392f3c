"""Products of bytes by the instructions of 64-bit ARM processors."""

from typing import Any

from llvmlite import ir

from fleet_edge.verifiers.blocks.emitter import I32, I64, STEPS, Emitter
from fleet_edge.verifiers.blocks.portable import MAGIC_BITS


def dot(e: Emitter, _starts: list[Any], sums: list[list[Any]]) -> list[list[Any]]:
    """Multiply by an instruction that adds products of four signed bytes to a lane."""
    builder = e.builder
    if e.kind.is_wide:
        sums = [[ir.Constant(e.sums, [MAGIC_BITS] * e.processor.lanes)] * e.processor.vectors for _ in range(e.rows)]
    flip = ir.Constant(e.bytes, [128] * e.bytes.count)
    for unsigned, step in e.steps():
        weights = [builder.xor(weight, flip) for weight in unsigned] if e.kind.is_wide else unsigned
        for row in range(e.rows):
            inputs = e.inputs(row, step)
            sums[row] = [
                e.call("llvm.aarch64.neon.sdot.v4i32.v16i8", e.sums, total, weight, inputs)
                for total, weight in zip(sums[row], weights, strict=True)
            ]
    return sums


def matrices(e: Emitter, starts: list[Any], _sums: list[list[Any]]) -> list[list[Any]]:
    """Multiply by an instruction for eight inputs of two outputs, unsigned, and of two rows.

    Two vectors hold the sums of four outputs: output 0 with each of the rows, then output 1; outputs 2 and 3.
    """
    builder, lanes = e.builder, e.processor.lanes
    steps = {step: weights for weights, step in e.steps()}
    rows = [(row, min(row + 1, e.rows - 1)) for row in range(0, e.rows, 2)]
    zeros = ir.Constant(e.sums, [0] * lanes)
    halves = [[[zeros, zeros] for _ in range(e.processor.vectors)] for _ in rows]

    def mixed(pair: list[Any], places: list[int]) -> Any:
        return builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(I32, lanes), places))

    for step in range(0, STEPS, 2):
        outputs = [
            [
                builder.bitcast(mixed([builder.bitcast(each, e.sums) for each in two], places), e.bytes)
                for places in ([0, 4, 1, 5], [2, 6, 3, 7])
            ]
            for two in zip(steps[step], steps[step + 1], strict=True)
        ]
        for pair, totals in zip(rows, halves, strict=True):
            inputs = _two_rows(e, pair, step)
            for total, weights in zip(totals, outputs, strict=True):
                for half in (0, 1):
                    total[half] = e.call(
                        "llvm.aarch64.neon.usmmla.v4i32.v16i8", e.sums, total[half], weights[half], inputs
                    )
    found = [
        [builder.add(starts[row], mixed(total, places)) for total in totals]
        for pair, totals in zip(rows, halves, strict=True)
        for row, places in zip(pair, ([0, 2, 4, 6], [1, 3, 5, 7]), strict=True)
    ]
    return found[: e.rows]


def _two_rows(e: Emitter, rows: tuple[int, int], step: int) -> Any:
    """Return eight inputs of each of two rows."""
    builder = e.builder
    vector: Any = ir.Constant(ir.VectorType(I64, 2), ir.Undefined)
    for place, row in enumerate(rows):
        two = e.load(e.rows_of_block, e.place(row, step), I64)
        vector = builder.insert_element(vector, two, ir.Constant(I32, place))
    return builder.bitcast(vector, e.bytes)

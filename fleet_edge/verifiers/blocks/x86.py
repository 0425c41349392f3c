"""Products of bytes by the instructions of x86 processors."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from fleet_edge.verifiers.blocks.emitter import I16, Emitter
from fleet_edge.verifiers.blocks.portable import MAGIC_BITS


def dot(instruction: str) -> Callable[[Emitter, list[Any], list[list[Any]]], list[list[Any]]]:
    """Multiply by an instruction that adds products of four unsigned and four signed bytes to a lane."""

    def multiply(e: Emitter, _starts: list[Any], sums: list[list[Any]]) -> list[list[Any]]:
        kind = ir.FunctionType(e.sums, [e.sums, e.bytes, e.bytes])
        for weights, step in e.steps():
            for row in range(e.rows):
                inputs = e.inputs(row, step)
                sums[row] = [
                    e.builder.asm(kind, instruction, "=v,0,v,v,~{memory}", [total, weight, inputs], side_effect=True)
                    for total, weight in zip(sums[row], weights, strict=True)
                ]
        return sums

    return multiply


def pairs(e: Emitter, starts: list[Any], sums: list[list[Any]]) -> list[list[Any]]:
    """Multiply by an instruction that adds two products of an unsigned and a signed byte in 16 bits.

    The sum of 16 products with 4-bit weights stays within 16 bits. An 8-bit weight is made signed, and its sign moves
    to the input, so that two products stay within 16 bits: at most 2 * 128 * 127.
    """
    builder, count = e.builder, e.bytes.count // 2
    halves = ir.VectorType(I16, count)
    ones, zeros = (ir.Constant(halves, [number] * count) for number in (1, 0))
    kind = ir.FunctionType(halves, [e.bytes, e.bytes])
    wide = ir.FunctionType(e.sums, [halves, halves])
    bytes_ = ir.FunctionType(e.bytes, [e.bytes, e.bytes])
    one = ir.FunctionType(e.bytes, [e.bytes])

    def call(kind: Any, instruction: str, *args: Any) -> Any:
        places = ", ".join(f"${len(args) - place}" for place in range(len(args) + 1))
        return builder.asm(
            kind, f"{instruction} {places}", "=x" + ",x" * len(args) + ",~{memory}", args, side_effect=True
        )

    if not e.kind.is_wide:
        added = [[zeros] * e.processor.vectors for _ in range(e.rows)]
        for weights, step in e.steps():
            for row in range(e.rows):
                inputs = e.inputs(row, step)
                added[row] = [
                    builder.add(total, call(kind, "vpmaddubsw", weight, inputs))
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
                two = call(kind, "vpmaddubsw", size, call(bytes_, "vpsignb", inputs, weight))
                sums[row][vector] = builder.add(sums[row][vector], call(wide, "vpmaddwd", two, ones))
    return sums

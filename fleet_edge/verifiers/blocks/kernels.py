"""The kernels: for each kind of processor and number format, a function for each number of rows."""

from functools import cache
from typing import Any, Final

import llvmlite.binding as llvm
from llvmlite import ir

from fleet_edge.verifiers.blocks import arm, x86
from fleet_edge.verifiers.blocks.emitter import BYTES, I64, Emitter, Processor, emit_pass
from fleet_edge.verifiers.blocks.layout import TILE, Format

PROCESSORS: Final = {
    "avx512vnni": Processor(
        "x86_64-unknown-linux-gnu",
        "icelake-server",
        "",
        frozenset({"avx512vnni", "avx512bw", "avx512vl"}),
        lanes=16,
        vectors=2,
        rows=6,
        multiply=x86.dot("vpdpbusd $3, $2, $0"),
    ),
    "avxvnni": Processor(
        "x86_64-unknown-linux-gnu",
        "haswell",
        "+avxvnni",
        frozenset({"avxvnni", "avx2", "fma", "f16c"}),
        lanes=8,
        vectors=2,
        rows=3,
        multiply=x86.dot("{vex} vpdpbusd $3, $2, $0"),
    ),
    "avx2": Processor(
        "x86_64-unknown-linux-gnu",
        "haswell",
        "",
        frozenset({"avx2", "fma", "f16c"}),
        lanes=8,
        vectors=2,
        rows=3,
        multiply=x86.pairs,
    ),
    "i8mm": Processor(
        "aarch64-unknown-linux-gnu",
        "generic",
        "+dotprod,+i8mm",
        frozenset({"i8mm"}),
        lanes=4,
        vectors=2,
        rows=6,
        multiply=arm.matrices,
    ),
    "dotprod": Processor(
        "aarch64-unknown-linux-gnu",
        "generic",
        "+dotprod",
        frozenset({"dotprod"}),
        lanes=4,
        vectors=4,
        rows=3,
        multiply=arm.dot,
    ),
}


def _emit(module: ir.Module, processor: Processor, kind: Format, rows: int) -> None:
    kinds = [BYTES] * 4 + [I64] * 2
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), name_of(rows))
    emitter = Emitter(function, processor, kind, rows)
    for first in range(0, TILE, processor.lanes * processor.vectors):
        emitter.first = first
        emit_pass(emitter)
    emitter.builder.ret_void()


def name_of(rows: int) -> str:
    return f"rows_{rows}"


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
    return engine, [engine.get_function_address(name_of(rows)) for rows in range(1, PROCESSORS[name].rows + 1)]

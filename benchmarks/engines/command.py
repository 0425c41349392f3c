"""`python -m benchmarks engines`: which engines, which sizes of step, and what comes of it."""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.engines.ours import cells_for, fill, llama_cpp, steps
from benchmarks.engines.raw_process import raw_llama
from benchmarks.engines.stability import LONGEST, TEXTS, spreads
from benchmarks.engines.timing import Cell, Pace, Step, by_turns
from benchmarks.shared.conditions import conditions
from fleet_edge.verifiers.contract import VerifierError

__all__ = ["main"]

_GOALS: Final = {"llama_cpp": 1.15, "packed": 1.5}
"""Most that ours may take, as a multiple of the raw engine."""

_RAW: Final = {"llama_cpp": "raw llama.cpp", "packed": "the matrix products"}
_WAYS: Final = {"llama_cpp": ("without flash attention", "with flash attention"), "packed": ("matrix products",)}
"""How the raw engine is run; the fastest counts."""

_FILES: Final = {"Q8_0": "target-Q8_0.gguf", "Q4_0": "Q4_0.gguf"}
# llama.cpp first: an edge that uses it has no torch in its process.
_ALL: Final = ("llama_cpp:Q8_0", "llama_cpp:Q4_0", "packed:float32", "packed:bfloat16")


@dataclass(frozen=True, slots=True)
class Row:
    """One size of step in one engine."""

    engine: str
    dtype: str
    sequences: int
    tokens: int
    context: int
    ms: float
    raw_ms: float
    ratio: float
    raw: str
    turns: int
    bound_ms: float | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print a table; return the exit code."""
    arguments = _parse(argv)
    if arguments.torch_device != "cpu":
        arguments.engines = [engine for engine in arguments.engines if engine.startswith("packed")]
    rows: list[Row] = []
    moved: list[dict[str, Any]] = []
    began = time.monotonic()
    try:
        for engine in arguments.engines:
            kind, _, dtype = engine.partition(":")
            if arguments.rows:
                moved += _stability(kind, dtype, arguments)
                continue
            for context in arguments.contexts:
                rows += _measure(kind, dtype, context, arguments)
                gc.collect()
    except VerifierError as error:
        print(error, file=sys.stderr)
        return 2
    if rows:
        _summarize(rows)
    print(f"{time.monotonic() - began:.0f} s in all.")
    if arguments.json:
        found = {
            **conditions("torch", "transformers", "llama-cpp-python"),
            "threads": arguments.threads,
            "stable_rows": arguments.stable_rows,
            "torch_device": arguments.torch_device,
            "rows": [asdict(row) for row in rows],
            "stability": moved,
        }
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks engines", description="Time a step of each verifier beside the raw engine under it."
    )
    parser.add_argument(
        "--models",
        type=Path,
        default=Path("models/smollm2-135m"),
        help="folder of `fleet models prepare` (%(default)s)",
    )
    parser.add_argument(
        "--engines", nargs="+", choices=_ALL, default=list(_ALL), metavar="ENGINE", help=", ".join(_ALL)
    )
    parser.add_argument("--sequences", type=_positive, nargs="+", metavar="B", help="1 4 16 64; on a GPU 1 16 64 256")
    parser.add_argument("--tokens", type=_positive, nargs="+", metavar="T", help="1 3 5 9; on a GPU 1 5 9")
    parser.add_argument("--contexts", type=_positive, nargs="+", metavar="C", help="256 2048")
    parser.add_argument("--quick", action="store_true", help="context 256 alone, and fewer repetitions: two minutes")
    parser.add_argument(
        "--rows", action="store_true", help="instead: how far a text's logits move with what is computed beside it"
    )
    parser.add_argument("--threads", type=_positive, default=len(os.sched_getaffinity(0)), help="of either engine")
    parser.add_argument(
        "--stable-rows", action="store_true", help="steps of texts that are to repeat, as in coupled mode, in llama.cpp"
    )
    parser.add_argument("--torch-device", default="cpu", help="of the packed verifier, such as cuda; then of it alone")
    parser.add_argument("--seconds", type=float, help="for one size of step, about (2; with --quick 0.5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    on_cpu = arguments.torch_device == "cpu"
    arguments.sequences = sorted(arguments.sequences or ([1, 4, 16, 64] if on_cpu else [1, 16, 64, 256]))
    arguments.tokens = sorted(arguments.tokens or ([1, 3, 5, 9] if on_cpu else [1, 5, 9]))
    arguments.contexts = arguments.contexts or ([256] if arguments.quick else [256, 2048])
    seconds = arguments.seconds or (0.5 if arguments.quick else 2.0)
    arguments.pace = Pace(seconds=seconds, fewest=2 if arguments.quick else 3)
    return arguments


def _stability(kind: str, dtype: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure how far rows move in one engine: in llama.cpp as for texts that are to repeat, and as for others."""
    for stable in (True, False) if kind == "llama_cpp" else (False,):
        yield from _spreads(kind, dtype, arguments, stable=stable)


def _spreads(kind: str, dtype: str, arguments: argparse.Namespace, *, stable: bool) -> Iterator[dict[str, Any]]:
    if kind == "llama_cpp":
        verifier = llama_cpp(
            arguments.models / _FILES[dtype],
            sequences=TEXTS,
            context=LONGEST,
            threads=arguments.threads,
            stable_rows=stable,
        )
    else:
        from benchmarks.engines import of_torch  # noqa: PLC0415 - as below

        verifier = of_torch.packed(
            of_torch.load(arguments.models / "target", dtype=dtype, device=arguments.torch_device)
        )
    kernels = ", stable rows" if stable else ""
    print(f"\n{kind}, {dtype}{kernels}: a text's rows, beside those of the text alone, one token at a time")
    print(f"{'':36} {'same':>7} {'logit':>9} {'variation':>10}")
    for each in spreads(verifier):
        print(f"{each.variant:36} {each.same:3d}/{each.rows:<3d} {each.logit:9.1e} {each.variation:10.1e}", flush=True)
        yield {"engine": kind, "dtype": dtype, "stable_rows": stable, **asdict(each)}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def _measure(kind: str, dtype: str, context: int, arguments: argparse.Namespace) -> Iterator[Row]:
    """Measure all sizes of step in one engine."""
    prepare = _of_llama_cpp if kind == "llama_cpp" else _of_torch
    print(
        f"\n{kind}, {dtype}, context {context}: loading, and filling {max(arguments.sequences)} sequences …", flush=True
    )
    with prepare(dtype, context, arguments) as (ours, raw, bound):
        print(f"{'B':>4} {'T':>3} {'ours ms':>9} {'raw ms':>9} {'ours/raw':>9}   raw: {_RAW[kind]}", flush=True)
        for sequences in arguments.sequences:
            for tokens in arguments.tokens:
                cell = by_turns(ours, raw, sequences=sequences, tokens=tokens, pace=arguments.pace)
                bound_ms = None if bound is None else bound(sequences)
                way = _WAYS[kind][cell.way]
                _print(cell, way, bound_ms)
                yield Row(
                    kind, dtype, sequences, tokens, context, cell.ms, cell.raw_ms, cell.ratio, way, cell.turns, bound_ms
                )


Prepared = tuple[Step, Sequence[Step], Callable[[int], float] | None]
"""Our step, the raw ones, and by the number of sequences what a step cannot be faster than, where that is known."""


@contextmanager
def _of_llama_cpp(dtype: str, context: int, arguments: argparse.Namespace) -> Iterator[Prepared]:
    path = arguments.models / _FILES[dtype]
    most = max(arguments.sequences)
    verifier = llama_cpp(
        path, sequences=most, context=context, threads=arguments.threads, stable_rows=arguments.stable_rows
    )
    text = fill(verifier, sequences=most, context=context)
    size = {"streams": most, "cells": cells_for(context), "context": context, "threads": arguments.threads}
    with raw_llama(path, **size, flash=False) as plain, raw_llama(path, **size, flash=True) as flash:
        yield steps(verifier, text), (plain, flash), None


@contextmanager
def _of_torch(dtype: str, context: int, arguments: argparse.Namespace) -> Iterator[Prepared]:
    import torch  # noqa: PLC0415 - whoever measures llama.cpp alone may do without it

    from benchmarks.engines import of_torch  # noqa: PLC0415

    torch.set_num_threads(arguments.threads)
    target = of_torch.load(arguments.models / "target", dtype=dtype, device=arguments.torch_device)
    device = target.model.device
    raw = of_torch.products(target.model, device=device)
    verifier = of_torch.packed(target)
    text = fill(verifier, sequences=max(arguments.sequences), context=context)
    bound: Callable[[int], float] | None = None
    if device.type == "cuda":
        reads = of_torch.ReadBound(target)
        print(f"{reads.bytes_per_s / 1e9:.0f} GB/s within the device", flush=True)

        def bound(sequences: int) -> float:
            return reads.ms(sequences=sequences, context=context)

    yield steps(verifier, text, finish=of_torch.finisher(device)), (raw,), bound


def _print(cell: Cell, way: str, bound_ms: float | None) -> None:
    bound = "" if bound_ms is None else f"; reads {bound_ms:.2f} ms, {cell.ms / bound_ms:.1f} times that"
    print(
        f"{cell.sequences:4d} {cell.tokens:3d} {cell.ms:9.1f} {cell.raw_ms:9.1f} {cell.ratio:9.2f}   {way}{bound}",
        flush=True,
    )


def _summarize(rows: Sequence[Row]) -> None:
    print()
    for kind, goal in _GOALS.items():
        for dtype in dict.fromkeys(row.dtype for row in rows if row.engine == kind):
            ratios: list[Any] = [row.ratio for row in rows if (row.engine, row.dtype) == (kind, dtype)]
            kept = sum(ratio <= goal for ratio in ratios)
            print(
                f"{kind} {dtype}: {statistics.median(ratios):.2f} times {_RAW[kind]} at the median, {max(ratios):.2f} "
                f"at most; {kept} of {len(ratios)} sizes within {goal}."
            )

"""Steps: one step of each verifier over that of the raw engine under it (milliseconds, and their ratio).

For B sequences with T new tokens each, some tokens into them: our step, and what it cannot be faster than. For
llama.cpp that is the library itself on the same batch, in processes of its own, with flash attention and without; the
faster counts. For the engine blocks it is llama.cpp with the same file. All take turns, so that a slow moment of the
machine hits all, and the ratio is of their medians. Takes 20 minutes, `--quick` a few.

With `--shape` the models are random ones in a real shape, which llama.cpp computes without flash attention alone, since
each of its processes keeps a copy: `--shape 7b --engines blocks:Q4_0 blocks:Q4_K_M --threads 2 --sequences 1 4 16
--tokens 1 5 --contexts 256`. `--layers` makes a model smaller that would not fit; the difference of two is the time of
some layers.

`--ik-llama FILE` names a source archive of ik_llama.cpp, whose llama-bench is built once and computes the steps of one
sequence with the same files (column `ik_ms`). Without it, or if it fails over a file, ik_llama.cpp is not compared.
"""

import argparse
import gc
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.engines.cut_models import CUT, make_cut
from benchmarks.engines.ik_llama import built, step_ms
from benchmarks.harness import MODELS, Bench, SuiteReport, at_most, number_of, say, table
from benchmarks.large.models import SHAPES, make
from benchmarks.processes import BenchError
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.blocks.weight_cache import KEEPING
from fleet_edge.verifiers.contract import Item, Verifier
from fleet_edge.verifiers.llama_cpp.target import CELL_ROUNDING, open_target
from fleet_edge.verifiers.llama_cpp.verifier import LlamaCppVerifier
from fleet_edge.verifiers.registry import load_verifier

Step = Callable[[int, int], float]
"""Computes a number of sequences with a number of new tokens each; returns the milliseconds that it took."""

_MAX_TURNS: Final = 15
_CHUNK: Final = 256
_KV_BYTES: Final = 64 << 30  # enough for any step: memory is allocated as sequences come
_NEW: Final = 16
"""Most new tokens of a sequence."""

_GROWN: Final = 2_048
"""The same of a sequence that grows from step to step, as those of hybrids do, so that each step replays a draft."""

_PAUSE_S: Final = 0.05
"""Before each step: the threads of the one before spin for some milliseconds after its end, on the same cores."""

# What we set for our own processes: a user who runs the library alone does not.
_OURS: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@dataclass(frozen=True, slots=True)
class Cell:
    """One size of step: median milliseconds of ours and of the fastest raw variant, with that variant's number."""

    sequences: int
    tokens: int
    ms: float
    raw_ms: float
    way: int
    turns: int

    @property
    def ratio(self) -> float:
        return self.ms / self.raw_ms


def by_turns(ours: Step, raw: Sequence[Step], *, sequences: int, tokens: int, seconds: float, fewest: int) -> Cell:
    """Measure ours and each raw variant in turn, for about `seconds`; the first turn does not count."""
    every = (ours, *raw)
    turn_s = sum(step(sequences, tokens) / 1e3 + _PAUSE_S for step in every)
    turns = max(fewest, min(_MAX_TURNS, int(seconds / max(turn_s, 1e-6))))
    taken: list[list[float]] = [[] for _ in every]
    for _ in range(turns):
        for step, times in zip(every, taken, strict=True):
            time.sleep(_PAUSE_S)
            times.append(step(sequences, tokens))
    mine, *others = map(statistics.median, taken)
    raw_ms = min(others)
    return Cell(sequences, tokens, mine, raw_ms, others.index(raw_ms), turns)


def cells_for(context: int, new: int = _NEW) -> int:
    """Return the tokens per stream of llama.cpp to hold `context` and a step."""
    return -(-(context + new + 1) // CELL_ROUNDING) * CELL_ROUNDING


def llama_cpp(path: Path, *, sequences: int, context: int, threads: int) -> Verifier:
    """Return the llama.cpp verifier with room for sequences of that many tokens and a step."""
    target = open_target(path, gpu_layers=0)
    return LlamaCppVerifier(
        target,
        budget_bytes=sequences * cells_for(context) * target.token_kv_bytes,
        context=context + _NEW,
        threads=threads,
    )


def fill(verifier: Verifier, *, sequences: int, context: int) -> list[int]:
    """Fill sequences with the same tokens; return them."""
    size = verifier.info.vocabulary.size
    text = random.Random(0).choices(range(size), k=context)
    verifier.open(0)
    for begin in range(0, context, _CHUNK):
        verifier.score([Item(0, text[begin : begin + _CHUNK], 0)])
    for sequence in range(1, sequences):
        verifier.fork(sequence, 0, context)
    return text


def steps(verifier: Verifier, text: Sequence[int], *, grows: bool = False) -> Step:
    """Return a step of a verifier over filled sequences, which is rolled back afterwards unless they grow.

    Each step has other tokens, so that no server knows them from the one before.
    """
    chance, vocabulary = random.Random(1), range(verifier.info.vocabulary.size)

    def step(sequences: int, tokens: int) -> float:
        items = [Item(sequence, chance.choices(vocabulary, k=tokens), tokens) for sequence in range(sequences)]
        before = time.perf_counter()
        verifier.score(items)
        taken = time.perf_counter() - before
        for item in [] if grows else items:
            verifier.truncate(item.sequence, len(text))
        return 1e3 * taken

    return step


@contextmanager
def raw_llama(path: Path, *, streams: int, cells: int, context: int, threads: int, flash: bool) -> Iterator[Step]:
    numbers = map(str, (streams, cells, context, threads, int(flash)))
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.raw_llama", str(path), *numbers],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # Without the variable an assertion starts a debugger, whose output would pass for an answer.
        env={name: value for name, value in os.environ.items() if name not in _OURS} | {"GGML_NO_BACKTRACE": "1"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        commands, answers = process.stdin, process.stdout

        def answer() -> str:
            line = answers.readline()
            if not line:
                raise BenchError(
                    f"Raw llama.cpp has ended over {path}, most likely for want of memory: measure fewer --sequences, "
                    "or a smaller --contexts."
                )
            return line

        def step(sequences: int, tokens: int) -> float:
            with suppress(BrokenPipeError):  # it has ended, as its answer shows
                print(sequences, tokens, file=commands, flush=True)
            return float(answer())

        try:
            answer()
            yield step
        finally:
            process.kill()
            with suppress(BrokenPipeError):  # what it has not read
                commands.close()


_GOALS: Final = {"llama_cpp": 1.15, "blocks": 0.6, "blocks Q4_0": 0.45}
"""Largest median time of ours, as a multiple of the raw engine's."""

_LLAMA_CPP: Final = ("without flash attention", "with flash attention")
_FILES: Final = {"Q8_0": "target-Q8_0.gguf", "Q4_0": "Q4_0.gguf"}
ENGINES: Final = ("llama_cpp:Q8_0", "llama_cpp:Q4_0", "blocks:Q8_0", "blocks:Q4_0", "blocks:Q4_K_M", "blocks:MXFP4")
_DEFAULT: Final = ENGINES[:4]
_COLUMNS: Final = {"B": "d", "T": "d", "ms": ".1f", "raw_ms": ".1f", "ratio": ".2f", "raw": "", "ik_ms": ".1f"}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(_DEFAULT), help=", ".join(ENGINES))
    parser.add_argument("--shape", choices=(*SHAPES, *CUT), help="of random models")
    parser.add_argument("--layers", type=number_of(int, 1), help="of the shape; fewer than it has")
    parser.add_argument("--cache", type=Path, default=MODELS.parent / "random", help="of these (default: %(default)s)")
    parser.add_argument("--threads", type=number_of(int, 1), default=len(os.sched_getaffinity(0)), help="of either")
    for name, default in (("sequences", (1, 4, 16, 64)), ("tokens", (1, 3, 5, 9))):
        parser.add_argument(f"--{name}", type=number_of(int, 1), nargs="+", default=default, help="(%(default)s)")
    parser.add_argument("--contexts", type=number_of(int, 1), nargs="+", metavar="C", help="256 2048")
    parser.add_argument("--quick", action="store_true", help="context 256 alone, and fewer repetitions")
    parser.add_argument("--ik-llama", type=Path, metavar="FILE", help="tar archive of ik_llama.cpp's source")
    parser.add_argument("--tools", type=Path, default=MODELS.parent / "tools", help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="for one size of step, about (2; with --quick 0.5)")


def run(bench: Bench) -> SuiteReport:
    options = bench.options
    os.sched_setaffinity(0, bench.cores.edge | bench.cores.others)
    sequences, tokens = sorted(options.sequences), sorted(options.tokens)
    pace = {"seconds": options.seconds or (0.5 if options.quick else 2.0), "fewest": 2 if options.quick else 3}
    rival = None if options.ik_llama is None else built(options.ik_llama.expanduser(), options.tools.resolve())
    if rival is None:
        say("ik_llama.cpp is not compared: no --ik-llama names an archive of its source")
    rows: list[dict[str, Any]] = []
    for kind, _, dtype in (name.partition(":") for name in options.engines):
        for context in options.contexts or ([256] if options.quick else [256, 2048]):
            say(f"{kind}, {dtype}, context {context}: loading, and filling {sequences[-1]} sequences")
            here = []
            with _prepared(bench, kind, dtype, context, sequences[-1]) as (ours, raw):
                for number, new in ((number, new) for number in sequences for new in tokens):
                    cell = by_turns(ours, raw, sequences=number, tokens=new, **pace)  # type: ignore[arg-type]
                    found = {"B": number, "T": new, "raw": _LLAMA_CPP[cell.way], "ratio": cell.ratio}
                    here.append({**asdict(cell), "engine": kind, "dtype": dtype, "context": context, **found})
            if rival is not None:
                theirs = of_rival(rival, _model(bench, dtype), tokens, threads=options.threads)
                here = [{**row, "ik_ms": theirs.get(row["T"]) if row["B"] == 1 else None} for row in here]
            table(here, _COLUMNS, title=f"{kind}, {dtype}, context {context}; raw is the engine alone")
            rows += here
            gc.collect()
    goals = []
    for engine in dict.fromkeys((row["engine"], row["dtype"]) for row in rows):
        ratios = [row["ratio"] for row in rows if (row["engine"], row["dtype"]) == engine]
        what = f"{' '.join(engine)} over the raw engine (median; {max(ratios):.2f} at most)"
        goals.append(at_most(what, statistics.median(ratios), _GOALS[_group(*engine)]))
    return SuiteReport(rows, goals)


def of_rival(program: Path, model: Path, tokens: Sequence[int], *, threads: int) -> dict[int, float]:
    """Return the milliseconds of ik_llama.cpp by new tokens; none where it does not serve the architecture."""
    try:
        return step_ms(program, model, tokens, threads=threads)
    except BenchError as error:
        say(f"ik_llama.cpp is not compared: {error}")
        return {}


def _group(kind: str, dtype: str) -> str:
    return f"{kind} {dtype}" if f"{kind} {dtype}" in _GOALS else kind


def _model(bench: Bench, file: str) -> Path:
    shape = bench.options.shape
    if shape is not None:
        maker = make_cut if shape in CUT else make
        vocabulary = bench.model("Q4_0.gguf")
        return maker(bench.options.cache, shape, file, vocabulary=vocabulary, layers=bench.options.layers)
    if bench.options.layers is not None:
        raise BenchError("--layers needs a --shape.")
    if file not in _FILES:
        raise BenchError(f"There is no {file} of SmolLM2, whose rows are no multiple of 256; give a --shape.")
    return bench.model(_FILES[file])


@contextmanager
def _prepared(bench: Bench, kind: str, dtype: str, context: int, most: int) -> Iterator[tuple[Step, Sequence[Step]]]:
    """Load an engine, and what it is compared with; yield a step of ours and of each raw variant."""
    options, threads = bench.options, bench.options.threads
    grows = options.shape in SHAPES and SHAPES[options.shape].delta is not None
    new = _GROWN if grows else _NEW
    size = {"streams": most, "cells": cells_for(context, new), "context": context, "threads": threads}
    path = _model(bench, dtype)
    if kind == "llama_cpp":
        ours = llama_cpp(path, sequences=most, context=context, threads=threads)
    else:
        settings = {"target": str(path), "engine": kind, "threads": threads, "context": context + new}
        ours = load_verifier(EdgeSettings.model_validate({**settings, "kv_bytes": _KV_BYTES}))
        for thread in threading.enumerate():
            if thread.name == KEEPING:  # gigabytes are written
                thread.join()
    step = steps(ours, fill(ours, sequences=most, context=context), grows=grows)
    with raw_llama(path, **size, flash=False) as plain:
        if options.shape is not None:
            yield step, (plain,)
            return
        with raw_llama(path, **size, flash=True) as flash:
            yield step, (plain, flash)

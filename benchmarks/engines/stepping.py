"""A step of our verifiers and of the raw engine under them, timed by turns."""

import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.processes import BenchError
from fleet_edge.verifiers.contract import Item, Verifier
from fleet_edge.verifiers.llama_cpp.slab import CELL_ROUNDING, open_target
from fleet_edge.verifiers.llama_cpp.verifier import LlamaCppVerifier

Step = Callable[[int, int], float]
"""Computes a number of sequences with a number of new tokens each; returns the milliseconds that it took."""

_MOST_TURNS: Final = 15
_CHUNK: Final = 256
_NEW: Final = 16
"""Most new tokens of a sequence."""

# What we set for our own processes: a user who runs the library alone does not.
_OURS: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@dataclass(frozen=True, slots=True)
class Cell:
    """One size of step: median milliseconds of ours and of the fastest of the raw ways, with that way's number."""

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
    """Measure ours and each way to run the raw engine by turns, for about `seconds`; the first turn does not count."""
    every = (ours, *raw)
    turn_s = sum(step(sequences, tokens) for step in every) / 1e3
    turns = max(fewest, min(_MOST_TURNS, int(seconds / max(turn_s, 1e-6))))
    taken: list[list[float]] = [[] for _ in every]
    for _ in range(turns):
        for step, times in zip(every, taken, strict=True):
            times.append(step(sequences, tokens))
    mine, *others = map(statistics.median, taken)
    raw_ms = min(others)
    return Cell(sequences, tokens, mine, raw_ms, others.index(raw_ms), turns)


def cells_for(context: int) -> int:
    """Return how many tokens a stream of llama.cpp has room for, to hold `context` and those of a step."""
    return -(-(context + _NEW + 1) // CELL_ROUNDING) * CELL_ROUNDING


def llama_cpp(path: Path, *, sequences: int, context: int, threads: int, batch_invariant: bool) -> Verifier:
    """Return the llama.cpp verifier with room for sequences of that many tokens and a step."""
    target = open_target(path, gpu_layers=0)
    return LlamaCppVerifier(
        target,
        budget_bytes=sequences * cells_for(context) * target.token_kv_bytes,
        context=context + _NEW,
        threads=threads,
        batch_invariant=batch_invariant,
    )


def fill(verifier: Verifier, *, sequences: int, context: int) -> list[int]:
    """Fill sequences with the same text; return it."""
    size = verifier.info.vocabulary.size
    text = random.Random(0).choices(range(size), k=context)
    verifier.open(0)
    for begin in range(0, context, _CHUNK):
        verifier.score([Item(0, text[begin : begin + _CHUNK], 0)])
    for sequence in range(1, sequences):
        verifier.fork(sequence, 0, context)
    return text


def steps(verifier: Verifier, text: Sequence[int], *, finish: Callable[[Any], object] = lambda _logits: None) -> Step:
    """Return a step of a verifier whose sequences hold a text; what it computes is forgotten again."""

    def step(sequences: int, tokens: int) -> float:
        items = [Item(sequence, text[sequence % 100 :][:tokens], tokens) for sequence in range(sequences)]
        before = time.perf_counter()
        finish(verifier.score(items))
        taken = time.perf_counter() - before
        for item in items:
            verifier.truncate(item.sequence, len(text))
        return 1e3 * taken

    return step


@contextmanager
def raw_llama(path: Path, *, streams: int, cells: int, context: int, threads: int, flash: bool) -> Iterator[Step]:
    """Run raw llama.cpp; yield its step.

    Raises:
        BenchError: It has ended.
    """
    numbers = map(str, (streams, cells, context, threads, int(flash)))
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.engines.raw_llama", str(path), *numbers],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in _OURS},
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

"""Our verifiers, filled with sequences, and a step of each."""

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.engines.timing import Step
from fleet_edge.verifiers.contract import Item, Verifier
from fleet_edge.verifiers.llama_cpp.slab import CELL_ROUNDING
from fleet_edge.verifiers.llama_cpp.target import open_target
from fleet_edge.verifiers.llama_cpp.verifier import LlamaCppVerifier

__all__ = ["cells_for", "fill", "llama_cpp", "steps"]

_CHUNK: Final = 256
_NEW: Final = 16
"""Most new tokens of a sequence."""


def cells_for(context: int) -> int:
    """Return how many tokens a stream of llama.cpp has room for, to hold so many and a step's."""
    return -(-(context + _NEW + 1) // CELL_ROUNDING) * CELL_ROUNDING


def llama_cpp(path: Path, *, sequences: int, context: int, threads: int, stable_rows: bool) -> Verifier:
    """Return the llama.cpp verifier with room for sequences of that many tokens and a step."""
    target = open_target(path, gpu_layers=0)
    return LlamaCppVerifier(
        target,
        budget_bytes=sequences * cells_for(context) * target.token_kv_bytes,
        context=context + _NEW,
        threads=threads,
        stable_rows=stable_rows,
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
    """Return a step of a verifier whose sequences hold a text; what it computes is forgotten again.

    Args:
        verifier: Filled.
        text: What its sequences hold.
        finish: Waits until the logits are there, where computing goes on behind `score`.
    """

    def step(sequences: int, tokens: int) -> float:
        items = [Item(sequence, text[sequence % 100 :][:tokens], tokens) for sequence in range(sequences)]
        before = time.perf_counter()
        finish(verifier.score(items))
        taken = time.perf_counter() - before
        for item in items:
            verifier.truncate(item.sequence, len(text))
        return 1e3 * taken

    return step

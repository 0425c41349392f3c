"""Measurement of one engine: how long a step takes; a program of its own, whose memory is gone when it ends.

Usage: python -m fleet_edge.verifiers.auto.measurement SETTINGS

SETTINGS is JSON: the fields of `MEASURED_BY` and the engine. The answer is one line of JSON, a `Report`. It ends when
its standard input does, so that it does not outlive who has asked.
"""

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import CapacityExceeded, Item, Logits, UnsupportedModel, Verifier
from fleet_edge.verifiers.registry import load_verifier
from schemas.errors import FleetError

MEASURED_BY: Final = frozenset(
    {"target", "dtype", "torch_device", "threads", "gpu_layers", "batch_invariant", "context", "kv_bytes"}
)
"""Settings that decide how fast an engine is."""

SHAPES: Final = ((1, 1), (4, 5), (16, 1))
"""Sequences and new tokens of each: one text that is written, some that are verified, many that are written."""

_CONTEXT: Final = 256
_SPARE: Final = 8
_CHUNK: Final = 128
_ROWS: Final = 8
_IDS: Final = 64
_SEED: Final = 20_261_126
_REPEATS: Final = 5
_FEWEST_REPEATS: Final = 2
_SHAPE_S: Final = 3.0

Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Measurement(BaseModel):
    """What was measured.

    Attributes:
        step_ms: By shape (`4x5`), milliseconds of a step; without shapes that there was no memory for.
        runs_on: As `TargetInfo` says it.
        vocabulary: Size and fingerprint.
        likely: Of some positions of a text that is always the same one, the likeliest ids and their probabilities.
    """

    step_ms: dict[str, Milliseconds]
    runs_on: str
    vocabulary: str
    likely: list[dict[int, Probability]]


class Report(BaseModel):
    """What the program answers.

    Attributes:
        measurement: None where the engine cannot serve the target.
        sentence: Why it cannot.
        lasting: Whether that is because of the model, and will be so the next time.
    """

    measurement: Measurement | None = None
    sentence: str = ""
    lasting: bool = False


def measure(verifier: Verifier, clock: Callable[[], float]) -> Measurement:
    """Measure a verifier without sequences, and leave it so.

    Args:
        verifier: The target model.
        clock: Monotonic seconds.
    """
    info = verifier.info
    context = max(1, min(_CONTEXT, info.context - _SPARE))
    text = random.Random(_SEED).choices(range(info.vocabulary.size), k=context)  # noqa: S311 - no secret
    sequences = range(-1, -1 - max(count for count, _ in SHAPES), -1)  # no session has these
    step_ms = {}
    try:
        likely = _likely(_prefill(verifier, sequences[0], text))
        there = 1 + _fork(verifier, sequences, context)
        for count, tokens in SHAPES:
            items = [Item(sequence, text[-tokens:], tokens) for sequence in sequences[:count]]
            if count <= there and context + tokens <= info.context and verifier.fits(items):
                step_ms[f"{count}x{tokens}"] = 1e3 * _seconds(verifier, items, context, clock)
    finally:
        for sequence in sequences:
            verifier.close(sequence)
    return Measurement(step_ms=step_ms, runs_on=info.runs_on, vocabulary=str(info.vocabulary), likely=likely)


def main(arguments: Sequence[str]) -> int:
    """Run as a program; return the exit code."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # What native libraries write must not get into the answer.
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    (text,) = arguments
    try:
        verifier = load_verifier(EdgeSettings.model_validate_json(text))
        report = Report(measurement=measure(verifier, time.perf_counter))
    except FleetError as error:
        report = Report(sentence=str(error), lasting=isinstance(error, UnsupportedModel))
    except MemoryError:
        report = Report(sentence="The machine has no memory for it.")
    answer.write(report.model_dump_json() + "\n")
    answer.flush()
    return 0


def _prefill(verifier: Verifier, sequence: int, text: Sequence[int]) -> NDArray[np.float32]:
    verifier.open(sequence)
    rows = min(_ROWS, len(text))
    head, tail = text[:-rows], text[-rows:]
    for begin in range(0, len(head), _CHUNK):
        verifier.score([Item(sequence, head[begin : begin + _CHUNK], 0)])
    return _on_host(verifier.score([Item(sequence, tail, rows)]))


def _fork(verifier: Verifier, sequences: Sequence[int], length: int) -> int:
    """Copy the first sequence to the others, as far as there is memory; return to how many."""
    for number, sequence in enumerate(sequences[1:]):
        try:
            verifier.fork(sequence, sequences[0], length)
        except CapacityExceeded:
            return number
    return len(sequences) - 1


def _seconds(verifier: Verifier, items: Sequence[Item], context: int, clock: Callable[[], float]) -> float:
    """Return the least of some steps, fewer where they take long: other work on the machine only adds to it."""
    taken: list[float] = []
    first = clock()
    while len(taken) <= _FEWEST_REPEATS or (len(taken) <= _REPEATS and clock() - first < _SHAPE_S):
        before = clock()
        _on_host(verifier.score(items)[:1, :1])  # where it runs on a GPU, not before it has finished
        taken.append(clock() - before)
        for item in items:
            verifier.truncate(item.sequence, context)
    return min(taken)


def _likely(rows: NDArray[np.float32]) -> list[dict[int, float]]:
    """Return the likeliest ids of each row and their probabilities, without shaping."""
    found = []
    for row in rows.astype(np.float64):
        probs = np.exp(row - row.max())
        probs /= probs.sum()
        best = np.argsort(-probs)[:_IDS]
        found.append({int(index): float(probs[index]) for index in best})
    return found


def _on_host(logits: Logits) -> NDArray[np.float32]:
    if isinstance(logits, np.ndarray):
        return logits.copy()
    host: Any = logits.cpu().numpy()
    return np.array(host, dtype=np.float32)


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""A machine's balance: for how many rows it multiplies while it reads the weights once.

Below the balance a step takes as long as reading the weights, whatever its rows; above it, each row adds to its time.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numba
import numpy as np

from fleet_edge.verifiers.blocks.layout import BLOCK, FOUR, TILE, Format
from fleet_edge.verifiers.blocks.products import Inputs, multiply, variants
from fleet_edge.verifiers.blocks.weights import Weights, empty

_BYTES: Final = 256 << 20
"""Size of the weight: more than the caches of most processors hold."""
_INPUTS: Final = 4096
_MANY: Final = 24
"""Rows that take most of their time to multiply, on any processor."""
_REPETITIONS: Final = 5


@dataclass(frozen=True, slots=True)
class Balance:
    variant: str
    threads: int
    multiply_adds: float
    """A second, with many rows."""
    bytes: float
    """Of weights a second, with one row."""
    rows: float
    """At which reading and multiplying take the same time."""


def measure_balance(kind: Format = FOUR, *, variant: str | None = None, size: int = _BYTES) -> Balance:
    """Measure with the threads that `numba.set_num_threads` says, in less than a second after compilation."""
    outputs = max(size // (kind.block_bytes * _INPUTS // BLOCK), 1) * TILE
    weights = empty(outputs, _INPUTS, kind)
    weights.tiles[:] = 0
    one, many = (_shortest(weights, rows, variant) for rows in (1, _MANY))
    count = outputs * _INPUTS
    return Balance(
        variant=variant or variants()[0],
        threads=numba.get_num_threads(),
        multiply_adds=count * _MANY / many,
        bytes=weights.nbytes / one,
        rows=one / (many / _MANY),
    )


def _shortest(weights: Weights, rows: int, variant: str | None) -> float:
    """Return the seconds of the fastest of some products."""
    inputs = Inputs.empty(rows, weights.inputs)
    inputs.values[:], inputs.scales[:], inputs.sums[:] = 0, 1, 0
    out = np.empty((rows, weights.padded_outputs), np.float32)
    multiply(weights, inputs, None, out, variant=variant)
    return min(_seconds(lambda: multiply(weights, inputs, None, out, variant=variant)) for _ in range(_REPETITIONS))


def _seconds(function: Callable[[], None]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin

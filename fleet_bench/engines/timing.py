"""Timing of two things by turns."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

__all__ = ["Cell", "Pace", "Step", "by_turns"]

Step = Callable[[int, int], float]
"""Computes so many sequences with so many new tokens each; returns the milliseconds that it took."""

_MOST_PAIRS: Final = 15


@dataclass(frozen=True, slots=True)
class Pace:
    """How long to measure.

    Attributes:
        seconds: For one size of step, about.
        fewest: Pairs at least, the first of which does not count.
    """

    seconds: float
    fewest: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One size of step.

    Attributes:
        sequences: In the step.
        tokens: New ones of each.
        ms: Median of ours.
        raw_ms: Median of the raw engine.
        pairs: Measured.
    """

    sequences: int
    tokens: int
    ms: float
    raw_ms: float
    pairs: int

    @property
    def ratio(self) -> float:
        """Ours over raw."""
        return self.ms / self.raw_ms


def by_turns(ours: Step, raw: Step, *, sequences: int, tokens: int, pace: Pace) -> Cell:
    """Measure one size of step: ours and raw by turns, one pair of them uncounted first."""
    pair_s = (ours(sequences, tokens) + raw(sequences, tokens)) / 1e3
    pairs = max(pace.fewest, min(_MOST_PAIRS, int(pace.seconds / max(pair_s, 1e-6))))
    mine, others = [], []
    for _ in range(pairs):
        mine.append(ours(sequences, tokens))
        others.append(raw(sequences, tokens))
    return Cell(sequences, tokens, statistics.median(mine), statistics.median(others), pairs)

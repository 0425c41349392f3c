"""Timing of several things by turns."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["Cell", "Pace", "Step", "by_turns"]

Step = Callable[[int, int], float]
"""Computes so many sequences with so many new tokens each; returns the milliseconds that it took."""

_MOST_TURNS: Final = 15


@dataclass(frozen=True, slots=True)
class Pace:
    """How long to measure.

    Attributes:
        seconds: For one size of step, about.
        fewest: Turns at least.
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
        raw_ms: Median of the raw engine; of several ways to run it the fastest.
        way: Number of that way.
        turns: Measured.
    """

    sequences: int
    tokens: int
    ms: float
    raw_ms: float
    way: int
    turns: int

    @property
    def ratio(self) -> float:
        """Ours over raw."""
        return self.ms / self.raw_ms


def by_turns(ours: Step, raw: Sequence[Step], *, sequences: int, tokens: int, pace: Pace) -> Cell:
    """Measure one size of step: ours and each way to run the raw engine by turns; the first turn does not count."""
    every = (ours, *raw)
    turn_s = sum(step(sequences, tokens) for step in every) / 1e3
    turns = max(pace.fewest, min(_MOST_TURNS, int(pace.seconds / max(turn_s, 1e-6))))
    taken: list[list[float]] = [[] for _ in every]
    for _ in range(turns):
        for step, times in zip(every, taken, strict=True):
            times.append(step(sequences, tokens))
    mine, *others = map(statistics.median, taken)
    raw_ms = min(others)
    return Cell(sequences, tokens, mine, raw_ms, others.index(raw_ms), turns)

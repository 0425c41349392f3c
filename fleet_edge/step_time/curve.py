"""Step-time curve: milliseconds of a verification step, by how many sessions it verifies and how many tokens of each.

Between what was measured it is interpolated, first over the tokens, then over the sessions. A step with more of either
never takes less: where a measurement says so, it was disturbed, and the largest so far holds. Beyond the last number of
tokens a row goes on with its last slope; beyond the last number of sessions a step grows in proportion, since what was
not measured is not taken for cheap.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

from fleet_edge.step_time.errors import CurveError

Row = tuple[tuple[float, float], ...]
"""Pairs of a size (tokens, sessions) and milliseconds, by rising size; the milliseconds never fall."""

_RECTANGULAR: Final = "llama.cpp"
"""The engine whose calls have equally many tokens of each session."""

_MOST_MS: Final = 3_600_000.0


@dataclass(frozen=True, slots=True)
class StepCurve:
    """How long a step takes.

    Attributes:
        rows: By sessions, a row over the new tokens of each; 1 session and 1 token are among them.
        prefill: A row over the tokens of a prompt that a step computes, alone.
        target: The target model's name; this and what follows is for the reader.
        engine: What it is computed by.
        runs_on: Device, number format and threads.
        machine: Processor and cores.
        context: Tokens that each session held.
        mode: Of verification.
        at: When it was measured.
    """

    rows: Mapping[int, Row]
    prefill: Row
    target: str = ""
    engine: str = ""
    runs_on: str = ""
    machine: str = ""
    context: int = 0
    mode: str = ""
    at: str = ""
    _sessions: tuple[int, ...] = field(default=(), init=False)

    def __post_init__(self) -> None:
        """Put what was measured in order.

        Raises:
            CurveError: Something is missing, or no time.
        """
        rows = {sessions: _row(self.rows[sessions]) for sessions in sorted(self.rows)}
        if 1 not in rows:
            raise CurveError("There is no step of 1 session among the steps; measure one.")
        for sessions, row in rows.items():
            if row[0][0] != 1:
                raise CurveError(f"Of {sessions} sessions there is no step of 1 token each; measure one.")
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "prefill", _row(self.prefill) if self.prefill else rows[1])
        object.__setattr__(self, "_sessions", tuple(rows))

    @property
    def most_sessions(self) -> int:
        """The largest number of sessions that was measured."""
        return self._sessions[-1]

    def step_ms(self, sessions: float, tokens: float, *, prefill: float = 0.0) -> float:
        """Return the milliseconds of a step.

        Args:
            sessions: That it verifies; 0 where it computes prompts alone.
            tokens: New ones of each, on average.
            prefill: Tokens of prompts that it computes beside.
        """
        if sessions <= 0:
            return _at(self.prefill, prefill)
        tokens, sessions = max(1.0, tokens), max(1.0, sessions)
        times = tuple(accumulate((_at(self.rows[each], tokens) for each in self._sessions), max))
        last = self._sessions[-1]
        if sessions > last:
            verified = times[-1] * sessions / last
        else:
            verified = _at(tuple(zip(map(float, self._sessions), times, strict=True)), sessions)
        if prefill <= 0:
            return verified
        # What a prompt adds to a step that is computed anyway: its weights are read once.
        return verified + max(0.0, _at(self.prefill, prefill) - self.prefill[0][1])

    def mixed_ms(self, tokens: Sequence[int], *, prefill: float = 0.0) -> float:
        """Return the milliseconds of a step whose sessions have different numbers of tokens.

        llama.cpp computes sessions at once that have equally many: all are filled up to the longest, or what some have
        more than others takes another pass. Other engines take them as they are.

        Args:
            tokens: New ones of each session; none where prompts are computed alone.
            prefill: As in `step_ms`.
        """
        if not tokens:
            return self.step_ms(0, 0.0, prefill=prefill)
        if self.engine != _RECTANGULAR:
            return self.step_ms(len(tokens), sum(tokens) / len(tokens), prefill=prefill)
        heights = sorted(set(tokens))
        best = self.step_ms(len(tokens), heights[-1], prefill=prefill)
        for height in heights[:-1]:
            longer = sum(each > height for each in tokens)
            first = self.step_ms(len(tokens), height, prefill=prefill)
            best = min(best, first + self.step_ms(longer, heights[-1] - height))
        return best

    def steps(self) -> Iterable[tuple[int, int, float]]:
        """Return sessions, tokens and milliseconds of each step that was measured."""
        return ((sessions, int(tokens), ms) for sessions, row in self.rows.items() for tokens, ms in row)


def _row(pairs: Sequence[tuple[float, float]]) -> Row:
    ordered = sorted(pairs)
    sizes = [size for size, _ in ordered]
    if len(set(sizes)) != len(sizes):
        raise CurveError("A step is there twice; leave one of the two out.")
    for size, ms in ordered:
        if size < 1 or not 0.0 < ms <= _MOST_MS:
            raise CurveError(f"A step of {ms:g} ms with {size:g} tokens is none: times are above 0 and below an hour.")
    return tuple(zip(sizes, accumulate((ms for _, ms in ordered), max), strict=True))


def _at(row: Sequence[tuple[float, float]], size: float) -> float:
    """Interpolate in a row, or go on with its last slope; in proportion where it has but one value."""
    if len(row) == 1:
        ((known, ms),) = row
        return ms * max(1.0, size / known)
    place = min(max(1, bisect_right([each for each, _ in row], size)), len(row) - 1)
    (left, before), (right, after) = row[place - 1], row[place]
    return before + (after - before) * (max(size, row[0][0]) - left) / (right - left)

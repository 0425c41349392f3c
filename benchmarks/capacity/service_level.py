"""Service level that clients of an edge get within a time window."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np

from fleet_admin.advice import ServiceLevel

LEVEL: Final = ServiceLevel()
"""About reading speed."""

_QUANTILE: Final = 0.95


@dataclass(frozen=True, slots=True)
class TimeWindow:
    """A counted period; seconds of any clock."""

    begin: float
    end: float  # exclusive

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    def __contains__(self, at: float) -> bool:
        return self.begin <= at < self.end


@dataclass(slots=True)
class TimedRequest:
    """A client's request; seconds of any clock."""

    asked_at: float = 0.0
    pieces: list[tuple[float, int]] = field(default_factory=list)  # arrival and number of tokens
    ended_at: float | None = None  # None while it runs

    @property
    def tokens(self) -> int:
        return sum(number for _, number in self.pieces)

    def first_s(self, until: float) -> float:
        """Return the time to the first token, or the time waited until `until` without one."""
        return (self.pieces[0][0] if self.pieces else until) - self.asked_at

    def gaps(self, window: TimeWindow) -> list[float]:
        """Return the times between tokens in the window, 0 within a piece.

        A wait that the window's end cuts off counts if it is longer than any before, so that a starving client does not
        look better.
        """
        found: list[float] = []
        for (before, _), (at, tokens) in zip(self.pieces, self.pieces[1:], strict=False):
            if at in window:
                found += [at - before] + [0.0] * (tokens - 1)
        seen = [at for at, _ in self.pieces if at < window.end]
        if seen and (self.ended_at is None or self.ended_at >= window.end):
            waited = window.end - seen[-1]
            if waited > max(found, default=0.0):
                found.append(waited)
        return found

    def written(self, window: TimeWindow) -> tuple[int, float]:
        """Return the tokens in the window after the first piece, and their seconds."""
        if not self.pieces:
            return 0, 0.0
        last = window.end if self.ended_at is None else self.pieces[-1][0]
        seconds = min(window.end, last) - max(window.begin, self.pieces[0][0])
        return sum(tokens for at, tokens in self.pieces[1:] if at in window), max(0.0, seconds)


@dataclass(slots=True)
class Client:
    texts: list[TimedRequest] = field(default_factory=list)

    def tokens(self, window: TimeWindow) -> int:
        return sum(tokens for text in self.texts for at, tokens in text.pieces if at in window)

    def pace(self, window: TimeWindow) -> float:
        """Return tokens/s during requests, without the waits for their first tokens."""
        found = [text.written(window) for text in self.texts]
        seconds = sum(each for _, each in found)
        return sum(tokens for tokens, _ in found) / seconds if seconds > 0.0 else 0.0

    def gap_s(self, window: TimeWindow) -> float | None:
        """Return the 95th percentile of the time between tokens; None with fewer than two tokens."""
        gaps = [gap for text in self.texts for gap in text.gaps(window)]
        return float(np.quantile(gaps, _QUANTILE)) if gaps else None

    def at_level(self, window: TimeWindow, level: ServiceLevel = LEVEL) -> bool:
        gap_s = self.gap_s(window)
        return gap_s is not None and gap_s <= level.gap_s and self.pace(window) >= level.tokens_per_s

    @classmethod
    def from_json(cls, texts: Sequence[dict[str, Any]]) -> Self:
        return cls(
            [TimedRequest(each["asked_at"], [(at, n) for at, n in each["pieces"]], each["ended_at"]) for each in texts]
        )

    def json(self) -> list[dict[str, Any]]:
        return [{"asked_at": text.asked_at, "pieces": text.pieces, "ended_at": text.ended_at} for text in self.texts]

"""Tally: what devices got within a time, and who got a service level; counted as in `fleet bench capacity`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fleet_cli.edge.advise.simulation.messages import Text

__all__ = ["Level", "Window", "gap_s", "gets_level", "pace", "quantile", "tokens_in"]

_QUANTILE: Final = 0.95


@dataclass(frozen=True, slots=True)
class Level:
    """A service level.

    Attributes:
        tokens_per_s: Least, of one device while its texts are written.
        gap_s: Most seconds between two tokens, at the 95th percentile.
    """

    tokens_per_s: float = 8.0
    gap_s: float = 0.25


@dataclass(frozen=True, slots=True)
class Window:
    """A time in which something is counted (seconds)."""

    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.begin

    def __contains__(self, at: float) -> bool:
        """Whether a moment is in it."""
        return self.begin <= at < self.end


def quantile(values: Sequence[float], share: float) -> float:
    """Return a quantile, interpolated between neighbours; values must be there."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def tokens_in(texts: Sequence[Text], window: Window) -> int:
    """Return how many tokens of a device came in the window."""
    return sum(tokens for text in texts for at, tokens in text.pieces if at in window)


def pace(texts: Sequence[Text], window: Window) -> float:
    """Return a device's tokens a second while its texts are written, the waits for their first tokens left out."""
    tokens, seconds = 0, 0.0
    for text in texts:
        if not text.pieces:
            continue
        last = window.end if text.ended_at is None else text.pieces[-1][0]
        seconds += max(0.0, min(window.end, last) - max(window.begin, text.pieces[0][0]))
        tokens += sum(number for at, number in text.pieces[1:] if at in window)
    return tokens / seconds if seconds > 0.0 else 0.0


def gap_s(texts: Sequence[Text], window: Window) -> float | None:
    """Return a device's time between tokens at the 95th percentile, 0 within a piece; None where there were not two.

    A wait that the window's end cuts off counts if it is longer than any before.
    """
    gaps = [gap for text in texts for gap in _gaps(text, window)]
    return quantile(gaps, _QUANTILE) if gaps else None


def gets_level(texts: Sequence[Text], window: Window, level: Level) -> bool:
    """Whether a device got the service level."""
    gap = gap_s(texts, window)
    return gap is not None and gap <= level.gap_s and pace(texts, window) >= level.tokens_per_s


def _gaps(text: Text, window: Window) -> list[float]:
    found: list[float] = []
    for (before, _), (at, tokens) in zip(text.pieces, text.pieces[1:], strict=False):
        if at in window:
            found += [at - before] + [0.0] * (tokens - 1)
    seen = [at for at, _ in text.pieces if at < window.end]
    if seen and (text.ended_at is None or text.ended_at >= window.end):
        waited = window.end - seen[-1]
        if waited > max(found, default=0.0):
            found.append(waited)
    return found

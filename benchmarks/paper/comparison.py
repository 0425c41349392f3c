"""Comparison: what the other benchmarks have found of the published systems and of ours, side by side."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from schemas.errors import FleetError

__all__ = ["SYSTEMS", "Place", "bytes_lines", "places_of", "read_rows", "speed_lines"]

SYSTEMS: Final = ("edge-streaming", "dsd", "dssd-dense", "ours-residual", "ours-coupled", "ours-auto")
"""The paper's baseline, its predecessor, itself, and ours."""

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Where systems were timed.

    Attributes:
        cost: Of the target.
        draft: The draft model.
        rtt_ms: There and back.
        mbit_s: Width of the line.
        tokens_per_s: By system.
    """

    cost: int
    draft: str
    rtt_ms: float
    mbit_s: float
    tokens_per_s: Mapping[str, float]

    def ratio(self, ours: str, theirs: str) -> float | None:
        """Return how many times as fast one is; None if either was not timed."""
        mine, other = self.tokens_per_s.get(ours), self.tokens_per_s.get(theirs)
        return mine / other if mine and other else None


def read_rows(file: Path) -> tuple[list[Row], Mapping[str, Any]]:
    """Return the rows of a benchmark's JSON, and its other fields.

    Raises:
        FleetError: It cannot be read, or is another benchmark's.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        rows = found.pop("rows")
        for row in rows:
            _ = row["system"], row["draft"]
    except OSError as error:
        raise FleetError(f"{file} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FleetError(
            f"{file} is not what `python -m benchmarks latency` or `python -m benchmarks bytes` writes with --json."
        ) from None
    return rows, found


def places_of(rows: Sequence[Row]) -> list[Place]:
    """Put the rows of `python -m benchmarks latency` together by place."""
    places: dict[tuple[int, str, float, float], dict[str, float]] = {}
    for row in rows:
        if row.get("tokens_per_s") is not None and row.get("mbit_s") is not None:
            key = (row["cost"], row["draft"], row["rtt_ms"], row["mbit_s"])
            places.setdefault(key, {})[row["system"]] = row["tokens_per_s"]
    return [Place(*key, found) for key, found in places.items()]


def speed_lines(places: Sequence[Place]) -> Iterator[str]:
    """Yield a table of speeds."""
    yield f"{'tokens a second':<48}" + "".join(f"{name:>15}" for name in SYSTEMS) + f"{'x DSD':>8}{'x DSSD':>8}"
    for place in places:
        label = f"cost {place.cost}, {place.draft}, {place.rtt_ms:g} ms, {place.mbit_s:g} Mbit/s"
        speeds = "".join(_figure(place.tokens_per_s.get(name), 15, 1) for name in SYSTEMS)
        ratios = (place.ratio("ours-residual", theirs) for theirs in ("dsd", "dssd-dense"))
        yield f"  {label:<46}{speeds}" + "".join(_figure(ratio, 8, 1) for ratio in ratios)


def bytes_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table of payload, of drafts of the same length."""
    yield f"{'payload, bytes a token':<48}{'up':>15}{'down':>15}{'DSD up /':>12}{'dense down /':>14}"
    for draft in dict.fromkeys(row["draft"] for row in rows):
        mine = {row["system"]: row for row in reversed(rows) if row["draft"] == draft and _alike(row)}
        dsd, dense = mine.get("dsd"), mine.get("dssd-dense")
        for system in SYSTEMS:
            row = mine.get(system)
            if row is None:
                continue
            up, down = row["uplink_bytes_per_token"], row["downlink_bytes_per_token"]
            times_up = dsd["uplink_bytes_per_token"] / up if dsd and up else None
            times_down = dense["downlink_bytes_per_token"] / down if dense and down else None
            figures = _figure(times_up, 12, 1) + _figure(times_down, 14, 1)
            yield f"  {f'{draft}, {system}':<46}{up:15,.1f}{down:15,.1f}{figures}"


def _alike(row: Row) -> bool:
    return row.get("draft_length") in {None, 4} and not row.get("stops")


def _figure(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width},.{digits}f}"

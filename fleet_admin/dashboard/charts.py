"""Charts of pages: their time axis, lines over it, and sparklines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby
from typing import Any, Final, Self, TypeVar

from fleet_admin.columns import Kind, moment, shown
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.visit import Visit
from fleet_edge.session_log import Grain, floor, following

T = TypeVar("T")

RANGES: Final[Mapping[str, tuple[str, timedelta]]] = {
    "1h": ("1 hour", timedelta(hours=1)),
    "6h": ("6 hours", timedelta(hours=6)),
    "24h": ("24 hours", timedelta(hours=24)),
    "7d": ("7 days", timedelta(days=7)),
    "30d": ("30 days", timedelta(days=30)),
    "365d": ("1 year", timedelta(days=365)),
}
"""Label and length by the name in addresses."""

_LONGEST: Final = (
    (timedelta(hours=2), Grain.MINUTE),
    (timedelta(hours=12), Grain.FIVE_MINUTES),
    (timedelta(days=8), Grain.HOUR),
    (timedelta(days=100), Grain.DAY),
)
"""Longest time that is drawn by each grain; longer ones are drawn by the month."""

_LEAST: Final = timedelta(minutes=10)
"""Shortest time axis, of a fleet that has just begun."""


def range_of(visit: Visit, default: str = "24h") -> tuple[str, timedelta]:
    """Return the visitor's time range by name and length; raises `Problem` if there is none of that name."""
    name = visit.query("range") or default
    if name not in RANGES:
        raise Problem(400, f"There is no range {name[:20]!r}; there are {', '.join(RANGES)}.")
    return name, RANGES[name][1]


_WORDS: Final = {"B": "bytes", "B/s": "bytes per second"}


@dataclass(frozen=True, slots=True)
class Timeline:
    """Time axis of a page's charts: the visitor's range, or what there is of it where the fleet is younger."""

    range: str
    begin: datetime
    end: datetime
    grain: Grain

    @classmethod
    def of(cls, visit: Visit, default: str = "24h") -> Self:
        name, length = range_of(visit, default)
        first = visit.services.log.beginning() or visit.now
        begin = min(max(visit.now - length, first), visit.now - _LEAST)
        grain = next((grain for longest, grain in _LONGEST if visit.now - begin <= longest), Grain.MONTH)
        return cls(name, floor(grain, begin), visit.now, grain)

    @property
    def seconds(self) -> float:
        return (self.end - self.begin).total_seconds()

    def per_second(self, start: datetime | None, amount: float) -> float:
        """Return the mean rate of what was counted from `start` on; the last point's time is not over."""
        assert start is not None  # a grain was asked for
        return amount / max((min(following(self.grain, start), self.end) - start).total_seconds(), 1.0)

    def chart(
        self,
        rows: Mapping[Any, T],
        lines: Mapping[str, Callable[[T], float | None]],
        *,
        unit: str = "",
        kind: Kind = "figure",
        sums: bool = False,
    ) -> dict[str, Any]:
        """Return the data of a template's chart of `rows` by their start.

        `kind` is as in `columns.shown`; shares are drawn in percent. `unit` follows a value. Where a time has no row,
        sums are zero, and other lines have a gap.
        """
        unit = "%" if kind == "percent" else unit
        starts = [self.begin]
        while (start := following(self.grain, starts[-1])) < self.end:
            starts.append(start)
        idle = 0.0 if sums else None
        found = {
            name: [value(rows[start]) if start in rows else idle for start in starts] for name, value in lines.items()
        }
        known = bool(rows) and any(each is not None for values in found.values() for each in values)
        factor = 100.0 if kind == "percent" else 1.0
        digits = {Grain.MONTH: 7, Grain.DAY: 10}.get(self.grain, 16)
        return {
            "times": [int(start.timestamp()) for start in starts] if known else [],
            "lines": [
                {"name": name, "values": [None if each is None else float(f"{each * factor:.6g}") for each in values]}
                for name, values in found.items()
            ],
            "unit": unit,
            "digits": digits,  # of a time
            "caption": f"{_WORDS.get(unit, unit)}, by {self.grain.replace('5-', '5 ')}".lstrip(", "),
            "between": [int(self.begin.timestamp()), int(self.end.timestamp())],
            "table": [
                [moment(start)[:digits], *(shown(values[number], kind) for values in found.values())]
                for number, start in reversed(list(enumerate(starts)))
                if start in rows
            ],
        }


def sparkline(chart: Mapping[str, Any]) -> list[str]:
    """Return the points of SVG polylines, 100 wide and 24 high: one for each run of the first line's values."""
    values: Sequence[float | None] = chart["lines"][0]["values"] if chart["times"] else []
    most = max((each for each in values if each is not None), default=0.0) or 1.0
    step = 100 / max(len(values) - 1, 1)
    runs = groupby(enumerate(values), key=lambda pair: pair[1] is None)
    drawn = [
        [f"{number * step:.1f},{23 - 22 * (each or 0) / most:.1f}" for number, each in run]
        for absent, run in runs
        if not absent
    ]
    # A line of one point twice is a dot.
    return [" ".join(points * 2 if len(points) == 1 else points) for points in drawn]

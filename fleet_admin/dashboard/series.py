"""Series: points in time as charts and tables show them."""

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, TypeVar

from fleet_admin.columns import Kind, moment, shown

T = TypeVar("T")

Line = tuple[str, Callable[[T], float | None]]
"""A line's name, and its value at a point."""


def series(
    points: Iterable[T],
    at: Callable[[T], datetime],
    lines: "Sequence[Line[T]]",
    *,
    unit: str = "",
    kind: Kind = "figure",
    between: tuple[datetime, datetime] | None = None,
) -> dict[str, Any]:
    """Return what the chart of a template takes.

    Args:
        points: In whatever order.
        at: A point's time.
        lines: What is drawn.
        unit: Of all of them.
        between: The time that is drawn, also where there are no points.
        kind: How the table shows a value; see `columns.shown`. Shares are drawn in percent.
    """
    ordered = sorted(points, key=at)
    factor = 100.0 if kind == "percent" else 1.0
    values = [[value(point) for point in ordered] for _, value in lines]
    return {
        "times": [int(at(point).timestamp()) for point in ordered],
        "lines": [
            {"name": name, "values": [None if each is None else round(each * factor, 3) for each in own]}
            for (name, _), own in zip(lines, values, strict=True)
        ],
        "unit": unit,
        "between": None if between is None else [int(each.timestamp()) for each in between],
        "table": [
            [moment(at(point))[:16], *(shown(own[number], kind) for own in values)]
            for number, point in reversed(list(enumerate(ordered)))
        ],
    }

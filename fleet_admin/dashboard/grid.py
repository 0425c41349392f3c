"""Parts of pages: tables to filter, sort and save as CSV, time ranges, and charts.

A table's view is in its address, so that it can be bookmarked and shared:
`?f_draft=Q4&sort=-tokens&columns=device,tokens`.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, Generic, TypeVar

from fleet_admin.columns import Column, Kind, in_order, moment, shown
from fleet_admin.dashboard.errors import Problem

T = TypeVar("T")

Link = Callable[[T], str]
"""Returns the address that a cell of a row leads to."""

_PAGE: Final = 100
_NONE: Final = "-"
MOST_SHOWN: Final = 2
"""Highest rank of the columns shown by default."""

_COMPARISONS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}


@dataclass(frozen=True, slots=True)
class GridView(Generic[T]):
    """The visible part of a grid: `rows` of this page, `found` of all that match, `total` before filtering."""

    columns: tuple[Column[T], ...]
    every: tuple[Column[T], ...]
    rows: Sequence[T]
    found: Sequence[T] = field(repr=False)
    total: int
    filters: Mapping[str, str]
    sort: str
    page: int
    pages: int
    links: Mapping[str, Link[T]]

    @property
    def headings(self) -> list[str]:
        return [column.key for column in self.columns]

    def lines(self) -> list[list[object]]:
        """Return the rows of the CSV: all that match."""
        return [[column.value(row) for column in self.columns] for row in self.found]


class Grid(Generic[T]):
    """A table: its columns, of which the first is always shown, its default sort, and the links of cells."""

    def __init__(self, columns: Sequence[Column[T]], *, sort: str, links: Mapping[str, Link[T]] | None = None) -> None:
        self.columns = tuple(columns)
        self._links = links or {}
        self._by_key = {column.key: column for column in columns}
        self._sort = sort

    def view(self, rows: Sequence[T], query: Mapping[str, tuple[str, ...]]) -> GridView[T]:
        """Filter, sort and page rows by a query; raises `Problem` if it is invalid."""
        filters = {column.key: text for column in self.columns if (text := _last(query, f"f_{column.key}"))}
        found = [row for row in rows if all(matches(self._by_key[key], row, text) for key, text in filters.items())]
        sort = _last(query, "sort") or self._sort
        column = self._by_key.get(sort.removeprefix("-"))
        if column is None:
            raise Problem(400, f"There is no column {sort[:40]!r} to sort by.")
        found = in_order(found, column, falling=sort.startswith("-"))
        pages = max(1, -(-len(found) // _PAGE))
        page = min(number_from_one(_last(query, "page") or "1", "page"), pages)
        return GridView(
            columns=self._chosen(query.get("columns", ())),
            every=self.columns,
            rows=found[(page - 1) * _PAGE : page * _PAGE],
            found=found,
            total=len(rows),
            filters=filters,
            sort=sort,
            page=page,
            pages=pages,
            links=self._links,
        )

    def _chosen(self, asked: Sequence[str]) -> tuple[Column[T], ...]:
        keys = {key for text in asked for key in text.split(",") if key}
        if unknown := sorted(keys - self._by_key.keys()):
            raise Problem(400, f"There is no column {unknown[0][:40]!r}; there are {', '.join(self._by_key)}.")
        first = self.columns[0].key
        keys = keys or {each.key for each in self.columns if each.rank <= MOST_SHOWN}
        return tuple(each for each in self.columns if each.key in {first, *keys})


def matches(column: Column[T], row: T, text: str) -> bool:
    """Return whether a row's value matches a filter; raises `Problem` for an invalid number.

    Numbers: `5`, `>5`, `<=0.5`, `3..5`, shares in percent. Strings: a part, or `=` before the whole. `!` negates
    either, and `-` matches no value.
    """
    if text.startswith("!") and len(text) > 1:
        return not matches(column, row, text[1:])
    value = column.value(row)
    if text == _NONE:
        return value is None or value == ""
    if value is None:
        return False
    if column.numeric:
        return _within(value * 100 if column.kind == "percent" else value, text, column)
    said = value.isoformat(" ") if isinstance(value, datetime) else str(value)
    whole = text.startswith("=")
    return said.casefold() == text[1:].casefold() if whole else text.casefold() in said.casefold()


def _within(value: float, text: str, column: Column[T]) -> bool:
    try:
        low, dots, high = text.partition("..")
        if dots:
            return float(low or "-inf") <= value <= float(high or "inf")
        for sign, compare in _COMPARISONS.items():
            if text.startswith(sign):
                return compare(value, float(text.removeprefix(sign)))
        return float(text) == value
    except ValueError:
        raise Problem(
            400, f"The column {column.heading} is chosen by a number: 5, >5, <=5, 3..5, or - for none."
        ) from None


def _last(query: Mapping[str, tuple[str, ...]], name: str) -> str:
    text = query.get(name, ("",))[-1].strip()
    if len(text) > 100:  # noqa: PLR2004 - longer than any name
        raise Problem(400, f"The field {name[:40]} has more than 100 characters; shorten it.")
    return text


def number_from_one(text: str, what: str) -> int:
    """Parse a number of an address; raises `Problem` if it is none."""
    if not text.isascii() or not text.isdigit() or len(text) > 7 or int(text) < 1:  # noqa: PLR2004
        raise Problem(400, f"The {what} is a number from 1.")
    return int(text)


RANGES: Final[tuple[tuple[str, str], ...]] = (
    ("1h", "1 hour"),
    ("6h", "6 hours"),
    ("24h", "24 hours"),
    ("7d", "7 days"),
    ("30d", "30 days"),
    ("365d", "1 year"),
)
"""Name in addresses, and label."""

DEFAULT_RANGE: Final = "24h"

_LENGTHS: Final = {
    "1h": timedelta(hours=1),
    "6h": timedelta(hours=6),
    "24h": timedelta(hours=24),
    "7d": timedelta(days=7),
    "30d": timedelta(days=30),
    "365d": timedelta(days=365),
}


def range_of(text: str) -> tuple[str, timedelta]:
    """Return a time range's name and length; raises `Problem` if there is none of that name."""
    name = text or DEFAULT_RANGE
    length = _LENGTHS.get(name)
    if length is None:
        raise Problem(400, f"There is no range {name[:20]!r}; there are {', '.join(_LENGTHS)}.")
    return name, length


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
    """Return the data of a template's chart.

    `at` is a point's time, `kind` is as in `columns.shown`; shares are drawn in percent. `between` is drawn as a whole,
    also where there are no points.
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

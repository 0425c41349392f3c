"""Grid: a table of rows that a page filters by column, sorts, pages through, and gives as CSV.

All of it is in the address, so that a view can be kept and passed on: `?f_draft=Q4&sort=-tokens&columns=device,tokens`.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Generic, TypeVar

from fleet_admin.columns import Column, in_order
from fleet_admin.dashboard.errors import Problem

T = TypeVar("T")

Link = Callable[[T], str]
"""Returns the address that a cell of a row leads to."""

_PAGE: Final = 100
_NONE: Final = "-"
MOST_SHOWN: Final = 2
"""Highest rank of the columns that are shown unless others are chosen."""

_COMPARISONS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}


@dataclass(frozen=True, slots=True)
class GridView(Generic[T]):
    """What of a grid is shown.

    Attributes:
        columns: Shown, from left to right.
        every: All that there are.
        rows: Of this page.
        found: All rows that the filters meet, in order.
        total: Rows before filtering.
        filters: What was asked for, by column.
        sort: The column that it is sorted by, with a `-` before it where the largest come first.
        page: Number of this page, from 1.
        pages: Number of pages.
        links: Of the columns whose cells lead somewhere, by key.
    """

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
        """Return the rows of the CSV: all that were found."""
        return [[column.value(row) for column in self.columns] for row in self.found]


class Grid(Generic[T]):
    """A table's columns, and how they are chosen by.

    Args:
        columns: All that there are; the first is always shown.
        sort: By which it is sorted at first.
        links: Of the columns whose cells lead somewhere, by key.
    """

    def __init__(self, columns: Sequence[Column[T]], *, sort: str, links: Mapping[str, Link[T]] | None = None) -> None:
        self.columns = tuple(columns)
        self._links = links or {}
        self._by_key = {column.key: column for column in columns}
        self._sort = sort

    def view(self, rows: Sequence[T], query: Mapping[str, tuple[str, ...]]) -> GridView[T]:
        """Choose, sort and cut rows as a query asks.

        Raises:
            Problem: The query cannot be understood.
        """
        filters = {column.key: text for column in self.columns if (text := _last(query, f"f_{column.key}"))}
        found = [row for row in rows if all(matches(self._by_key[key], row, text) for key, text in filters.items())]
        sort = _last(query, "sort") or self._sort
        column = self._by_key.get(sort.removeprefix("-"))
        if column is None:
            raise Problem(400, f"There is no column {sort[:40]!r} to sort by.")
        found = in_order(found, column, falling=sort.startswith("-"))
        pages = max(1, -(-len(found) // _PAGE))
        page = min(_number(_last(query, "page") or "1"), pages)
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
    """Return whether a row's value is one that a filter asks for.

    Args:
        column: Whose value.
        row: Of which row.
        text: For numbers `5`, `>5`, `<=0.5`, `3..5`, shares in percent; for texts a part, `=` before a whole one; `!`
            before either turns it round; `-` for none.

    Raises:
        Problem: A number is asked for that is none.
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


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < 1:  # noqa: PLR2004
        raise Problem(400, "The page is a number from 1.")
    return int(text)

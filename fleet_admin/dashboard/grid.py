"""Tables of pages, to filter, sort and save as CSV.

A table's view is in its address, so that it can be bookmarked and shared:
`?f_draft=Q4&sort=-tokens&columns=device,tokens`.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Generic, TypeVar
from urllib.parse import quote, urlencode

from fleet_admin.columns import Column, in_order
from fleet_admin.dashboard.errors import Problem
from fleet_edge.store.records import ADMINISTRATOR
from fleet_edge.store.views import AlertView

T = TypeVar("T")

CellLink = Callable[[T], str]
"""Returns the address that a cell of a row leads to."""


def address(kind: str, name: str) -> str:
    """Return the address of the page of a device or an edge; `kind` is the first part of its path."""
    return f"/{kind}/{quote(name, safe='')}"


def about(alert: AlertView) -> str:
    """Return the address of the device or the edge that an alert is about; empty if neither."""
    if alert.device is not None:
        return address("devices", alert.device)
    # An edge, or an edge and a code.
    return "" if alert.subject == "database" else address("edges", alert.subject.partition(" ")[0])


LINKS: Final[Mapping[str, CellLink[Any]]] = {
    # With the device, because session ids are unique only per device.
    "session": lambda row: f"/sessions/{row.session}?{urlencode({'device': row.device or ''})}",
    "device": lambda row: address("devices", row.device),
    "edge": lambda row: "" if row.edge == ADMINISTRATOR else address("edges", row.edge),
}
"""Links of the log's rows, by the column's key."""

_PAGE: Final = 100
_FIELDS: Final = 5
_NONE: Final = "-"
MAX_SHOWN: Final = 2
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
    links: Mapping[str, CellLink[T]]

    @property
    def fields(self) -> list[Column[T]]:
        """Return the columns with a field to filter by: a few, and those that are filtered by."""
        few = [column for column in self.every if column.rank <= 1][:_FIELDS]
        return [column for column in self.every if column in few or column.key in self.filters]

    @property
    def headings(self) -> list[str]:
        return [column.key for column in self.columns]

    def lines(self) -> list[list[object]]:
        """Return the rows of the CSV: all that match."""
        return [[column.value(row) for column in self.columns] for row in self.found]


class Grid(Generic[T]):
    """A table: its columns, of which the first is always shown, its default sort, and the links of cells."""

    def __init__(
        self, columns: Sequence[Column[T]], *, sort: str, links: Mapping[str, CellLink[T]] | None = None
    ) -> None:
        self.columns = tuple(columns)
        self._links = links or {}
        self._by_key = {column.key: column for column in columns}
        self._sort = sort

    def view(self, rows: Sequence[T], query: Mapping[str, tuple[str, ...]]) -> GridView[T]:
        """Filter, sort and page rows by a query; raises `Problem` if it is invalid."""
        filters = {column.key: text for column in self.columns if (text := _last(query, f"f_{column.key}"))}
        if (other := _last(query, "column")) and (text := _last(query, "value")):
            filters[self.column(other).key] = text
        found = [row for row in rows if all(matches(self._by_key[key], row, text) for key, text in filters.items())]
        sort = _last(query, "sort") or self._sort
        found = in_order(found, self.column(sort.removeprefix("-")), falling=sort.startswith("-"))
        pages = max(1, -(-len(found) // _PAGE))
        page = min(number_from_one(_last(query, "page") or "1", "page"), pages)
        return GridView(
            columns=self.chosen(query),
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

    def column(self, key: str) -> Column[T]:
        """Return a column by its key; raises `Problem` if there is none."""
        if key not in self._by_key:
            raise Problem(400, f"There is no column {key[:40]!r}; there are {', '.join(self._by_key)}.")
        return self._by_key[key]

    def chosen(self, query: Mapping[str, tuple[str, ...]]) -> tuple[Column[T], ...]:
        """Return the columns that a query chooses; raises `Problem` if it names one that is not there."""
        keys = {key for text in query.get("columns", ()) for key in text.split(",") if key}
        for key in keys:
            self.column(key)
        first = self.columns[0].key
        keys = keys or {each.key for each in self.columns if each.rank <= MAX_SHOWN}
        return tuple(each for each in self.columns if each.key in {first, *keys})


def matches(column: Column[T], row: T, text: str) -> bool:
    """Compare a row's value with a filter; raises `Problem` for an invalid number.

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

"""Reports: tables that are filtered, sorted and paged alike on the command line, on pages and in CSV.

A filter is a word such as `edge=edge-1`, `acceptance<50` or `sentence~timeout`: the key of a column, an operator, and a
value. Shares are in percent, times are ages or ISO 8601; without a value, `code=` chooses rows without one and `code!=`
those with one. All filters have to be met, but only one of several `=` or `~` for one column.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, Generic, TypeVar

from fleet_admin.columns import Column, in_order
from fleet_common.validation import read_time
from fleet_edge.session_log import OPERATORS, Filter, are_met
from schemas.errors import FleetError
from schemas.printable import printable_line

T = TypeVar("T")

MAX_ROWS: Final = 10_000
"""Rows of the log that are sorted, or filtered by what the database does not have; the latest ones."""

_CSV_ROWS: Final = 200_000
_CSV_PAGE: Final = 500
_WORD: Final = re.compile(r"(\w+)(!?[=~]|[<>]=?)(.*)", re.ASCII | re.DOTALL)


class ReportError(FleetError):
    """A report was asked for by a filter, a column or an order that it does not have."""


@dataclass(frozen=True, slots=True)
class Rows(Generic[T]):
    """Rows `first` and following of a report. Of one that is read in pages, neither `found` nor `total` is known.

    `total` counts the rows before the filters. `more` follow these.
    """

    rows: Sequence[T]
    first: int = 1
    more: bool = False
    found: int | None = None
    total: int | None = None


@dataclass(frozen=True, slots=True)
class Report(Generic[T]):
    """A table of the fleet.

    Attributes:
        name: Plural noun.
        columns: The first is always shown.
        read: Returns rows, given filters as `where`, and `since`, `until`, `limit` and `skip`.
        order: Key of the column to sort by, with `-` for the highest first; empty for the order of `read`.
        paged: Whether `read` has this order and heeds `limit` and `skip`; otherwise it returns all rows.
        stored: Tells which filters `read` applies.
        hidden: Columns that can only be filtered by.
        empty: Says how rows come to be.
    """

    name: str
    columns: Sequence[Column[T]]
    read: Callable[..., Sequence[T]]
    order: str
    paged: bool = False
    stored: Callable[[Filter], bool] = lambda _: False
    hidden: Sequence[Column[T]] = ()
    empty: str = "There are none."
    now: datetime = field(default_factory=lambda: datetime.now(UTC), repr=False)

    def column(self, key: str) -> Column[T]:
        """Return a column by its key; raises `ReportError` if there is none."""
        for column in self.columns:
            if column.key == key:
                return column
        keys = ", ".join(column.key for column in self.columns)
        raise ReportError(f"{self.name.capitalize()} have no column {_excerpt(key)!r}; there are {keys}.")

    def chosen(self, keys: Sequence[str]) -> list[Column[T]]:
        """Return the first column and those of these keys, in the report's order; all columns for `all`."""
        if "all" in keys:
            return list(self.columns)
        named = [self.column(key) for key in keys]
        return [column for column in self.columns if column is self.columns[0] or column in named]

    def filters(self, words: Sequence[str]) -> list[Filter]:
        """Parse filters; raises `ReportError` if one cannot be read."""
        return [self._filter(word) for word in words]

    def _filter(self, word: str) -> Filter:
        found = _WORD.fullmatch(word)
        if found is None:
            raise ReportError(
                f"The filter {_excerpt(word)!r} cannot be read: write a column, one of {' '.join(OPERATORS)}, and a "
                f"value, such as {self.columns[0].key}=NAME."
            )
        key, sign, text = found[1], found[2], found[3].strip()
        column = next((each for each in self.hidden if each.key == key), None) or self.column(key)
        absent = not text or text == column.absent
        if not absent and sign in {"=", "!="} and column.choices and text not in column.choices:
            raise ReportError(f"{key} is one of {', '.join(column.choices)}, not {_excerpt(text)!r}.")
        chosen = Filter(_field(column), sign, None if absent else self._value(column, sign, text))
        if chosen.value is None and sign not in {"=", "!="}:
            raise ReportError(f"The filter {_excerpt(word)!r} needs a value.")
        if column in self.hidden and not self.stored(chosen):
            raise ReportError(f"{self.name.capitalize()} can be chosen by {key}=NAME only, not by {_excerpt(word)!r}.")
        return chosen

    def _value(self, column: Column[T], sign: str, text: str) -> object:
        if column.timed and "~" not in sign:
            try:
                return read_time(text, now=self.now)
            except ValueError as error:
                raise ReportError(f"{column.key}: {error}") from None
        if not column.numeric or column.kind == "number" or "~" in sign:
            if column.numeric or column.timed:
                raise ReportError(f"{column.key} is no text: use one of {' '.join(OPERATORS[:2] + OPERATORS[4:])}.")
            return text
        number = _number(text)
        if number is None:
            raise ReportError(f"{column.key} is compared with a number such as 5, not with {_excerpt(text)!r}.")
        return number / 100 if column.kind == "percent" else number

    def rows(
        self,
        filters: Sequence[Filter] = (),
        *,
        sort: str = "",
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = MAX_ROWS,
        skip: int = 0,
    ) -> Rows[T]:
        """Return rows that meet filters; raises `ReportError` for an unknown order."""
        order = sort or self.order
        by = self.column(order.removeprefix("-")) if order else None
        stored = [each for each in filters if self.stored(each)]
        own = [each for each in filters if each not in stored]
        if self.paged and not own and order == self.order:
            found = self.read(where=stored, since=since, until=until, limit=limit + 1, skip=skip)
            return Rows(found[:limit], skip + 1, more=len(found) > limit)
        every = self.read(where=stored, since=since, until=until, limit=MAX_ROWS, skip=0)
        columns = {_field(each): each for each in self.columns}

        def value_of(row: T, asked: Filter) -> object:
            column = columns[asked.field]
            value = column.value(row)
            return None if column.absent and value == column.absent else value

        met = [row for row in every if are_met(own, partial(value_of, row))]
        if by is not None and (sort or not self.paged):
            met = in_order(met, by, falling=order.startswith("-"))
        known = not self.paged or len(every) < MAX_ROWS
        counts = (len(met), len(every)) if known else (None, None)
        return Rows(met[skip : skip + limit], skip + 1, len(met) > skip + limit, *counts)

    def lines(
        self,
        columns: Sequence[Column[T]],
        filters: Sequence[Filter] = (),
        *,
        sort: str = "",
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int | None = None,
    ) -> Iterator[list[object]]:
        """Return the cells of all rows that meet filters; arguments as for `rows`."""
        limit = _CSV_ROWS if limit is None else limit
        streamed = self.paged and all(map(self.stored, filters)) and not sort
        if streamed:
            until = until or self.now  # rows that come meanwhile must not shift the others
        skip, page = 0, _CSV_PAGE if streamed else limit
        while skip < limit:
            found = self.rows(filters, sort=sort, since=since, until=until, limit=min(page, limit - skip), skip=skip)
            yield from ([column.value(row) for column in columns] for row in found.rows)
            if not found.more:
                return
            skip += page


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _field(column: Column[Any]) -> str:
    """Return the field of the log that a column shows; for a column that computes its value none that there is."""
    return column.source if isinstance(column.source, str) else f" {column.key}"


def _excerpt(text: str) -> str:
    return printable_line(text[:60])

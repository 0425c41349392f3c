"""Tables and JSON on standard output. A table never cuts a number: it hides columns, and says how many."""

import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from rich.cells import cell_len

from fleet_admin.columns import ABSENT, Column, plain, shown
from schemas.printable import printable_line

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Column", "cell", "describe", "plain", "print_json", "print_table", "table_lines"]

T = TypeVar("T")

_GAP: Final = 2
_ID_DIGITS: Final = 8  # of an id: enough to find its row again
_FOLDED: Final = frozenset({"text", "sentence"})
_TIMES: Final = frozenset({"moment", "day", "month", "ago"})
_COMFORTABLE: Final = 24
"""Narrowest width to which text is folded to show one more column."""

_NARROWEST: Final = 8
"""Narrowest width to which text is folded to fit the columns that are always shown."""

_UNLIMITED: Final = 1 << 20  # columns of a pipe


def print_json(value: object) -> None:
    json.dump(plain(value), sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def cell(value: object) -> str:
    """Return a value in one line, with control characters replaced: names come from devices."""
    return printable_line(shown(value))


def terminal_width() -> int | None:
    """Return the columns of the terminal; None if standard output is a pipe or a file."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_table(
    title: str,
    columns: Sequence[Column[T]],
    rows: Iterable[T],
    *,
    sort: str = "",
    whole: bool = False,
    as_json: bool = False,
    all_columns: str = "--json",
    empty: str = "There are none.",
) -> None:
    """Print a table, or `empty` without rows. A pipe gets all columns; a terminal those that fit, unless `whole`.

    The first column and the one with the key `sort`, by which the rows are sorted, are always shown. `all_columns` is
    the option that shows the others.
    """
    body = list(rows)
    if as_json:
        print_json(body)
        return
    width = None if whole else terminal_width()
    lines = [title, *table_lines(columns, body, width=width, sort=sort, all_columns=all_columns), ""]
    sys.stdout.write("\n".join(lines if body else [empty]) + "\n")


def describe(title: str, columns: Sequence[Column[T]], row: T) -> None:
    """Print the columns in which a row has a value, one a line."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, _GAP, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", min_width=_NARROWEST)
    for column in columns:
        if (value := column.value(row)) not in (None, ""):
            table.add_row(_heading(column), Text(printable_line(shown(value, column.kind))))
    print("\n".join([title, *_rendered(table, terminal_width() or _UNLIMITED), ""]))


@dataclass(slots=True)
class _Laid(Generic[T]):
    column: Column[T]
    heading: str
    cells: list[str]
    rank: int  # 0 where this table must show it
    whole: int  # width at which no cell and no word of the heading is folded

    def least(self, width: int) -> int:
        """Return the least width at which text has `width` columns and nothing else is folded."""
        if self.column.kind not in _FOLDED:
            return self.whole
        return min(self.whole, max(width, _longest(self.heading.split())))


def table_lines(
    columns: Sequence[Column[T]], rows: Sequence[T], *, width: int | None, sort: str = "", all_columns: str = "--json"
) -> list[str]:
    """Return the lines of a table: headings, a rule, the rows, and the number of hidden columns.

    Without a `width` all columns and values are shown whole.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    laid = [_laid(column, rows, whole=width is None) for column in columns]
    for place, each in enumerate(laid):
        if place == 0 or each.column.key == sort:
            each.rank = 0
    kept = laid
    if width is not None:
        laid = [each for each in laid if each.rank == 0 or any(text != ABSENT for text in each.cells)]
        kept = _fitting(laid, width)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    for each in kept:
        folds = width is not None and each.column.kind in _FOLDED
        heading = Text(each.heading if folds else textwrap.fill(each.heading, each.whole, break_long_words=False))
        table.add_column(
            heading, justify="right" if each.column.numeric else "left", no_wrap=not folds, overflow="fold"
        )
    for cells in zip(*(each.cells for each in kept), strict=True):
        table.add_row(*map(Text, cells))
    lines = _rendered(table, _UNLIMITED if width is None else max(width, _total(kept, _NARROWEST)))
    if hidden := len(laid) - len(kept):
        lines.append(f"{hidden} column{'s' * (hidden > 1)} hidden: widen the terminal, or use {all_columns}.")
    return lines


def _rendered(table: "Table", width: int) -> list[str]:
    from rich.console import Console

    console = Console(width=width, color_system=None)
    return ["".join(segment.text for segment in line).rstrip() for line in console.render_lines(table, pad=False)]


def _heading(column: Column[T]) -> str:
    return f"{column.heading} (UTC)" if column.kind in _TIMES else column.heading


def _laid(column: Column[T], rows: Sequence[T], *, whole: bool) -> _Laid[T]:
    values = [column.value(row) for row in rows]
    heading = _heading(column)
    if whole:
        cells = [printable_line(shown(value, column.kind)) for value in values]
    elif column.kind in ("moment", "ago"):
        cells = [ABSENT if value is None else f"{value.astimezone(UTC):%Y-%m-%d %H:%M}" for value in values]
    else:
        digits = _telling_digits(values) if column.kind == "id" else None
        cells = [printable_line(shown(value, column.kind)[:digits]) for value in values]
    return _Laid(column, heading, cells, column.rank, _longest([*cells, *([heading] if whole else heading.split())]))


def _telling_digits(ids: Sequence[str | None]) -> int | None:
    """Return how many digits distinguish ids; None for all of them."""
    known = {each for each in ids if each}
    longest = _longest(known)
    enough = (digits for digits in range(_ID_DIGITS, longest) if len({each[:digits] for each in known}) == len(known))
    return next(enough, None)


def _fitting(laid: list[_Laid[T]], width: int) -> list[_Laid[T]]:
    """Choose the columns that fit, lowest ranks first."""
    chosen = [each for each in laid if each.rank == 0]
    for each in sorted(laid, key=lambda each: each.rank):
        if each.rank and _total([*chosen, each], _COMFORTABLE) <= width:
            chosen.append(each)
    return [each for each in laid if any(each is one for one in chosen)]


def _total(laid: Sequence[_Laid[T]], text_width: int) -> int:
    return sum(each.least(text_width) for each in laid) + _GAP * (len(laid) - 1)


def _longest(texts: Iterable[str]) -> int:
    return max(map(cell_len, texts), default=0)

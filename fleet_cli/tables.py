"""Tables and JSON on standard output. A table never cuts a number: it hides columns, and says how many."""

import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from rich.cells import cell_len

from fleet_admin.columns import ABSENT, Column, plain, shown
from schemas.printable import printable_line

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Column", "cell", "describe", "plain", "print_json", "print_table", "table_lines"]

T = TypeVar("T")

_GAP: Final = "  "
_ID_DIGITS: Final = 8  # of an id: enough to find its row again
_FOLDED: Final = frozenset({"text", "sentence"})
_TIMES: Final = frozenset({"moment", "day", "month", "ago"})
_COMFORTABLE: Final = 24
"""Narrowest width to which text is folded to show one more column."""

_NARROWEST: Final = 8
"""Narrowest width to which text is folded to fit the columns that are always shown."""


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
    wide: bool = False,
    as_json: bool = False,
    empty: str = "There are none.",
) -> None:
    """Print a table, or `empty` without rows. A pipe gets all columns; a terminal those that fit, unless it is `wide`.

    The first column and the one with the key `sort`, by which the rows are sorted, are always shown.
    """
    body = list(rows)
    if as_json:
        print_json(body)
        return
    lines = [title, *table_lines(columns, body, width=None if wide else terminal_width(), sort=sort), ""]
    sys.stdout.write("\n".join(lines if body else [empty]) + "\n")


def describe(title: str, columns: Sequence[Column[T]], row: T) -> None:
    """Print the columns in which a row has a value, one a line."""
    named = [
        (_heading(column), printable_line(shown(value, column.kind)))
        for column in columns
        if (value := column.value(row)) not in (None, "")
    ]
    indent = max(cell_len(name) for name, _ in named) + len(_GAP)
    room = max((terminal_width() or sys.maxsize) - indent, _NARROWEST)
    print(title)
    for name, value in named:
        first, *others = _folded(value, room)
        print(f"{_padded(name, indent)}{first}".rstrip())
        for line in others:
            print(" " * indent + line)
    print()


@dataclass(slots=True)
class _Laid(Generic[T]):
    column: Column[T]
    heading: str
    cells: list[str]
    rank: int  # 0 where this table must show it
    whole: int  # width at which no cell and no word of the heading is folded
    width: int

    def narrow(self, width: int) -> None:
        """Fold text to a width; other kinds keep theirs."""
        if self.column.kind in _FOLDED:
            self.width = min(self.whole, max(width, _longest(self.heading.split())))


def table_lines(columns: Sequence[Column[T]], rows: Sequence[T], *, width: int | None, sort: str = "") -> list[str]:
    """Return the lines of a table: headings, a rule, the rows, and the number of hidden columns.

    Without a `width` all columns and values are shown whole.
    """
    laid = [_laid(column, rows, whole=width is None) for column in columns]
    for place, each in enumerate(laid):
        if place == 0 or each.column.key == sort:
            each.rank = 0
        elif width is not None and all(text == ABSENT for text in each.cells):
            each.rank = -1  # says nothing
    laid = [each for each in laid if each.rank >= 0]
    kept = laid if width is None else _fitting(laid, width)
    lines = list(_lines([_folded(each.heading, each.width) for each in kept], kept))
    lines.append("─" * (sum(each.width for each in kept) + len(_GAP) * (len(kept) - 1)))
    for number in range(len(rows)):
        lines += _lines([_folded(each.cells[number], each.width) for each in kept], kept)
    if hidden := len(laid) - len(kept):
        lines.append(f"{hidden} column{'s' * (hidden > 1)} hidden: widen the terminal, or use --json.")
    return lines


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
    words = [heading] if whole else heading.split()
    natural = max(_longest(cells), _longest(words))
    return _Laid(column, heading, cells, column.rank, natural, natural)


def _telling_digits(ids: Sequence[str | None]) -> int | None:
    """Return how many digits distinguish ids; None for all of them."""
    known = {each for each in ids if each}
    longest = _longest(known)
    enough = (digits for digits in range(_ID_DIGITS, longest) if len({each[:digits] for each in known}) == len(known))
    return next(enough, None)


def _fitting(laid: list[_Laid[T]], width: int) -> list[_Laid[T]]:
    """Choose the columns that fit, lowest ranks first, and give the remaining width to folded text."""
    for each in laid:
        each.narrow(_COMFORTABLE)
    chosen = [each for each in laid if each.rank == 0]
    for each in sorted(chosen, key=lambda each: -each.width):
        each.narrow(max(each.width - max(_total(chosen) - width, 0), _NARROWEST))
    for each in sorted(laid, key=lambda each: each.rank):
        if each.rank and _total([*chosen, each]) <= width:
            chosen.append(each)
    spare = width - _total(chosen)
    folded = sorted((each for each in chosen if each.width < each.whole), key=lambda each: each.whole - each.width)
    for place, each in enumerate(folded):
        given = min(each.whole - each.width, max(spare, 0) // (len(folded) - place))
        each.width, spare = each.width + given, spare - given
    return [each for each in laid if any(each is one for one in chosen)]


def _total(laid: Sequence[_Laid[Any]]) -> int:
    return sum(each.width for each in laid) + len(_GAP) * (len(laid) - 1)


def _lines(texts: Sequence[list[str]], laid: Sequence[_Laid[T]]) -> Iterator[str]:
    """Yield the lines of one row, whose cells may have several each."""
    for number in range(max(map(len, texts))):
        parts = (
            _padded(lines[number] if number < len(lines) else "", each.width, right=each.column.numeric)
            for lines, each in zip(texts, laid, strict=True)
        )
        yield _GAP.join(parts).rstrip()


def _padded(text: str, width: int, *, right: bool = False) -> str:
    space = " " * (width - cell_len(text))
    return space + text if right else text + space


def _folded(text: str, width: int) -> list[str]:
    """Break text between words, and words that are longer than a line anywhere."""
    if cell_len(text) <= width:
        return [text]
    from rich.text import Text

    return [line.plain for line in Text(text).wrap(_console(), width)]


@cache
def _console() -> "Console":
    from rich.console import Console

    return Console()


def _longest(texts: Iterable[str]) -> int:
    return max(map(cell_len, texts), default=0)

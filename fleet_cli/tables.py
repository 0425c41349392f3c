"""JSON and table output of the session log's views."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from typing import Final, Generic, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from schemas.printable import printable_line

__all__ = ["Column", "cell", "describe", "plain", "print_json", "print_table"]

_LEAST_WIDTH: Final = 80
_MOST_WIDTH: Final = 1 << 16
_HEIGHT: Final = 25  # means nothing here, but without one the width is not taken everywhere
_ABSENT: Final = "—"


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Column(Generic[T]):
    """A column of a table.

    Attributes:
        heading: With the unit.
        value: Takes the column's value from a row.
        narrow: The heading for a terminal, broken into lines.
        brief: Makes the value's shorter form for a terminal.
        digits: After the decimal point.
        folds: Whether long values may be broken into lines: texts may, numbers may not.
        wide: Whether a terminal gets the column only if asked for all.
    """

    heading: str
    value: Callable[[T], object]
    narrow: str | None = None
    brief: Callable[[T], object] | None = None
    digits: int = 1
    folds: bool = False
    wide: bool = False

    def text(self, row: T, *, brief: bool) -> str:
        """Return what stands in the table."""
        take = self.brief if brief and self.brief is not None else self.value
        return cell(take(row), digits=self.digits)


def plain(value: object) -> object:
    """Turn views into what JSON holds, their worked-out rates included; times become ISO 8601 in UTC."""
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        classes = reversed(type(value).__mro__)
        names += [name for kind in classes for name, member in vars(kind).items() if isinstance(member, property)]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def print_json(value: object) -> None:
    """Write JSON to standard output."""
    json.dump(plain(value), sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def cell(value: object, digits: int = 1) -> str:
    """Return a value as a person reads it.

    Labels come from devices: what could move a terminal's cursor is replaced.
    """
    match value:
        case None:
            return _ABSENT
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:,.{digits}f}"
        case int():
            return f"{value:,}"
        case datetime():
            return value.strftime("%Y-%m-%d %H:%M:%S")
        case _:
            return printable_line(str(value))


def print_table(title: str, columns: "Sequence[Column[T]]", rows: Iterable[T], *, wide: bool = False) -> None:
    """Write a table; numbers are set to the right.

    Args:
        title: Above it.
        columns: From left to right.
        rows: What the columns take their values from.
        wide: Whether a terminal too gets all columns, and each value whole, as a pipe does: its lines may be longer
            than the terminal's.
    """
    console = Console()
    whole = wide or not console.is_terminal
    shown = [column for column in columns if whole or not column.wide]
    table = Table(
        title=title,
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    body = list(rows)
    for column in shown:
        values = [column.value(row) for row in body]
        numeric = any(isinstance(value, int | float) for value in values)
        table.add_column(
            column.heading if whole else column.narrow or column.heading,
            justify="right" if numeric else "left",
            no_wrap=not column.folds,
            overflow="fold",
        )
    for row in body:
        # Text, not str: brackets in a label are no markup.
        table.add_row(*(Text(column.text(row, brief=not whole)) for column in shown))
    _print(console, table, whole=whole)


def describe(title: str, facts: Iterable[tuple[str, object]]) -> None:
    """Write named values below each other."""
    console = Console()
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(cell(value)))
    _print(console, table, whole=not console.is_terminal)


def _print(console: Console, table: Table, *, whole: bool) -> None:
    """Write a table with a blank line below; a pipe has no width, and cut columns cannot be read by anyone."""
    if whole:
        width = Console(width=_MOST_WIDTH, height=_HEIGHT).measure(table).maximum
        console = Console(width=max(width, _LEAST_WIDTH), height=_HEIGHT)
    console.print(table)
    console.print()

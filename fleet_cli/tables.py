"""Views of the session log as JSON for programs and as tables for people."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["cell", "describe", "plain", "print_json", "print_table"]

_PIPE_WIDTH: Final = 240  # a pipe has no width of its own, and cut columns cannot be read by anyone
_ABSENT: Final = "—"


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
            return "".join(character if character.isprintable() else "?" for character in str(value))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table; numbers are set to the right. Cells that are no text yet go through `cell`."""
    table = Table(title=title, title_justify="left", header_style="bold")
    body = [list(row) for row in rows]
    for index, column in enumerate(columns):
        numeric = any(isinstance(row[index], int | float) for row in body)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in body:
        # Text, not str: brackets in a label are no markup.
        table.add_row(*(value if isinstance(value, Text) else Text(cell(value)) for value in row))
    _console().print(table)


def describe(title: str, facts: Iterable[tuple[str, object]]) -> None:
    """Write named values below each other."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(cell(value)))
    _console().print(table)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_PIPE_WIDTH)

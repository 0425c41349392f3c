"""CSV output: what a spreadsheet opens, and takes for text what a device has named.

A cell that begins with one of `=`, `+`, `-`, `@` is a formula to spreadsheets. Names and labels come from devices: an
apostrophe is put before such a one. Numbers are left as they are.
"""

import csv
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Final, TextIO

from schemas.printable import printable_line

_FORMULA: Final = frozenset("=+-@\t\r")
_NUMBERS: Final = frozenset({int, float, bool, type(None)})


def csv_cell(value: object) -> object:
    """Return a value as it stands in a cell: in one line, and no formula."""
    kind = type(value)
    if kind in _NUMBERS:  # millions of cells are asked for
        return value
    if isinstance(value, datetime):
        return value.isoformat()
    text = value if isinstance(value, str) else str(value)
    if text[:1] in _FORMULA:
        return f"'{printable_line(text)}"
    return text if text.isprintable() else printable_line(text)


def write_csv(out: TextIO, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> int:
    """Write a heading, unless it is empty, and rows as they come; return how many rows."""
    writer = csv.writer(out, lineterminator="\n")
    if columns:
        writer.writerow(columns)
    number = 0
    for number, row in enumerate(rows, start=1):  # noqa: B007 - the last number is wanted
        writer.writerow([csv_cell(value) for value in row])
    return number

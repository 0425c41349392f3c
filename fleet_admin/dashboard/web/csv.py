"""CSV (RFC 4180) as spreadsheets may open it: no cell is a formula."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Final

from starlette.responses import Response, StreamingResponse

__all__ = ["csv_cell", "csv_response"]

_FORMULAS: Final = ("=", "+", "-", "@", "\t", "\r")
_ROWS_AT_ONCE: Final = 500


def csv_cell(value: object) -> str:
    """Return a value as a cell: times in ISO 8601, and before what a spreadsheet would compute an apostrophe."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int() | float():
            return repr(value)
        case datetime():
            return value.isoformat()
        case _:
            text = str(value)
            return f"'{text}" if text.startswith(_FORMULAS) else text


def csv_response(name: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> Response:
    """Return a file to save.

    Args:
        name: Of the file, without its ending.
        headings: The first line.
        rows: The others; taken as the client reads, on a thread.
    """
    headers = {"content-disposition": f'attachment; filename="{name}.csv"'}
    return StreamingResponse(_lines(headings, rows), media_type="text/csv; charset=utf-8", headers=headers)


def _lines(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow([csv_cell(each) for each in headings])
    for number, row in enumerate(rows, 1):
        writer.writerow([csv_cell(each) for each in row])
        if number % _ROWS_AT_ONCE == 0:
            yield buffer.getvalue()
            buffer.seek(0)
            buffer.truncate()
    yield buffer.getvalue()

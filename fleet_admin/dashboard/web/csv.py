"""CSV as a download."""

import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Final

from starlette.responses import Response, StreamingResponse

from fleet_admin.csv_output import write_csv

_ROWS_AT_ONCE: Final = 500


def csv_response(name: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> Response:
    """Return a file to save.

    Args:
        name: Of the file, without its ending.
        headings: The first line.
        rows: The others; taken as the client reads, on a thread.
    """
    headers = {"content-disposition": f'attachment; filename="{name}.csv"'}
    return StreamingResponse(_lines(headings, iter(rows)), media_type="text/csv; charset=utf-8", headers=headers)


def _lines(headings: Sequence[str], rows: Iterator[Sequence[object]]) -> Iterator[str]:
    more = True
    while more:
        buffer = io.StringIO()
        more = write_csv(buffer, headings, islice(rows, _ROWS_AT_ONCE)) == _ROWS_AT_ONCE
        headings = ()
        yield buffer.getvalue()

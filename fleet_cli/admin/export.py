"""`fleet admin export`: the session log as CSV, JSON Lines or Parquet, row by row, however many there are."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Final, TextIO

import typer

from fleet_admin.csv_output import write_csv
from fleet_cli.admin.options import DEFAULT_DB, Database, needs_extra, open_log, time_of
from fleet_cli.errors import CommandError

_PARQUET_ROWS: Final = 20_000
"""Rows of one row group: what is in memory at a time."""

_USAGE: Final = ("device", "edge", "app", "draft_model", "quantization")

Row = Sequence[Any]


class What(StrEnum):
    """What is exported."""

    SESSIONS = "sessions"
    SEGMENTS = "segments"
    ROUNDS = "rounds"
    EVENTS = "events"
    USAGE = "usage"


class Format(StrEnum):
    """In which form."""

    CSV = "csv"
    JSONL = "jsonl"
    PARQUET = "parquet"


def register(app: typer.Typer) -> None:
    app.command()(export)


def export(
    what: Annotated[What, typer.Argument(help="usage: what segments came to, by day, device, edge, app and model.")],
    form: Annotated[Format, typer.Option("--format", help="Parquet needs --to and the extra 'export'.")] = Format.CSV,
    to: Annotated[Path | None, typer.Option(help="File to write; standard output by default.")] = None,
    since: Annotated[str | None, typer.Option(help="Since: 90s, 30m, 2h, 7d ago, or an ISO 8601 time (UTC).")] = None,
    until: Annotated[str | None, typer.Option(help="Before: as --since.")] = None,
    db: Database = DEFAULT_DB,
) -> None:
    """Write all rows of a kind within a time, the earliest first."""
    if form is Format.PARQUET and to is None:
        raise CommandError("Parquet is no text: give the file to write with --to FILE.")
    after, before = time_of("--since", since), time_of("--until", until)
    with open_log(db) as log:
        if what is What.USAGE:
            columns, rows = _usage(log.usage(since=after, until=before, by=_USAGE, grain="day"))
        else:
            columns = log.export_columns(what.value)
            rows = log.export_rows(what.value, since=after, until=before)
        number = _write(form, to, columns, rows)
    if to is not None:
        typer.echo(f"{number} rows of {what.value} are in {to}.", err=True)


def _usage(found: Iterable[Any]) -> tuple[tuple[str, ...], Iterator[Row]]:
    from fleet_edge.counters import SEGMENT_COUNTERS

    counted = ("sessions", "segments", "duration_ms", *SEGMENT_COUNTERS)
    rows = (
        (
            view.start,
            *(getattr(view, name) for name in _USAGE),
            *(getattr(view.counted, name) for name in counted),
        )
        for view in found
    )
    return ("day", *_USAGE, *counted), rows


def _write(form: Format, to: Path | None, columns: Sequence[str], rows: Iterable[Row]) -> int:
    if form is Format.PARQUET:
        assert to is not None
        return _write_parquet(to, columns, rows)
    write: Callable[[TextIO, Sequence[str], Iterable[Row]], int] = write_csv if form is Format.CSV else _write_lines
    with _opened(to) as out:
        return write(out, columns, rows)


@contextmanager
def _opened(to: Path | None) -> Iterator[TextIO]:
    if to is None:
        yield sys.stdout
        return
    try:
        with to.open("w", encoding="utf-8", newline="") as out:
            yield out
    except OSError as error:
        raise CommandError(f"The file {to} cannot be written: {error.strerror}.") from error


def _write_lines(out: TextIO, columns: Sequence[str], rows: Iterable[Row]) -> int:
    number = 0
    encode = json.JSONEncoder(default=_spelled, ensure_ascii=False, separators=(",", ":")).encode
    for number, row in enumerate(rows, start=1):  # noqa: B007 - the last number is wanted
        out.write(encode(dict(zip(columns, row, strict=True))) + "\n")
    return number


def _spelled(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _write_parquet(to: Path, columns: Sequence[str], rows: Iterable[Row]) -> int:
    """Write row groups; the types are those of the columns, known by their names where a group has nothing in one."""
    with needs_extra("export"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    schema = pa.schema([(name, _arrow_type(pa, name)) for name in columns])
    rows, number = iter(rows), 0
    try:
        with pq.ParquetWriter(to, schema, compression="zstd") as writer:
            while group := list(islice(rows, _PARQUET_ROWS)):
                arrays = [
                    pa.array([_fitting(value, field) for value in values], type=field.type, from_pandas=False)
                    for values, field in zip(zip(*group, strict=True), schema, strict=True)
                ]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
                number += len(group)
    except OSError as error:
        raise CommandError(f"The file {to} cannot be written: {error}.") from error
    return number


_TEXTS: Final = frozenset(
    {
        *("session", "device", "app", "edge", "draft_model", "quantization", "target", "mode", "reason", "end_code"),
        *("end_sentence", "seed", "form", "id", "kind", "code", "sentence", "who", "severity"),
    }
)
_REALS: Final = frozenset({"temperature", "top_p"})


def _arrow_type(pa: Any, name: str) -> Any:  # noqa: ANN401 - pyarrow is not there for the type checker
    if name in _TEXTS:
        return pa.string()
    if name.endswith("_at") or name in {"at", "day"}:
        return pa.timestamp("us", tz="UTC")
    return pa.float64() if name.endswith("_ms") or name in _REALS else pa.int64()


def _fitting(value: Any, field: Any) -> Any:  # noqa: ANN401 - whatever a column holds
    """Return a value as its column takes it; a seed has 64 bits without a sign, which no integer column does."""
    if value is None:
        return None
    return str(value) if str(field.type) == "string" else value

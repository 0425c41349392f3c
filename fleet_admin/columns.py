"""Columns of reports, defined once for the command line, the dashboard and CSV."""

import csv
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import Any, Final, Generic, Literal, TextIO, TypeVar

from pydantic import BaseModel

from schemas.printable import printable_line

T = TypeVar("T")

Kind = Literal[
    "text", "sentence", "state", "id",
    "count", "figure", "ratio", "percent", "ms", "bytes", "days", "number",
    "moment", "day", "month", "ago",
]  # fmt: skip
"""How a value is shown. `number` is text that holds a number with its unit; the others are described by `shown`."""

ABSENT: Final = "—"
_NUMBERS: Final = frozenset({"count", "figure", "ratio", "percent", "ms", "bytes", "days", "number"})
_TIMES: Final = frozenset({"moment", "day", "month", "ago"})
_KILO: Final = 1000.0
_LONG_MS: Final = 10_000.0
_MINUTE_S: Final = 60
_HOUR_S: Final = 3_600
_DAY_S: Final = 86_400


@dataclass(frozen=True, slots=True)
class Column(Generic[T]):
    """A column of a report.

    Rank 0 is always shown. A narrow terminal hides columns of higher ranks first, and of one rank the rightmost; the
    dashboard shows rank 3 only on request.
    """

    heading: str  # without the unit, which is in the cell
    source: str | Callable[[T], Any]  # name of the row's attribute, or what computes the value
    kind: Kind = "text"
    key: str = ""  # in filters, in `--sort` and in CSV; by default the heading with `_` for spaces
    rank: int = 1
    meaning: str = ""
    absent: str = ""  # word for no value
    choices: Collection[str] = ()  # all values that there are
    value: Callable[[T], Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", self.heading.replace(" ", "_"))
        read = attrgetter(self.source) if isinstance(self.source, str) else self.source
        object.__setattr__(self, "value", (lambda row: read(row) or self.absent) if self.absent else read)

    @property
    def numeric(self) -> bool:
        """Numbers are aligned right."""
        return self.kind in _NUMBERS

    @property
    def timed(self) -> bool:
        return self.kind in _TIMES


def in_order(rows: Sequence[T], column: Column[T], *, falling: bool) -> list[T]:
    """Return rows sorted by a column; those without a value come last either way."""
    having = [(value, row) for row in rows if (value := column.value(row)) is not None]
    having.sort(key=lambda pair: pair[0].casefold() if isinstance(pair[0], str) else pair[0], reverse=falling)
    return [row for _, row in having] + [row for row in rows if column.value(row) is None]


def shown(value: Any, kind: Kind = "text", *, now: datetime | None = None) -> str:  # noqa: ANN401 - of all kinds
    """Return a value as people read it; None and empty text as a dash.

    `count` is a whole number, `figure` has one digit after the point, `ratio` two; `percent` takes a share
    from 0 to 1, `ms` milliseconds, `bytes` bytes and `days` days; `moment`, `day`, `month` and `ago` take aware times.
    `ago` is an age given `now`, otherwise a time.
    """
    if value is None or value in ("", ()):
        return ABSENT
    if kind == "ago":
        return ago(value, now=now)
    return _FORMS[kind](value)


def moment(value: datetime | None) -> str:
    return ABSENT if value is None else f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def ago(value: datetime | None, *, now: datetime | None) -> str:
    """Format a time's age in its largest unit."""
    if value is None:
        return ABSENT
    if now is None:
        return moment(value)
    age: timedelta = now - value
    seconds = max(age.total_seconds(), 0.0)
    for unit, length in (("d", _DAY_S), ("h", _HOUR_S), ("min", _MINUTE_S)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(value)
    return moment(value) if isinstance(value, datetime) else str(value)


def _ms(value: float) -> str:
    if value >= _LONG_MS:
        return f"{value / _KILO:,.1f} s"
    return f"{value:,.0f} ms" if value >= 10 else f"{value:,.1f} ms"  # noqa: PLR2004 - two digits do


def _bytes(value: float) -> str:
    """Format bytes with three digits or more, in the unit that needs the fewest."""
    unit = "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(value) < _KILO - 0.5:
            break
        value, unit = value / _KILO, larger
    whole = abs(value) >= 100 or (unit == "B" and float(value).is_integer())  # noqa: PLR2004
    digits = 0 if whole else 1 if abs(value) >= 10 else 2  # noqa: PLR2004
    return f"{value:,.{digits}f} {unit}"


_FORMS: Final[Mapping[str, Callable[[Any], str]]] = {
    "text": _text,
    "sentence": _text,
    "state": str,
    "id": str,
    "number": str,
    "count": lambda value: f"{value:,.0f}",
    "figure": lambda value: f"{value:,.2f}" if 0 < abs(value) < 1 else f"{value:,.1f}",
    "ratio": lambda value: f"{value:,.2f}",
    "percent": lambda value: f"{100 * value:.1f} %",
    "ms": _ms,
    "bytes": _bytes,
    "days": lambda value: f"{value:,.0f} d",
    "moment": moment,
    "day": lambda value: f"{value:%Y-%m-%d}",
    "month": lambda value: f"{value:%Y-%m}",
}


def names_of(view: type) -> tuple[str, ...]:
    """Return the names of a view's fields and properties."""
    assert is_dataclass(view)
    properties = [
        name for kind in reversed(view.__mro__) for name, each in vars(kind).items() if type(each) is property
    ]
    return tuple(dict.fromkeys([*(each.name for each in fields(view)), *properties]))


def plain(value: object) -> object:
    """Turn views, with their properties, into JSON values: times as ISO 8601 in UTC, NaN and infinities as null."""
    if is_dataclass(value):
        return {name: plain(getattr(value, name)) for name in names_of(type(value))}
    if isinstance(value, BaseModel):
        return plain(dict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return None if isinstance(value, float) and not math.isfinite(value) else value


_FORMULA: Final = frozenset("=+-@\t\r")
_PLAIN: Final = frozenset({int, float, bool, type(None)})


def csv_cell(value: object) -> object:
    """Return a value for a CSV cell: on one line, never a formula."""
    kind = type(value)
    if kind in _PLAIN:  # millions of cells are asked for
        return value
    if isinstance(value, datetime):
        return value.isoformat()
    text = value if isinstance(value, str) else _text(value)
    if text[:1] in _FORMULA:
        return f"'{printable_line(text)}"
    return text if text.isprintable() else printable_line(text)


def write_csv(out: TextIO, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> int:
    """Write the heading, unless it is empty, and the rows; return the number of rows."""
    writer = csv.writer(out, lineterminator="\n")
    if columns:
        writer.writerow(columns)
    number = 0
    for number, row in enumerate(rows, start=1):  # noqa: B007 - the last number is wanted
        writer.writerow([csv_cell(value) for value in row])
    return number

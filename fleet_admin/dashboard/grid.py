"""Reports as pages show them.

What a page shows is in its address, so that it can be bookmarked and shared:
`?filter=draft~Q4+acceptance<50&sort=-tokens&columns=device,tokens`.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Generic, TypeVar

from starlette.datastructures import QueryParams
from starlette.responses import Response

from fleet_admin.columns import Column
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.rendering import MAX_SHOWN, csv_response
from fleet_admin.report import Report, Rows
from fleet_edge.session_log import Filter

T = TypeVar("T")

_PAGE: Final = 100
_MAX_FILTER: Final = 500


@dataclass(frozen=True, slots=True)
class ReportQuery(Generic[T]):
    """A report, and the part of it that an address asks for. Raises `Problem` or `ReportError` if it is invalid."""

    report: Report[T]
    query: QueryParams
    since: datetime | None = None

    @property
    def filter(self) -> str:
        return _last(self.query, "filter")

    @property
    def example(self) -> str:
        """Return filters of columns that are always shown."""
        numbers = [column for column in self.report.columns[1:] if column.numeric]
        return " ".join([f"{self.report.columns[0].key}=…", *(f"{each.key}<50" for each in numbers[:1])])

    @property
    def sort(self) -> str:
        return _last(self.query, "sort") or self.report.order

    @property
    def page(self) -> int:
        return number_from_one(_last(self.query, "page") or "1", "page")

    @property
    def columns(self) -> Sequence[Column[T]]:
        keys = [key for text in self.query.getlist("columns") for key in text.split(",") if key]
        return self.report.chosen(keys or [each.key for each in self.report.columns if each.rank <= MAX_SHOWN])

    def filters(self) -> list[Filter]:
        try:
            return self.report.filters(shlex.split(self.filter))
        except ValueError:
            raise Problem(400, "The filter has a quotation mark without its counterpart.") from None

    def rows(self) -> Rows[T]:
        """Return the rows of the page."""
        asked = {"sort": _last(self.query, "sort"), "since": self.since}
        found = self.report.rows(self.filters(), limit=_PAGE, skip=(self.page - 1) * _PAGE, **asked)  # type: ignore[arg-type]
        return found if found.rows else self.report.rows(self.filters(), limit=_PAGE, **asked)  # type: ignore[arg-type]

    def csv(self) -> Response | None:
        """Return all rows as a CSV file if that is asked for."""
        if _last(self.query, "format") != "csv":
            return None
        lines = self.report.lines(self.columns, self.filters(), sort=_last(self.query, "sort"), since=self.since)
        return csv_response(self.report.name.partition(" ")[0], [column.key for column in self.columns], lines)


def _last(query: QueryParams, name: str) -> str:
    text = query.get(name, "").strip()
    if len(text) > _MAX_FILTER:
        raise Problem(400, f"The field {name[:40]} has more than {_MAX_FILTER} characters; shorten it.")
    return text


def number_from_one(text: str, what: str) -> int:
    """Parse a number of an address; raises `Problem` if it is none."""
    if not text.isascii() or not text.isdigit() or len(text) > 7 or not int(text) >= 1:  # noqa: PLR2004
        raise Problem(400, f"The {what} is a number from 1.")
    return int(text)

"""Reports as commands: filters, order and columns, printed as a table, as CSV or as JSON."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, TypeVar

import typer

from fleet_admin import reports
from fleet_admin.columns import write_csv
from fleet_admin.report import MAX_ROWS, Report
from fleet_cli.options import DEFAULT_DB, AsJson, Command, Database, open_log, steering_log, time_of, with_options
from fleet_cli.tables import print_json, print_table

T = TypeVar("T")

_SHOWN: Final = 50

_LISTING: Final[Mapping[str, tuple[object, object]]] = {
    "filters": (
        Annotated[
            list[str] | None,
            typer.Argument(
                metavar="[FILTER]…",
                help="Such as edge=edge-1, 'acceptance<50' (shares in percent), why~timeout (part of a text), "
                "code!=busy, app= (no value).",
            ),
        ],
        None,
    ),
    "sort": (Annotated[str, typer.Option(metavar="[-]COLUMN", help="Sort by it; with -, the highest first.")], ""),
    "columns": (
        Annotated[
            str, typer.Option(metavar="all|COLUMN,…", help="Columns to show; by default those that fit the terminal.")
        ],
        "",
    ),
    "limit": (
        Annotated[int | None, typer.Option(min=1, help=f"Maximum number of rows; by default {_SHOWN} in a table.")],
        None,
    ),
    "as_json": (AsJson, False),
    "as_csv": (Annotated[bool, typer.Option("--csv", help="Print CSV instead of tables.")], False),
}
_PERIOD: Final[Mapping[str, tuple[object, object]]] = {
    "since": (
        Annotated[str | None, typer.Option(help="Begin: 90s, 30m, 2h or 7d ago, or an ISO 8601 time (UTC).")],
        None,
    ),
    "until": (Annotated[str | None, typer.Option(help="End, in the same format as --since.")], None),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """How a report is asked for; `since` and `until` are of those that have a period."""

    filters: Sequence[str]
    sort: str
    columns: str
    limit: int | None
    as_json: bool
    as_csv: bool
    since: datetime | None = None
    until: datetime | None = None

    def show(self, report: Report[T]) -> None:
        """Print a report as a table, as CSV or as JSON."""
        chosen = report.filters(self.filters)
        columns = report.chosen(self.columns.split(",")) if self.columns else list(report.columns)
        asked = {"sort": self.sort, "since": self.since, "until": self.until}
        if self.as_csv:
            lines = report.lines(columns, chosen, limit=self.limit, **asked)  # type: ignore[arg-type]
            write_csv(sys.stdout, [column.key for column in columns], lines)
            return
        limit = self.limit or (MAX_ROWS if self.as_json else _SHOWN)
        found = report.rows(chosen, limit=limit, **asked)  # type: ignore[arg-type]
        if self.as_json:
            print_json(found.rows)
            return
        number = len(found.rows)
        rest = f" of {found.found:,} (all: --limit {found.found})" if found.found else f" (more: --limit {10 * limit})"
        print_table(
            f"{report.name.capitalize()}: {number:,}{rest if found.more else ''}",
            columns,
            found.rows,
            sort=(self.sort or report.order).removeprefix("-"),
            whole=bool(self.columns),
            all_columns="--columns all",
            empty="No row matches." if chosen else report.empty,
        )


def with_listing(*, period: bool = False) -> Callable[[Command], Command]:
    """Give a command the options of a report, as `listing`; `period`: also its begin and end."""

    def read(given: dict[str, Any]) -> AbstractContextManager[object]:
        given["filters"] = given["filters"] or ()
        for name in _PERIOD if period else ():
            given[name] = time_of(f"--{name}", given[name])
        return nullcontext(Listing(**given))

    return with_options("listing", {**_LISTING, **(_PERIOD if period else {})}, read)


_LOG: Final[Mapping[str, tuple[str, Callable[..., Report[Any]]]]] = {
    "devices": ("List the devices with state, draft model, acceptance and tokens.", reports.devices),
    "edges": ("List the edges with their load and capacity.", reports.edges),
    "versions": ("Count the releases that devices and edges run.", reports.releases),
    "quarantined": ("List the quarantined devices.", reports.quarantines),
}
_STEERING: Final[Mapping[str, tuple[str, Callable[..., Report[Any]]]]] = {
    "labels": ("List the labels and their devices.", reports.labels),
    "commands": ("List commands and their results, the latest first.", reports.commands),
    "audit": ("List what administrators have changed, the latest first.", reports.audit),
}


def _command(opened: Callable[[str], Any], report: Callable[..., Report[Any]], *, period: bool) -> Command:
    @with_listing(period=period)
    def show(listing: Listing, db: Database = DEFAULT_DB) -> None:
        with opened(db) as log:
            listing.show(report(log, datetime.now(UTC)))

    return show


def register(app: typer.Typer) -> None:
    for opened, table in ((open_log, _LOG), (steering_log, _STEERING)):
        for name, (summary, report) in table.items():
            app.command(name, help=summary)(_command(opened, report, period=name in {"commands", "audit"}))

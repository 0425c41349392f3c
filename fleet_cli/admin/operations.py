"""Commands of `fleet admin` about machines and data: releases, alerts, exports, the dashboard."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from fleet_admin import reports
from fleet_admin.columns import write_csv
from fleet_admin.dashboard.settings import DashboardSettings
from fleet_admin.report import Report
from fleet_admin.reports import ALERT_GROUPS
from fleet_cli.admin.listing import Listing, with_listing
from fleet_cli.commands import CommandError, ExitCode
from fleet_cli.options import (
    DEFAULT_DB,
    Database,
    needs_extra,
    open_log,
    profile_file,
    time_of,
    with_settings,
)
from fleet_cli.tables import Column, print_table

if TYPE_CHECKING:
    from fleet_admin.unmatched import UnmatchedMachine


@with_listing()
def alerts(
    listing: Listing,
    everything: Annotated[bool, typer.Option("--all", help="Include cleared alerts.")] = False,
    each: Annotated[bool, typer.Option("--each", help="A line for each alert instead of each condition.")] = False,
    db: Database = DEFAULT_DB,
) -> None:
    """List the open alerts by condition."""
    with open_log(db) as log:
        if outdated := log.evaluation().sentence:
            typer.secho(outdated, err=True, dim=True)
        report = reports.alerts(log, datetime.now(UTC), is_open=None if everything else True)
        if everything or each or listing.as_json or listing.as_csv or listing.filters:
            listing.show(report)
            return
        found = report.rows().rows
    from fleet_edge.session_log import grouped

    groups = grouped(found)
    title = f"Alerts: {len(found)}, conditions: {len(groups)}"
    empty = "No alert is known to be open." if outdated else "No alert is open."
    print_table(title, ALERT_GROUPS, groups, empty=empty)


@with_listing()
def unmatched(
    listing: Listing,
    identities: Annotated[
        Path, typer.Option("--identities", "--ca", envvar="FLEET_CA", help="The authority's folder.")
    ],
    db: Database = DEFAULT_DB,
) -> None:
    """List machines that only the fleet's authority or only the session log knows."""
    from fleet_admin.unmatched import find_unmatched, seen_in
    from fleet_cli.identities import open_authority

    entries = open_authority(identities, None).entries()
    with open_log(db) as log:
        found = find_unmatched(entries, seen_in(log), now=datetime.now(UTC))
    columns: list[Column[UnmatchedMachine]] = [
        Column("name", "name", rank=0),
        Column("role", "role.value", rank=1),
        Column("kind", "kind", "state", rank=0),
        Column("what", "sentence", "sentence", rank=0),
    ]
    empty = "None: every enrolled machine was seen, and every seen machine is enrolled."
    listing.show(Report("machines that only one side knows", columns, lambda **_: found, "", empty=empty))


class ExportKind(StrEnum):
    SESSIONS = "sessions"
    SEGMENTS = "segments"
    ROUNDS = "rounds"
    EVENTS = "events"


def export(
    what: Annotated[
        ExportKind,
        typer.Argument(help="What to export; for sums see `fleet admin usage --csv`."),
    ],
    to: Annotated[Path | None, typer.Option(help="File to write; standard output by default.")] = None,
    since: Annotated[str | None, typer.Option(help="Begin: 90s, 30m, 2h or 7d ago, or an ISO 8601 time (UTC).")] = None,
    until: Annotated[str | None, typer.Option(help="End, in the same format as --since.")] = None,
    db: Database = DEFAULT_DB,
) -> None:
    """Write all rows of a kind within a period as CSV, earliest first."""
    after, before = time_of("--since", since), time_of("--until", until)
    with open_log(db) as log, _opened(to) as out:
        rows = log.export_rows(what.value, since=after, until=before)
        number = write_csv(out, log.export_columns(what.value), rows)
    if to is not None:
        typer.echo(f"{number} rows of {what.value} are in {to}.", err=True)


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


@with_settings(DashboardSettings, file=profile_file, variables={"db": "FLEET_DB"})
def serve(settings: DashboardSettings) -> None:
    """Serve the dashboard until interrupted."""
    with needs_extra("dashboard"):
        from fleet_admin.dashboard.app import DashboardServer
        from fleet_admin.dashboard.services import open_services

    # Like Ctrl-C, which finishes the running responses.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ExitCode.DONE))
    from fleet_edge.session_log import RunningAlerts, load_alert_settings, open_existing, transaction

    alert_settings = load_alert_settings(settings.alerts)
    services = open_services(settings)
    server = DashboardServer(settings, services=services)
    engine = open_existing(settings.db, read_only=False)
    alerts = RunningAlerts(lambda: transaction(engine), alert_settings)
    try:
        print(f"The dashboard is at {server.address}", file=sys.stderr, flush=True)
        if not services.accounts.list():
            print("Nobody can log in yet: fleet admin user add NAME --role operator", file=sys.stderr, flush=True)
        alerts.start()
        server.wait()
    finally:
        alerts.close()
        server.stop()


def mcp(db: Database = DEFAULT_DB) -> None:
    """Answer an assistant's questions about the session log, over standard input and output (MCP); reads only."""
    with needs_extra("admin"):
        from fleet_admin.assistant import assistant_server
    open_log(db).close()  # says at once what is wrong with it
    assistant_server(db).run("stdio")


def register(app: typer.Typer) -> None:
    for command in (alerts, unmatched, export, serve, mcp):
        app.command()(command)

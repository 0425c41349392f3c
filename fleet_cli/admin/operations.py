"""Commands of `fleet admin` about machines and data: releases, alerts, exports, the dashboard."""

import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TextIO

import typer

from fleet_admin.columns import write_csv
from fleet_admin.dashboard.settings import DashboardSettings
from fleet_admin.reports import ALERT_GROUPS, ALERTS, edge_columns
from fleet_cli.errors import CommandError, ExitCode
from fleet_cli.options import (
    DEFAULT_DB,
    AsJson,
    Database,
    Wide,
    needs_extra,
    open_log,
    profile_file,
    time_of,
    with_settings,
)
from fleet_cli.tables import Column, print_table

if TYPE_CHECKING:
    from fleet_admin.unmatched import UnmatchedMachine


@dataclass(frozen=True, slots=True)
class _Release:
    software: str | None
    edges: int
    devices: int
    online: int
    offline: int


def edges(db: Database = DEFAULT_DB, as_json: AsJson = False, wide: Wide = False) -> None:
    """List the edges with their load and capacity."""
    with open_log(db) as log:
        found = log.edges()
    empty = "No edge has written to this database: start one with `fleet edge run`."
    print_table(f"Edges: {len(found)}", edge_columns(datetime.now(UTC)), found, as_json=as_json, wide=wide, empty=empty)


def versions(db: Database = DEFAULT_DB, as_json: AsJson = False, wide: Wide = False) -> None:
    """Count the releases that devices and edges run."""
    with open_log(db) as log:
        devices, at_edges = log.devices(counted=False), log.edges()
    serving = Counter(edge.software for edge in at_edges)
    every = Counter(device.software for device in devices)
    online, offline = (
        Counter(device.software for device in devices if device.state.value == state) for state in ("online", "offline")
    )
    names = sorted({*every, *serving}, key=lambda name: (-every[name], name or ""))
    found = [_Release(name, serving[name], every[name], online[name], offline[name]) for name in names]
    columns: list[Column[_Release]] = [
        Column("software", lambda row: row.software),
        Column("edges", lambda row: row.edges, "count"),
        Column("devices", lambda row: row.devices, "count"),
        Column("of these online", lambda row: row.online, "count"),
        Column("offline", lambda row: row.offline, "count"),
    ]
    empty = "No edge and no device has been seen."
    print_table(f"Releases: {len(found)}", columns, found, as_json=as_json, wide=wide, empty=empty)


_MOST: Final = 10_000  # as many as can be open


def alerts(
    everything: Annotated[bool, typer.Option("--all", help="Include cleared alerts, latest first.")] = False,
    each: Annotated[bool, typer.Option("--each", help="A line for each alert instead of each condition.")] = False,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """List the open alerts by condition."""
    with needs_extra("admin"):
        from fleet_edge.alerts.alerts import Alerts
    with Alerts(db, read_only=True) as book:
        found = book.list(open=None if everything else True, limit=_MOST)
        if outdated := book.evaluation().sentence:
            typer.secho(outdated, err=True, dim=True)
    if everything or each or as_json:
        empty = "There are no alerts." if everything else "No alert is open."
        print_table(f"Alerts: {len(found)}", ALERTS, found, as_json=as_json, wide=wide, empty=empty)
        return
    from fleet_edge.alerts.rules import grouped

    groups = grouped(found)
    title = f"Alerts: {len(found)}, conditions: {len(groups)}"
    empty = "No alert is known to be open." if outdated else "No alert is open."
    print_table(title, ALERT_GROUPS, groups, wide=wide, empty=empty)


def unmatched(
    identities: Annotated[
        Path, typer.Option("--identities", "--ca", envvar="FLEET_CA", help="The authority's folder.")
    ],
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """List machines that only the fleet's authority or only the session log knows."""
    from fleet_admin.unmatched import find_unmatched, seen_in
    from fleet_cli.identities import open_authority

    entries = open_authority(identities, None).entries()
    with open_log(db) as log:
        found = find_unmatched(entries, seen_in(log), now=datetime.now(UTC))
    columns: list[Column[UnmatchedMachine]] = [
        Column("name", lambda row: row.name, rank=0),
        Column("role", lambda row: row.role.value, rank=1),
        Column("kind", lambda row: row.kind, "state", rank=0),
        Column("what", lambda row: row.sentence, "sentence", rank=0),
    ]
    empty = "None: every enrolled machine was seen, and every seen machine is enrolled."
    title = f"Machines that only one side knows: {len(found)}"
    print_table(title, columns, found, as_json=as_json, wide=wide, empty=empty)


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
    from fleet_edge.alerts.evaluator import RunningAlerts
    from fleet_edge.alerts.settings import load_alert_settings

    alert_settings = load_alert_settings(settings.alerts)
    services = open_services(settings)
    server = DashboardServer(settings, services=services)
    alerts = RunningAlerts(services.alerts.connection, alert_settings)
    try:
        print(f"The dashboard is at {server.address}", file=sys.stderr, flush=True)
        if not services.accounts.list():
            print("Nobody can log in yet: fleet admin user add NAME --role operator", file=sys.stderr, flush=True)
        alerts.start()
        server.wait()
    finally:
        alerts.close()
        server.stop()


def register(app: typer.Typer) -> None:
    for command in (edges, versions, alerts, unmatched, export, serve):
        app.command()(command)

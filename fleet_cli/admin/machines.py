"""`fleet admin edges|versions`: what the edges do and what they have room for; which releases are out there."""

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime

import typer

from fleet_admin.reports import edge_columns
from fleet_cli.admin.options import DEFAULT_DB, AsJson, Database, Wide, open_log
from fleet_cli.tables import Column, print_json, print_table


@dataclass(frozen=True, slots=True)
class _Release:
    """Who runs a release."""

    software: str | None
    edges: int
    devices: int
    online: int
    silent: int


def register(app: typer.Typer) -> None:
    for command in (edges, versions):
        app.command()(command)


def edges(db: Database = DEFAULT_DB, as_json: AsJson = False, wide: Wide = False) -> None:
    """List the edges, with what they do and what they have room for."""
    with open_log(db) as log:
        found = log.edges()
    if as_json:
        print_json(found)
        return
    empty = "No edge has written to this database: start one with `fleet edge run`."
    print_table(f"Edges: {len(found)}", edge_columns(datetime.now(UTC)), found, wide=wide, empty=empty)


def versions(db: Database = DEFAULT_DB, as_json: AsJson = False, wide: Wide = False) -> None:
    """Count which releases devices and edges run."""
    with open_log(db) as log:
        devices, at_edges = log.devices(counted=False), log.edges()
    every, online, silent = Counter[str | None](), Counter[str | None](), Counter[str | None]()
    for device in devices:
        every[device.software] += 1
        online[device.software] += device.state.value == "online"
        silent[device.software] += device.state.value == "silent"
    serving = Counter(edge.software for edge in at_edges)
    names = sorted({*every, *serving}, key=lambda name: (-every[name], name or ""))
    found = [_Release(name, serving[name], every[name], online[name], silent[name]) for name in names]
    if as_json:
        print_json(found)
        return
    columns: list[Column[_Release]] = [
        Column("software", lambda row: row.software),
        Column("edges", lambda row: row.edges, "count"),
        Column("devices", lambda row: row.devices, "count"),
        Column("of these online", lambda row: row.online, "count"),
        Column("silent", lambda row: row.silent, "count"),
    ]
    empty = "No edge and no device has been seen."
    print_table(f"Releases: {len(found)}", columns, found, wide=wide, empty=empty)

"""`fleet admin edges|versions`: what the edges do and what they have room for; which releases are out there."""

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import typer

from fleet_cli.admin.options import DEFAULT_DB, AsJson, Database, Wide, open_log
from fleet_cli.tables import Column, print_json, print_table

if TYPE_CHECKING:
    from fleet_edge.store.views import EdgeView

__all__ = ["register"]

_FRESH_S: Final = 60.0
"""An edge tells its load every ten seconds; one that has not for so long does not run, or has lost the database."""


@dataclass(frozen=True, slots=True)
class _Release:
    """Who runs a release."""

    software: str | None
    edges: int
    devices: int
    online: int
    silent: int


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (edges, versions):
        app.command()(command)


def edges(db: Database = DEFAULT_DB, as_json: AsJson = False, wide: Wide = False) -> None:
    """List the edges, with what they do and what they have room for."""
    with open_log(db) as log:
        found = log.edges()
    if as_json:
        print_json(found)
        return
    now = datetime.now(UTC)
    columns: list[Column[EdgeView]] = [
        Column("edge", lambda view: view.edge, folds=True),
        Column("presence", lambda view: _presence(view, now)),
        Column("since (UTC)", lambda view: view.presence_since, wide=True),
        Column("software", lambda view: view.software, wide=True),
        Column("target model", lambda view: view.target, folds=True, wide=True),
        Column("sessions", lambda view: view.open_sessions),
        Column("room for", lambda view: view.free_sessions, narrow="room\nfor"),
        Column("tokens/s", lambda view: view.tokens_per_s, narrow="tokens\n/s"),
        Column("mean batch", lambda view: view.batch_sessions, narrow="mean\nbatch"),
        Column("step ms", lambda view: view.step_ms, narrow="step\nms"),
        Column("queue ms", lambda view: view.queue_ms, narrow="queue\nms"),
        Column("K/V use %", lambda view: None if view.kv_usage is None else 100 * view.kv_usage, narrow="K/V\n%"),
        Column("spooled records", lambda view: view.spooled_records, narrow="spool"),
        Column("load at (UTC)", lambda view: view.load_at, wide=True),
        Column("certificate until (UTC)", lambda view: view.certificate_until, wide=True),
    ]
    print_table(f"Edges: {len(found)}", columns, found, wide=wide)


def versions(db: Database = DEFAULT_DB, as_json: AsJson = False, wide: Wide = False) -> None:
    """Count which releases devices and edges run."""
    with open_log(db) as log:
        devices, at_edges = log.devices(counted=False), log.edges()
    every, online, silent = Counter[str | None](), Counter[str | None](), Counter[str | None]()
    for device in devices:
        every[device.software] += 1
        online[device.software] += device.presence == "online" and device.silent_since is None
        silent[device.software] += device.silent_since is not None
    serving = Counter(edge.software for edge in at_edges)
    names = sorted({*every, *serving}, key=lambda name: (-every[name], name or ""))
    found = [_Release(name, serving[name], every[name], online[name], silent[name]) for name in names]
    if as_json:
        print_json(found)
        return
    columns: list[Column[_Release]] = [
        Column("software", lambda row: row.software),
        Column("edges", lambda row: row.edges),
        Column("devices", lambda row: row.devices),
        Column("of these online", lambda row: row.online),
        Column("silent", lambda row: row.silent),
    ]
    print_table(f"Releases: {len(found)}", columns, found, wide=wide)


def _presence(view: "EdgeView", now: datetime) -> str | None:
    told = view.load_at
    if view.presence == "online" and told is not None and (now - told).total_seconds() > _FRESH_S:
        return "silent"
    return view.presence

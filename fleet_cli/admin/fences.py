"""`fleet admin fence|unfence|fenced`: shut a device out, and let it in again."""

from typing import TYPE_CHECKING, Annotated

import typer

from fleet_cli.admin.actor import Acting, actor_of
from fleet_cli.admin.options import DEFAULT_DB, AsJson, Database, Wide, open_log
from fleet_cli.tables import Column, cell, print_json, print_table

if TYPE_CHECKING:
    from fleet_edge.store.views import FenceView


def register(app: typer.Typer) -> None:
    for command in (fence, unfence, fenced):
        app.command()(command)


def fence(
    name: Annotated[str, typer.Argument(metavar="DEVICE")],
    duration: Annotated[
        str | None, typer.Option("--for", help="For so long: 90s, 30m, 2h, 7d; otherwise until it is lifted.")
    ] = None,
    reason: Annotated[str, typer.Option(help="A sentence for whoever wonders.")] = "",
    acting: Acting = None,
    db: Database = DEFAULT_DB,
) -> None:
    """Shut a device out: within seconds the edges drop what it sends."""
    actor = actor_of(acting)
    with open_log(db) as log:
        from fleet_edge.store.errors import NotFound

        held = log.fence(name, duration=duration, reason=reason, who=actor.who, source=actor.source)
        try:
            log.device(name)
        except NotFound:
            typer.echo(f"fleet: No device {name} has been seen yet; it is fenced all the same.", err=True)
    until = "until it is lifted" if held.until_at is None else f"until {cell(held.until_at)} UTC"
    typer.echo(f"{name} is fenced {until}; fleet admin unfence {name} lets it in again.")


def unfence(
    name: Annotated[str, typer.Argument(metavar="DEVICE")], acting: Acting = None, db: Database = DEFAULT_DB
) -> None:
    """Let a device in again, whoever has fenced it."""
    actor = actor_of(acting)
    with open_log(db) as log:
        held = log.unfence(name, who=actor.who, source=actor.source)
    if held is None:
        typer.echo(f"{name} was not fenced, as far as the log knows; any fence up to now is lifted.")
    else:
        typer.echo(f"{name} was fenced by {cell(held.by)} and is let in again: {cell(held.reason)}")


def fenced(db: Database = DEFAULT_DB, as_json: AsJson = False, wide: Wide = False) -> None:
    """List the devices that are fenced now."""
    with open_log(db) as log:
        found = log.fences()
    if as_json:
        print_json(found)
    else:
        columns: list[Column[FenceView]] = [
            Column("device", lambda row: row.device, rank=0),
            Column("since", lambda row: row.since_at, "moment", rank=1),
            Column("until", lambda row: row.until_at or "lifted", rank=0),
            Column("by", lambda row: row.by, rank=1),
            Column("reason", lambda row: row.reason, "sentence", rank=0),
            Column("strikes", lambda row: row.strikes, "count", rank=2),
            Column("doubled", lambda row: row.level, "count", rank=2),
        ]
        print_table(f"Fenced devices: {len(found)}", columns, found, wide=wide, empty="No device is fenced.")

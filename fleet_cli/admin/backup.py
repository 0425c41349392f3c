"""`fleet admin backup|restore|compact`: copies of a session log, their way back, and a smaller file."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer

from fleet_cli.admin.options import DEFAULT_DB, Database

_MB: Final = 1e6


def register(app: typer.Typer) -> None:
    for command in (backup, restore, compact):
        app.command()(command)


def backup(
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="A file that is not there yet.")],
    db: Database = DEFAULT_DB,
) -> None:
    """Copy the session log into one file, while edges write to it. For SQLite; names the tool for PostgreSQL."""
    from fleet_edge.store.backup import back_up

    def show(done: int, pages: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done / max(pages, 1):.0%}", end="", file=sys.stderr, flush=True)

    size = back_up(db, to, progress=show)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    typer.echo(f"{to}: {size / _MB:.1f} MB, checked. fleet admin restore {to} brings it back.")


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What 'fleet admin backup' has made.")],
    replace: Annotated[bool, typer.Option("--replace", help="Put the database that is there aside.")] = False,
    db: Database = DEFAULT_DB,
) -> None:
    """Put a backup in the place of the session log, while no edge and no dashboard has it open."""
    from fleet_edge.store.backup import restore as put_back

    aside = put_back(file, db, replace=replace, now=datetime.now(UTC))
    kept = f" What was there is {aside}." if aside else ""
    typer.echo(f"The backup is in its place; an edge brings it up to date when it starts.{kept}")


def compact(db: Database = DEFAULT_DB) -> None:
    """Make the file of a session log smaller. Edges wait meanwhile."""
    from fleet_edge.store.backup import compact as make_smaller

    before, after = make_smaller(db)
    typer.echo(f"{before / _MB:.1f} MB before, {after / _MB:.1f} MB after.")

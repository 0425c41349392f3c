"""`fleet admin ghosts`: machines that are enrolled and were never seen, or were seen and are not enrolled."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fleet_cli.admin.options import DEFAULT_DB, AsJson, Database, Wide, open_log
from fleet_cli.tables import Column, print_json, print_table

if TYPE_CHECKING:
    from fleet_admin.ghosts import Ghost


def register(app: typer.Typer) -> None:
    app.command()(ghosts)


def ghosts(
    identities: Annotated[
        Path, typer.Option("--identities", "--ca", envvar="FLEET_CA", help="The authority's folder.")
    ],
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """List machines that the fleet's authority knows and the log does not, and the other way round."""
    from fleet_admin.ghosts import find_ghosts, sighted_in
    from fleet_cli.broker.identity_options import open_authority

    entries = open_authority(identities, None).entries()
    with open_log(db) as log:
        found = find_ghosts(entries, sighted_in(log), now=datetime.now(UTC))
    if as_json:
        print_json(found)
        return
    columns: list[Column[Ghost]] = [
        Column("name", lambda row: row.name, rank=0),
        Column("role", lambda row: row.role.value, rank=1),
        Column("kind", lambda row: row.kind.value, "state", rank=0),
        Column("enrolled", lambda row: row.enrolled_at, "moment", rank=2),
        Column("seen", lambda row: row.seen_at, "moment", rank=2),
        Column("what", lambda row: row.sentence, "sentence", rank=0),
    ]
    empty = "There are none: every machine that is enrolled was seen, and every one that was seen is enrolled."
    print_table(f"Ghosts: {len(found)}", columns, found, wide=wide, empty=empty)

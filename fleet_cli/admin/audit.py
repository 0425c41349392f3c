"""`fleet admin label|labels|retire|audit`: words for devices, devices out of service, and who did what."""

from typing import Annotated

import typer

from fleet_admin.reports import AUDIT
from fleet_admin.settings import AdminSettings
from fleet_cli.admin.actor import Acting, actor_of, monitor, steering_log
from fleet_cli.admin.options import DEFAULT_DB, AsJson, Database, Wide
from fleet_cli.settings_flags import with_settings
from fleet_cli.tables import Column, cell, print_json, print_table


def register(app: typer.Typer) -> None:
    for command in (label, labels, audit):
        app.command()(command)
    app.command("retire")(retire_command)


def label(
    devices: Annotated[list[str], typer.Argument(metavar="DEVICE…")],
    add: Annotated[list[str] | None, typer.Option("--add", help="Label to give; may be given several times.")] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", help="Label to take off; likewise.")] = None,
    acting: Acting = None,
    db: Database = DEFAULT_DB,
) -> None:
    """Give devices labels, or take them off: `fleet admin label gateway-7 gateway-8 --add hall_a`."""
    with steering_log(db) as log:
        found = log.label(devices, add=add or (), remove=remove or (), actor=actor_of(acting))
        unseen = sorted(set(devices) - {name for name, each in log.known().items() if each.presence is not None})
    for name in unseen:
        typer.echo(f"fleet: No device {name} has been seen yet; it is labelled all the same.", err=True)
    for device, words in found.items():
        typer.echo(f"{device}: {' '.join(words) or 'no label'}")


def labels(
    only: Annotated[list[str] | None, typer.Option("--label", help="Devices with this label alone.")] = None,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """List the labels, and the devices that have them."""
    with steering_log(db) as log:
        found: dict[str, list[str]] = {}
        for device, words in log.labels().items():
            for word in words:
                found.setdefault(word, []).append(device)
    rows = [(word, found[word]) for word in sorted(found) if not only or word in only]
    if as_json:
        print_json(dict(rows))
        return
    columns: list[Column[tuple[str, list[str]]]] = [
        Column("label", lambda row: row[0], rank=0),
        Column("number", lambda row: len(row[1]), "count", rank=0),
        Column("devices", lambda row: ", ".join(row[1]), "sentence", rank=0),
    ]
    empty = "No device has a label: fleet admin label DEVICE --add WORD gives one."
    print_table(f"Labels: {len(rows)}", columns, rows, wide=wide, empty=empty)


@with_settings(AdminSettings)
def retire_command(
    device: Annotated[str, typer.Argument(metavar="DEVICE")],
    *,
    settings: AdminSettings,
    undo: Annotated[bool, typer.Option("--undo", help="Put it back into service.")] = False,
    log_only: Annotated[
        bool,
        typer.Option("--log-only", help="Do not tell the broker, which then keeps what was wanted of the device."),
    ] = False,
    acting: Acting = None,
    db: Database = DEFAULT_DB,
) -> None:
    """Take a device out of service: it is chosen only by its name from now on. Its records stay."""
    actor = actor_of(acting)
    if log_only or undo:
        with steering_log(db) as log:
            log.retire(device, undo=undo, actor=actor)
    else:
        with monitor(settings, db) as steering:
            steering.retire(device, actor=actor)
    if undo:
        typer.echo(f"{cell(device)} is in service again.")
    else:
        typer.echo(f"{cell(device)} is retired. Its certificate is still good: `fleet broker revoke` ends that.")


def audit(
    since: Annotated[str | None, typer.Option(help="Since: 90s, 30m, 2h, 7d ago, or an ISO 8601 time (UTC).")] = None,
    until: Annotated[str | None, typer.Option(help="Before: as --since.")] = None,
    who: Annotated[str | None, typer.Option(help="By this user or account.")] = None,
    subject: Annotated[str | None, typer.Option(help="Concerning this device.")] = None,
    action: Annotated[str | None, typer.Option(help="This action: set, fence, label, command reload.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many, the latest first.")] = 50,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """List what administrators have changed: who, when, what, whom, and what came of it."""
    with steering_log(db) as log:
        found = log.audit(since=since, until=until, who=who, subject=subject, action=action, limit=limit)
    if as_json:
        print_json(found)
        return
    print_table(f"Actions: {len(found)}", AUDIT, found, sort="at", wide=wide, empty="No action is like that.")

"""`fleet admin`: reads the session log, and fences devices. Looking at a database does not create one."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fleet_cli import reports
from fleet_cli.errors import CommandError
from fleet_cli.tables import cell, print_json
from fleet_runtime.times import read_time
from schemas.policy import Mode
from schemas.reasons import EndReason

if TYPE_CHECKING:
    from fleet_edge.session_log import SessionLog

__all__ = ["app"]

app = typer.Typer(
    name="admin", help="Read the session log: devices, sessions, rounds, totals; fence devices.", no_args_is_help=True
)

_EVENTS: Final = 20
_HOURS: Final = 24

Database = Annotated[
    str, typer.Option("--db", envvar="FLEET_DB", help="sqlite:///PATH or postgresql://USER@HOST/NAME.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON rather than tables.")]
Wide = Annotated[bool, typer.Option("--wide", help="All columns, however wide the terminal is.")]
Since = Annotated[str | None, typer.Option(help="Opened since: 90s, 30m, 2h, 7d ago, or an ISO 8601 time (UTC).")]
_DEFAULT_DB = "sqlite:///fleet.sqlite3"


@app.command()
def devices(db: Database = _DEFAULT_DB, as_json: AsJson = False, wide: Wide = False) -> None:
    """List the devices."""
    with _log(db) as log:
        found = log.devices()
    if as_json:
        print_json(found)
    else:
        reports.show_devices(found, wide=wide)


@app.command()
def device(
    name: Annotated[str, typer.Argument(metavar="ID")],
    db: Database = _DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Show one device, its latest hours, sessions and events."""
    with _log(db) as log:
        found = log.device(name)
        hours = log.hours(name, limit=_HOURS)
        latest = log.sessions(device=name, limit=10)
        events = log.events(device=name, limit=_EVENTS)
    if as_json:
        print_json({"device": found, "hours": hours, "sessions": latest, "events": events})
    else:
        reports.show_device(found, hours=hours, sessions=latest, events=events, wide=wide)


@app.command()
def sessions(
    device: Annotated[list[str] | None, typer.Option(help="Of this device; may be given several times.")] = None,
    edge: Annotated[str | None, typer.Option(help="Served by this edge.")] = None,
    reason: Annotated[EndReason | None, typer.Option(help="Ended so.")] = None,
    mode: Annotated[Mode | None, typer.Option(help="Verified so.")] = None,
    since: Since = None,
    until: Annotated[str | None, typer.Option(help="Opened before: as --since.")] = None,
    only_open: Annotated[bool, typer.Option("--open", help="Those that have not ended.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many, the latest first.")] = 50,
    db: Database = _DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """List sessions, the latest first."""
    after, before = _time("--since", since), _time("--until", until)
    with _log(db) as log:
        found = log.sessions(
            since=after,
            until=before,
            device=device,
            edge=edge,
            reason=reason,
            mode=mode,
            open=only_open,
            limit=limit,
        )
    more = f" (perhaps more: --limit {limit})" if len(found) == limit else ""
    if as_json:
        print_json(found)
    else:
        reports.show_sessions(f"Sessions: {len(found)}{more}", found, wide=wide)


@app.command()
def session(
    prefix: Annotated[str, typer.Argument(metavar="ID", help="The session's id, or enough of its beginning.")],
    rounds: Annotated[bool, typer.Option("--rounds", help="Also every round, if the session was traced.")] = False,
    device: Annotated[str | None, typer.Option(help="Whose it is, if two devices have named one alike.")] = None,
    db: Database = _DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Show one session: what the edge counted beside what the device counted."""
    with _log(db) as log:
        found = log.session(prefix, device=device)
        segments = log.segments(found.session, device=found.device)
        traced = log.rounds(found.session, device=found.device) if rounds else []
        events = log.events(session=found.session, device=found.device, limit=_EVENTS)
    if as_json:
        print_json({"session": found, "segments": segments, "events": events, **({"rounds": traced} if rounds else {})})
        return
    reports.show_session(found, segments=segments, wide=wide)
    if rounds:
        reports.show_rounds(traced, wide=wide)
    reports.show_events(events, wide=wide)


@app.command()
def stats(
    since: Since = None,
    by: Annotated[str | None, typer.Option(metavar="device|draft|edge|app", help="Add up separately.")] = None,
    db: Database = _DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Add up what the edges counted."""
    after = _time("--since", since)
    if by not in {None, "device", "draft", "edge"}:
        raise CommandError(f"--by takes device, draft or edge, not {cell(by)!r}.")
    with _log(db) as log:
        found = log.stats(since=after, by=by)
    if as_json:
        print_json(found)
    else:
        reports.show_stats(
            "Totals" if after is None else f"Totals since {cell(after)} UTC", by=by, found=found, wide=wide
        )


@app.command()
def fence(
    name: Annotated[str, typer.Argument(metavar="DEVICE")],
    duration: Annotated[
        str | None, typer.Option("--for", help="For so long: 90s, 30m, 2h, 7d; otherwise until it is lifted.")
    ] = None,
    reason: Annotated[str, typer.Option(help="A sentence for whoever wonders.")] = "",
    db: Database = _DEFAULT_DB,
) -> None:
    """Shut a device out: within seconds the edges drop what it sends."""
    with _log(db) as log:
        from fleet_edge.store.errors import NotFound

        held = log.fence(name, duration=duration, reason=reason)
        try:
            log.device(name)
        except NotFound:
            typer.echo(f"fleet: No device {name} has been seen yet; it is fenced all the same.", err=True)
    until = "until it is lifted" if held.until_at is None else f"until {cell(held.until_at)} UTC"
    typer.echo(f"{name} is fenced {until}; fleet admin unfence {name} lets it in again.")


@app.command()
def unfence(name: Annotated[str, typer.Argument(metavar="DEVICE")], db: Database = _DEFAULT_DB) -> None:
    """Let a device in again, whoever has fenced it."""
    with _log(db) as log:
        held = log.unfence(name)
    if held is None:
        typer.echo(f"{name} was not fenced, as far as the log knows; any fence up to now is lifted.")
    else:
        typer.echo(f"{name} was fenced by {cell(held.by)} and is let in again: {cell(held.reason)}")


@app.command()
def fenced(db: Database = _DEFAULT_DB, as_json: AsJson = False, wide: Wide = False) -> None:
    """List the devices that are fenced now."""
    with _log(db) as log:
        found = log.fences()
    if as_json:
        print_json(found)
    else:
        reports.show_fences(found, wide=wide)


def _time(option: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        return read_time(text, now=datetime.now(UTC))
    except ValueError as error:
        raise CommandError(f"{option}: {error}") from error


def _log(url: str) -> "SessionLog":
    """Open the database; all that goes wrong with it becomes one sentence, which `fleet` prints."""
    try:
        from fleet_edge.session_log import SessionLog
    except ModuleNotFoundError as error:
        raise CommandError(
            f"The package {error.name!r} is missing; install this one with the extra 'admin'."
        ) from error
    return SessionLog(url)

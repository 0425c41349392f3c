"""`fleet admin devices|device|sessions|session|stats`: read the session log. Looking at a database creates none."""

from typing import Annotated, Final

import typer

from fleet_cli import reports
from fleet_cli.admin.options import DEFAULT_DB, AsJson, Database, Since, Wide, open_log, time_of
from fleet_cli.errors import CommandError
from fleet_cli.tables import cell, print_json
from schemas.policy import Mode
from schemas.reasons import EndReason

__all__ = ["register"]

_EVENTS: Final = 20
_HOURS: Final = 24
_GROUPINGS: Final = ("device", "draft", "edge", "app", "hour", "day", "month")  # of `totals`, which loads SQLAlchemy


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (devices, device, sessions, session, stats):
        app.command()(command)


def devices(db: Database = DEFAULT_DB, as_json: AsJson = False, wide: Wide = False) -> None:
    """List the devices."""
    with open_log(db) as log:
        found = log.devices()
    if as_json:
        print_json(found)
    else:
        reports.show_devices(found, wide=wide)


def device(
    name: Annotated[str, typer.Argument(metavar="ID")],
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Show one device, its latest hours, sessions and events."""
    with open_log(db) as log:
        found = log.device(name)
        hours = log.hours(name, limit=_HOURS)
        latest = log.sessions(device=name, limit=10)
        events = log.events(device=name, limit=_EVENTS)
    if as_json:
        print_json({"device": found, "hours": hours, "sessions": latest, "events": events})
    else:
        reports.show_device(found, hours=hours, sessions=latest, events=events, wide=wide)


def sessions(
    device: Annotated[list[str] | None, typer.Option(help="Of this device; may be given several times.")] = None,
    edge: Annotated[str | None, typer.Option(help="Served by this edge.")] = None,
    reason: Annotated[EndReason | None, typer.Option(help="Ended so.")] = None,
    mode: Annotated[Mode | None, typer.Option(help="Verified so.")] = None,
    since: Since = None,
    until: Annotated[str | None, typer.Option(help="Opened before: as --since.")] = None,
    only_open: Annotated[bool, typer.Option("--open", help="Those that have not ended.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many, the latest first.")] = 50,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """List sessions, the latest first."""
    after, before = time_of("--since", since), time_of("--until", until)
    with open_log(db) as log:
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


def session(
    prefix: Annotated[str, typer.Argument(metavar="ID", help="The session's id, or enough of its beginning.")],
    rounds: Annotated[bool, typer.Option("--rounds", help="Also every round, if the session was traced.")] = False,
    text: Annotated[bool, typer.Option("--text", help="Also what it has written, if an edge has stored that.")] = False,
    device: Annotated[str | None, typer.Option(help="Whose it is, if two devices have named one alike.")] = None,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Show one session: what the edge counted beside what the device counted."""
    with open_log(db) as log:
        found = log.session(prefix, device=device)
        segments = log.segments(found.session, device=found.device)
        traced = log.rounds(found.session, device=found.device) if rounds else []
        stored = log.text(found.session, device=found.device) if text else None
        events = log.events(session=found.session, device=found.device, limit=_EVENTS)
    if as_json:
        asked = {**({"rounds": traced} if rounds else {}), **({"text": stored} if text else {})}
        print_json({"session": found, "segments": segments, "events": events, **asked})
        return
    reports.show_session(found, segments=segments, wide=wide)
    if rounds:
        reports.show_rounds(traced, wide=wide)
    if text:
        from fleet_cli.admin.texts import show_text

        show_text(stored)
    reports.show_events(events, wide=wide)


def stats(
    since: Since = None,
    until: Annotated[str | None, typer.Option(help="Opened before: as --since.")] = None,
    by: Annotated[
        str | None, typer.Option(metavar="device|draft|edge|app|hour|day|month", help="Add up separately.")
    ] = None,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Add up what the edges counted."""
    after, before = time_of("--since", since), time_of("--until", until)
    if by not in {None, *_GROUPINGS}:
        raise CommandError(f"--by takes {', '.join(_GROUPINGS[:-1])} or {_GROUPINGS[-1]}, not {cell(by)!r}.")
    with open_log(db) as log:
        found = log.stats(since=after, until=before, by=by)
    if as_json:
        print_json(found)
    else:
        reports.show_stats(
            "Totals" if after is None else f"Totals since {cell(after)} UTC", by=by, found=found, wide=wide
        )

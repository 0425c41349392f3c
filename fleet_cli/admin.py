"""`fleet admin`: reads the session log. It never writes, and looking at a database does not create one."""

import re
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fleet_cli import reports
from fleet_cli.errors import CommandError
from fleet_cli.tables import cell, print_json
from schemas.policy import Mode
from schemas.reasons import EndReason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection

__all__ = ["app", "parse_time"]

app = typer.Typer(name="admin", help="Read the session log: devices, sessions, rounds, totals.", no_args_is_help=True)

_EVENTS: Final = 20
_HOURS: Final = 24
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Database = Annotated[
    str, typer.Option("--db", envvar="FLEET_DB", help="sqlite:///PATH or postgresql://USER@HOST/NAME.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON rather than tables.")]
Since = Annotated[str | None, typer.Option(help="Opened since: 90s, 30m, 2h, 7d ago, or an ISO 8601 time (UTC).")]
_DEFAULT_DB = "sqlite:///fleet.sqlite3"


@app.command()
def devices(db: Database = _DEFAULT_DB, as_json: AsJson = False) -> None:
    """List the devices."""
    with _reading(db) as connection:
        from fleet_edge.store import queries

        found = queries.devices(connection)
    if as_json:
        print_json(found)
    else:
        reports.show_devices(found)


@app.command()
def device(
    name: Annotated[str, typer.Argument(metavar="ID")], db: Database = _DEFAULT_DB, as_json: AsJson = False
) -> None:
    """Show one device, its latest hours, sessions and events."""
    with _reading(db) as connection:
        from fleet_edge.store import queries

        found = queries.device(connection, name)
        hours = queries.hours(connection, name, limit=_HOURS)
        latest = queries.sessions(connection, queries.SessionFilter(devices=(name,)), limit=10)
        events = queries.events_of_device(connection, name, limit=_EVENTS)
    if as_json:
        print_json({"device": found, "hours": hours, "sessions": latest, "events": events})
    else:
        reports.show_device(found, hours=hours, sessions=latest, events=events)


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
) -> None:
    """List sessions, the latest first."""
    after, before = _time("--since", since), _time("--until", until)
    with _reading(db) as connection:
        from fleet_edge.store import queries

        chosen = queries.SessionFilter(
            devices=tuple(device or ()), edge=edge, reason=reason, mode=mode, since=after, until=before, open=only_open
        )
        found = queries.sessions(connection, chosen, limit=limit)
    more = f" (perhaps more: --limit {limit})" if len(found) == limit else ""
    if as_json:
        print_json(found)
    else:
        reports.show_sessions(f"Sessions: {len(found)}{more}", found)


@app.command()
def session(
    prefix: Annotated[str, typer.Argument(metavar="ID", help="The session's id, or enough of its beginning.")],
    rounds: Annotated[bool, typer.Option("--rounds", help="Also every round, if the session was traced.")] = False,
    db: Database = _DEFAULT_DB,
    as_json: AsJson = False,
) -> None:
    """Show one session: what the edge counted beside what the device counted."""
    with _reading(db) as connection:
        from fleet_edge.store import queries

        found = queries.session(connection, prefix)
        segments = queries.segments(connection, found.session)
        traced = queries.rounds(connection, found.session) if rounds else []
        events = queries.events_of_session(connection, found.session, limit=_EVENTS)
    if as_json:
        print_json({"session": found, "segments": segments, "events": events, **({"rounds": traced} if rounds else {})})
        return
    reports.show_session(found, segments=segments)
    if rounds:
        reports.show_rounds(traced)
    reports.show_events(events)


@app.command()
def stats(
    since: Since = None,
    by: Annotated[str | None, typer.Option(metavar="device|draft|edge", help="Add up separately.")] = None,
    db: Database = _DEFAULT_DB,
    as_json: AsJson = False,
) -> None:
    """Add up what the edges counted."""
    after = _time("--since", since)
    if by not in {None, "device", "draft", "edge"}:
        raise CommandError(f"--by takes device, draft or edge, not {cell(by)!r}.")
    with _reading(db) as connection:
        from fleet_edge.store import totals

        found = totals.stats(connection, since=after, by=totals.Grouping(by) if by else None)
    if as_json:
        print_json(found)
    else:
        reports.show_stats("Totals" if after is None else f"Totals since {cell(after)} UTC", by=by, found=found)


def parse_time(text: str, *, now: datetime) -> datetime:
    """Read a time given as an age (`90s`, `30m`, `2h`, `7d`) or in ISO 8601, where UTC is assumed.

    Raises:
        ValueError: It is neither, or lies outside the calendar.
    """
    age = re.fullmatch(r"(\d{1,9})([smhd])", text.strip())
    try:
        if age:
            return now - timedelta(seconds=int(age[1]) * _UNITS[age[2]])
        at = datetime.fromisoformat(text.strip())
        return (at.replace(tzinfo=UTC) if at.tzinfo is None else at).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{cell(text)!r} is neither an age such as 2h or 7d nor an ISO 8601 time.") from None


def _time(option: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        return parse_time(text, now=datetime.now(UTC))
    except ValueError as error:
        raise CommandError(f"{option}: {error}") from error


@contextmanager
def _reading(url: str) -> "Iterator[Connection]":
    """Open the database; all that goes wrong with it becomes one sentence, which `fleet` prints."""
    try:
        from sqlalchemy.exc import SQLAlchemyError

        from fleet_edge.store.database import open_for_reading
        from fleet_edge.store.errors import StoreUnavailable
    except ModuleNotFoundError as error:
        raise CommandError(
            f"The package {error.name!r} is missing; install this one with the extra 'admin'."
        ) from error
    engine = open_for_reading(url)
    try:
        with engine.connect() as connection:
            yield connection
    except SQLAlchemyError as error:
        # The first line: the others repeat the statement.
        raise StoreUnavailable(f"The database could not be read: {str(error).partition(chr(10))[0]}") from error
    finally:
        engine.dispose()

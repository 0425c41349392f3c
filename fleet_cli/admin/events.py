"""`fleet admin events`: what happened, when, to whom and by whom; as it comes, and how often."""

import json
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fleet_admin.reports import EVENTS
from fleet_cli.admin.options import DEFAULT_DB, AsJson, Database, Wide, open_log, time_of
from fleet_cli.errors import CommandError
from fleet_cli.tables import Column, cell, plain, print_json, print_table

if TYPE_CHECKING:
    from fleet_edge.session_log import SessionLog
    from fleet_edge.store.views import EventCount, EventView

_POLL_S: Final = 1.0
_PAGE: Final = 1000
_LOOK_BACK: Final = timedelta(minutes=2)
"""An event may be written late: its edge's clock lags, or it has waited for the database."""

_GROUPINGS: Final = ("kind", "code", "severity", "edge", "device", "day")
_SEVERITIES: Final = ("info", "warning", "error")


def register(app: typer.Typer) -> None:
    app.command()(events)


def events(
    since: Annotated[str | None, typer.Option(help="Since: 90s, 30m, 2h, 7d ago, or an ISO 8601 time (UTC).")] = None,
    until: Annotated[str | None, typer.Option(help="Before: as --since.")] = None,
    device: Annotated[list[str] | None, typer.Option(help="Of this device; may be given several times.")] = None,
    edge: Annotated[str | None, typer.Option(help="Logged by this edge.")] = None,
    session: Annotated[str | None, typer.Option(help="Of this session, by the beginning of its id.")] = None,
    kind: Annotated[str | None, typer.Option(help="Of this kind; docs/events.md lists them.")] = None,
    code: Annotated[str | None, typer.Option(help="Of this code; likewise.")] = None,
    severity: Annotated[str | None, typer.Option(metavar="info|warning|error", help="At least so grave.")] = None,
    who: Annotated[str | None, typer.Option(help="Done by this person.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many, the latest first.")] = 50,
    following: Annotated[bool, typer.Option("--follow", "-f", help="Go on, as they come, until Ctrl-C.")] = False,
    count: Annotated[
        str | None, typer.Option(metavar="kind,code,…", help="How often, by kind, code, severity, edge, device, day.")
    ] = None,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """List what happened: faults, refusals, resumes, restarts, outages, fences, settings, commands, alerts."""
    if severity not in {None, *_SEVERITIES}:
        raise CommandError(f"--severity takes info, warning or error, not {cell(severity)!r}.")
    chosen: dict[str, Any] = {"device": device or None, "edge": edge, "kind": kind, "code": code, "severity": severity}
    after, before = time_of("--since", since), time_of("--until", until)
    if count is not None:
        if following or session is not None or who is not None:
            raise CommandError("--count goes with neither --follow nor --session nor --who.")
        with open_log(db) as log:
            counts = log.event_counts(by=_groups(count), since=after, until=before, limit=limit, **chosen)
        if as_json:
            print_json(counts)
        else:
            _show_counts(counts, by=_groups(count), wide=wide)
        return
    chosen |= {"session": session, "who": who}
    with open_log(db) as log:
        if not following:
            found = log.events(since=after, until=before, limit=limit, **chosen)
            if as_json:
                print_json(found)
            else:
                more = f" (perhaps more: --limit {limit})" if len(found) == limit else ""
                title = f"Events: {len(found)}{more}"
                print_table(title, EVENTS, found, sort="at", wide=wide, empty="No event is like that.")
            return
        if before is not None:
            raise CommandError("--until ends what --follow goes on with; leave one of them out.")
        for event in follow(log, since=after or datetime.now(UTC), **chosen):
            sys.stdout.write((json.dumps(plain(event)) if as_json else _line(event)) + "\n")
            sys.stdout.flush()


def follow(
    log: "SessionLog",
    *,
    since: datetime,
    pause: Callable[[], object] = lambda: time.sleep(_POLL_S),
    **chosen: Any,  # noqa: ANN401 - as `SessionLog.events` has them
) -> "Iterator[EventView]":
    """Yield events as they are written, the earliest first, without end; each once, whatever more is counted of it.

    Args:
        log: The session log.
        since: That went on at or after this (aware).
        pause: Waits between two looks.
        **chosen: What else `SessionLog.events` takes.
    """
    seen: OrderedDict[str, datetime] = OrderedDict()
    newest = since
    while True:
        fresh = []
        for event in log.events(since=max(since, newest - _LOOK_BACK), limit=_PAGE, **chosen):
            if event.id not in seen:
                fresh.append(event)
            newest = max(newest, event.last_at)
        for event in reversed(fresh):
            seen[event.id] = event.last_at
            yield event
        while seen and next(iter(seen.values())) < newest - 2 * _LOOK_BACK:
            seen.popitem(last=False)
        pause()


def _groups(text: str) -> list[str]:
    groups = [word.strip() for word in text.split(",") if word.strip()]
    for word in groups:
        if word not in _GROUPINGS:
            raise CommandError(f"--count takes {', '.join(_GROUPINGS)}, not {cell(word)!r}.")
    if not groups:
        raise CommandError(f"--count takes one or several of {', '.join(_GROUPINGS)}.")
    return groups


def _line(event: "EventView") -> str:
    subject = " ".join(part for part in (event.edge, event.device, event.who) if part)
    times = "" if event.count == 1 else f" ({event.count} times)"
    what = f"{event.severity:7} {event.kind}/{event.code}"
    return f"{cell(event.at)} {cell(what)} [{cell(subject)}] {cell(event.sentence)}{times}"


def _show_counts(found: "list[EventCount]", *, by: list[str], wide: bool) -> None:
    columns: list[Column[EventCount]] = [
        *(Column(name, lambda row, name=name: getattr(row, name), rank=0) for name in by),  # type: ignore[misc]
        Column("times", lambda row: row.times, "count", rank=0),
        Column("events", lambda row: row.events, "count", rank=1),
        Column("last", lambda row: row.last_at, "moment", rank=1),
    ]
    print_table("Events, counted", columns, found, sort="times", wide=wide, empty="No event is like that.")

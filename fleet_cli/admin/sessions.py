"""Commands of `fleet admin` that read the session log: a device, an edge, sessions, events."""

import json
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Final

import typer

from fleet_admin import reports
from fleet_admin.report import Report
from fleet_admin.reports import (
    COMPARED,
    CONCLUSIONS,
    EVENTS,
    PART_TIMES,
    ROUNDS,
    SEGMENTS,
    SESSION_FACTS,
    SESSIONS,
    TALLY,
    compared,
    device_columns,
    edge_columns,
)
from fleet_cli.admin.listing import Listing, with_listing
from fleet_cli.commands import CommandError
from fleet_cli.options import DEFAULT_DB, AsJson, Database, open_log
from fleet_cli.tables import Column, cell, describe, plain, print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fleet_admin.diagnosis import Diagnosis
    from fleet_edge.session_log import EventCount, EventView, Filter, SessionLog

_EVENTS: Final = 20
_LATEST_HOURS: Final = 24
_RECENT: Final = timedelta(days=30)


def device(
    name: Annotated[str, typer.Argument(metavar="ID")],
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
) -> None:
    """Show a device, why it is slow, and its latest hours, sessions and events."""
    from fleet_admin.diagnosis import diagnose_device

    with open_log(db) as log:
        found = log.device(name)
        diagnosis = diagnose_device(log, name)
        since = found.last_session_at and found.last_session_at - _RECENT
        hours = log.usage(device=name, grain="hour", since=since)[: -_LATEST_HOURS - 1 : -1]
        latest = log.sessions(device=name, limit=10)
        events = log.events(device=name, limit=_EVENTS)
    if as_json:
        print_json({"device": found, "diagnosis": diagnosis, "hours": hours, "sessions": latest, "events": events})
        return
    columns = device_columns(datetime.now(UTC), past=not found.connected)
    describe(f"Device {cell(found.device)}", columns[1:], found)
    _print_diagnosis(diagnosis)
    print_table(
        "Latest hours",
        [Column("hour", "start", "moment", rank=0), *TALLY],
        hours,
        empty="No hours: no edge has served it lately.\n",
    )
    print_table("Latest sessions", SESSIONS, latest, empty="No sessions, or they were purged.\n")
    print_table("Latest events", EVENTS, events, empty="No events.\n")


def edge(
    name: Annotated[str, typer.Argument(metavar="ID")],
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
) -> None:
    """Show an edge, why its sessions are slow, and its latest sessions and events."""
    from fleet_admin.diagnosis import diagnose_edge

    with open_log(db) as log:
        found = log.edge(name)
        diagnosis = diagnose_edge(log, name)
        latest = log.sessions(edge=name, limit=10)
        events = log.events(edge=name, limit=_EVENTS)
    if as_json:
        print_json({"edge": found, "diagnosis": diagnosis, "sessions": latest, "events": events})
        return
    describe(f"Edge {cell(found.edge)}", edge_columns(datetime.now(UTC))[1:], found)
    _print_diagnosis(diagnosis)
    print_table("Latest sessions", SESSIONS, latest, empty="No sessions, or they were purged.\n")
    print_table("Latest events", EVENTS, events, empty="No events.\n")


def _print_diagnosis(diagnosis: "Diagnosis") -> None:
    print_table(diagnosis.sentence, CONCLUSIONS, diagnosis.conclusions, empty=f"{diagnosis.sentence}\n")
    if diagnosis.parts:
        print_table("A token's time", PART_TIMES, diagnosis.parts)


@with_listing(period=True)
def sessions(listing: Listing, db: Database = DEFAULT_DB) -> None:
    """List sessions, latest first, with their tokens, speed and end."""
    with open_log(db) as log:
        listing.show(reports.sessions(log, datetime.now(UTC)))


def session(
    prefix: Annotated[str, typer.Argument(metavar="ID", help="Session id, or a unique prefix of it.")],
    rounds: Annotated[bool, typer.Option("--rounds", help="Show every round.")] = False,
    device: Annotated[str | None, typer.Option(help="Device of the session, if two devices used the same id.")] = None,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
) -> None:
    """Show a session: what the edge counted next to what the device counted."""
    with open_log(db) as log:
        found = log.session(prefix, device=device)
        segments = log.segments(found.session, device=found.device)
        judged = log.rounds(found.session, device=found.device) if rounds else []
        events = log.events(session=found.session, device=found.device, limit=_EVENTS)
    if as_json:
        asked = {"rounds": judged} if rounds else {}
        print_json({"session": found, "segments": segments, "events": events, **asked})
        return
    describe(f"Session {found.session}", SESSION_FACTS, found)
    print_table("Counted", COMPARED, compared(found))
    print_table("Segments", SEGMENTS, segments, empty="No segments: the session was served by no edge.\n")
    if rounds:
        empty = "No rounds: none was judged, or they were purged.\n"
        print_table(f"Rounds: {len(judged)}", ROUNDS, judged, empty=empty)
    print_table("Latest events", EVENTS, events, empty="No events.\n")


_POLL_S: Final = 1.0
_PAGE: Final = 1000
_LOOK_BACK: Final = timedelta(minutes=2)
"""An event may be written late: its edge's clock lags, or it has waited for the database."""

_COUNTED_BY: Final = ("kind", "code", "severity", "edge", "device", "day")


@with_listing(period=True)
def events(
    listing: Listing,
    following: Annotated[bool, typer.Option("--follow", "-f", help="Print new events until Ctrl-C.")] = False,
    count: Annotated[
        str | None,
        typer.Option(metavar="kind,code,…", help="Count events by kind, code, severity, edge, device or day."),
    ] = None,
    db: Database = DEFAULT_DB,
) -> None:
    """List events: faults, refusals, resumes, restarts, outages, quarantine, settings, commands, alerts."""
    if following and (count is not None or listing.until is not None or listing.sort or listing.as_csv):
        raise CommandError("--follow goes with filters, --since and --json alone; remove the other options.")
    with open_log(db) as log:
        report = reports.events(log, datetime.now(UTC))
        if count is not None:
            replace(listing, filters=()).show(_counts(log, report, listing, _groups(count)))
        elif not following:
            listing.show(report)
        else:
            chosen = report.filters(listing.filters)
            for event in follow(log, since=listing.since or datetime.now(UTC), where=chosen):
                sys.stdout.write((json.dumps(plain(event)) if listing.as_json else _line(event)) + "\n")
                sys.stdout.flush()


def _counts(
    log: "SessionLog", report: "Report[EventView]", listing: Listing, groups: "Sequence[str]"
) -> "Report[EventCount]":
    where = report.filters(listing.filters)
    columns: list[Column[EventCount]] = [
        *(Column(name, name, rank=0) for name in groups),
        Column("times", "times", "count", rank=0),
        Column("events", "events", "count", rank=1),
        Column("last", "last_at", "moment", rank=1),
    ]
    return Report(
        "counts of events",
        columns,
        lambda since, until, limit, **_: log.event_counts(
            by=groups, since=since, until=until, where=where, limit=limit
        ),
        "",
        empty="No event matches.",
    )


def follow(
    log: "SessionLog",
    *,
    since: datetime,
    pause: Callable[[], object] = lambda: time.sleep(_POLL_S),
    where: "Sequence[Filter]" = (),
) -> "Iterator[EventView]":
    """Yield new events forever, earliest first, each once even if it is counted again.

    `since` is aware, `pause` waits between two queries, `where` are filters of `SessionLog.events`.
    """
    seen: OrderedDict[str, datetime] = OrderedDict()
    newest = since
    while True:
        fresh = []
        for event in log.events(since=max(since, newest - _LOOK_BACK), limit=_PAGE, where=where):
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
        if word not in _COUNTED_BY:
            raise CommandError(f"--count takes {', '.join(_COUNTED_BY)}, not {cell(word)!r}.")
    if not groups:
        raise CommandError(f"--count takes one or several of {', '.join(_COUNTED_BY)}.")
    return groups


def _line(event: "EventView") -> str:
    subject = " ".join(part for part in (event.edge, event.device, event.who) if part)
    times = "" if event.count == 1 else f" ({event.count} times)"
    what = f"{event.severity:7} {event.kind}/{event.code}"
    return f"{cell(event.at)} {cell(what)} [{cell(subject)}] {cell(event.sentence)}{times}"


def register(app: typer.Typer) -> None:
    for command in (device, edge, sessions, session, events):
        app.command()(command)

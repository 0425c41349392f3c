"""Commands of `fleet admin` that read the session log: devices, sessions, totals, events."""

import json
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from fleet_admin.columns import in_order
from fleet_admin.reports import (
    COMPARED,
    CONCLUSIONS,
    EVENTS,
    PART_TIMES,
    ROUNDS,
    SEGMENTS,
    SESSION_FACTS,
    SESSIONS,
    compared,
    device_columns,
    edge_columns,
    start_column,
    tally_columns,
)
from fleet_cli.errors import CommandError
from fleet_cli.options import DEFAULT_DB, SHOWN, AsJson, AtMost, Database, Since, Wide, open_log, shown_of, time_of
from fleet_cli.tables import Column, cell, describe, plain, print_json, print_table
from schemas.policy import Mode
from schemas.reasons import EndReason

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fleet_admin.diagnosis import Diagnosis
    from fleet_edge.session_log import SessionLog
    from fleet_edge.store.views import EventCount, EventView, UsageView

T = TypeVar("T")

_EVENTS: Final = 20
_LATEST_HOURS: Final = 24
_RECENT: Final = timedelta(days=30)
_NO_DEVICES: Final = "No device has been seen: start one with `fleet device run` while an edge is online."

_DEVICE_STATES: Final = ("online", "draining", "offline", "quarantined", "retired", "unknown")

# Each by a column's key, with `-` for descending order; the most urgent rows come first.
_DEVICE_ORDERS: Final = {
    "name": "device",
    "seen": "seen",
    "sessions": "-sessions",
    "tokens": "-tokens_today",
    "acceptance": "acceptance_24h",
    "round-trip": "-round_trip",
    "draft-time": "-draft_time",
    "certificate": "certificate",
}
_MAX_SORTED: Final = 10_000
"""Sessions that are sorted by another column than their beginning: each is read whole, with its segments."""

_SESSION_ORDERS: Final = {
    "opened": "-opened",
    "tokens": "-tokens",
    "speed": "speed",
    "acceptance": "acceptance",
    "first-token": "-first_token",
    "gap": "-gap_p95",
}


def devices(
    since: Annotated[
        str | None, typer.Option(help="Devices seen since: 2h or 7d ago, or an ISO 8601 time (UTC).")
    ] = None,
    state: Annotated[
        str | None, typer.Option(metavar="|".join(_DEVICE_STATES), help="Only devices in this state.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Only devices with this draft model.")] = None,
    version: Annotated[str | None, typer.Option(help="Only devices with this release.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Only devices with this label; repeatable.")] = None,
    sort: Annotated[str, typer.Option(metavar="|".join(_DEVICE_ORDERS), help="Sort by this column.")] = "name",
    limit: AtMost = None,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """List the devices with state, draft model, acceptance and tokens."""
    order = _order("--sort", sort, _DEVICE_ORDERS)
    if state not in {None, *_DEVICE_STATES}:
        raise CommandError(f"--state takes {', '.join(_DEVICE_STATES)}, not {cell(state)!r}.")
    after = time_of("--since", since)
    with open_log(db) as log:
        found = [
            view
            for view in log.devices()
            if (after is None or view.last_sign_at >= after)
            and (state is None or view.state.value == state)
            and (model is None or view.draft_model == model)
            and (version is None or view.software == version)
            and (not label or set(view.labels) & set(label))
        ]
    columns = device_columns(datetime.now(UTC))
    found = _sorted(found, columns, order)
    if as_json:
        print_json(found[:limit])
        return
    rows = found[: limit or SHOWN]
    title = f"Devices: {shown_of(len(rows), len(found))}"
    empty = "No device matches." if state or after or model or version or label else _NO_DEVICES
    print_table(title, columns, rows, sort=order.removeprefix("-"), wide=wide, empty=empty)


def device(
    name: Annotated[str, typer.Argument(metavar="ID")],
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
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
    _print_diagnosis(diagnosis, wide=wide)
    by_hour: list[Column[UsageView]] = [
        start_column("hour", lambda row: row.start),
        *tally_columns(lambda row: row.counted),
    ]
    print_table("Latest hours", by_hour, hours, wide=wide, empty="No hours: no edge has served it lately.\n")
    print_table("Latest sessions", SESSIONS, latest, wide=wide, empty="No sessions, or they were purged.\n")
    print_table("Latest events", EVENTS, events, wide=wide, empty="No events.\n")


def edge(
    name: Annotated[str, typer.Argument(metavar="ID")],
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
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
    _print_diagnosis(diagnosis, wide=wide)
    print_table("Latest sessions", SESSIONS, latest, wide=wide, empty="No sessions, or they were purged.\n")
    print_table("Latest events", EVENTS, events, wide=wide, empty="No events.\n")


def _print_diagnosis(diagnosis: "Diagnosis", *, wide: bool) -> None:
    print_table(diagnosis.sentence, CONCLUSIONS, diagnosis.conclusions, wide=wide, empty=f"{diagnosis.sentence}\n")
    if diagnosis.parts:
        print_table("A token's time", PART_TIMES, diagnosis.parts, wide=wide)


def sessions(
    device: Annotated[list[str] | None, typer.Option(help="Only this device; repeatable.")] = None,
    edge: Annotated[str | None, typer.Option(help="Only sessions at this edge.")] = None,
    app: Annotated[str | None, typer.Option(help="Only sessions of this application.")] = None,
    reason: Annotated[EndReason | None, typer.Option(help="Only sessions with this end reason.")] = None,
    mode: Annotated[Mode | None, typer.Option(help="Only sessions with this verification mode.")] = None,
    since: Since = None,
    until: Annotated[str | None, typer.Option(help="Sessions opened before, in the same format as --since.")] = None,
    model: Annotated[str | None, typer.Option(help="Only sessions with this draft model.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Only devices with this label.")] = None,
    sort: Annotated[
        str,
        typer.Option(
            metavar="|".join(_SESSION_ORDERS),
            help=f"Sort by this column; all but opened read at most the latest {_MAX_SORTED:,}.",
        ),
    ] = "opened",
    only_open: Annotated[bool, typer.Option("--open", help="Only running sessions.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Maximum number.")] = 50,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """List sessions, latest first, with their tokens, speed and end."""
    order = _order("--sort", sort, _SESSION_ORDERS)
    after, before = time_of("--since", since), time_of("--until", until)
    with open_log(db) as log:
        found = log.sessions(
            since=after,
            until=before,
            device=device,
            edge=edge,
            app=app,
            reason=reason,
            mode=mode,
            open=only_open,
            model=model,
            label=label or None,
            limit=limit if sort == "opened" else max(limit, _MAX_SORTED),
        )
    among = len(found)
    found = _sorted(found, SESSIONS, order)[:limit]
    more = f" (perhaps more: --limit {limit})" if among == limit else f" of {among}" if among > limit else ""
    title = f"Sessions: {len(found)}{more}"
    empty, key = "No session matches.", order.removeprefix("-")
    print_table(title, SESSIONS, found, as_json=as_json, sort=key, wide=wide, empty=empty)


def session(
    prefix: Annotated[str, typer.Argument(metavar="ID", help="Session id, or a unique prefix of it.")],
    rounds: Annotated[bool, typer.Option("--rounds", help="Show every round.")] = False,
    device: Annotated[str | None, typer.Option(help="Device of the session, if two devices used the same id.")] = None,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
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
    print_table("Counted", COMPARED, compared(found), wide=wide)
    print_table("Segments", SEGMENTS, segments, wide=wide, empty="No segments: the session was served by no edge.\n")
    if rounds:
        empty = "No rounds: none was judged, or they were purged.\n"
        print_table(f"Rounds: {len(judged)}", ROUNDS, judged, wide=wide, empty=empty)
    print_table("Latest events", EVENTS, events, wide=wide, empty="No events.\n")


def _order(option: str, word: str, orders: "Mapping[str, str]") -> str:
    if word not in orders:
        raise CommandError(f"{option} takes {', '.join(orders)}, not {cell(word)!r}.")
    return orders[word]


def _sorted(rows: "Sequence[T]", columns: "Sequence[Column[T]]", order: str) -> "list[T]":
    column = next(each for each in columns if each.key == order.removeprefix("-"))
    return in_order(rows, column, falling=order.startswith("-"))


_POLL_S: Final = 1.0
_PAGE: Final = 1000
_LOOK_BACK: Final = timedelta(minutes=2)
"""An event may be written late: its edge's clock lags, or it has waited for the database."""

_COUNTED_BY: Final = ("kind", "code", "severity", "edge", "device", "day")
_SEVERITIES: Final = ("info", "warning", "error")
_NO_EVENT: Final = "No event matches."


def events(
    since: Annotated[str | None, typer.Option(help="Begin: 90s, 30m, 2h or 7d ago, or an ISO 8601 time (UTC).")] = None,
    until: Annotated[str | None, typer.Option(help="End, in the same format as --since.")] = None,
    device: Annotated[list[str] | None, typer.Option(help="Only this device; repeatable.")] = None,
    edge: Annotated[str | None, typer.Option(help="Only events logged by this edge.")] = None,
    session: Annotated[str | None, typer.Option(help="Only this session; a prefix of its id is enough.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only events of this kind; docs/events.md lists the kinds.")] = None,
    code: Annotated[
        str | None, typer.Option(help="Only events with this code; docs/events.md lists the codes.")
    ] = None,
    severity: Annotated[str | None, typer.Option(metavar="info|warning|error", help="Minimum severity.")] = None,
    who: Annotated[str | None, typer.Option(help="Only events caused by this user.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Maximum number, latest first.")] = 50,
    following: Annotated[bool, typer.Option("--follow", "-f", help="Print new events until Ctrl-C.")] = False,
    count: Annotated[
        str | None,
        typer.Option(metavar="kind,code,…", help="Count events by kind, code, severity, edge, device or day."),
    ] = None,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """List events: faults, refusals, resumes, restarts, outages, quarantine, settings, commands, alerts."""
    if severity not in {None, *_SEVERITIES}:
        raise CommandError(f"--severity takes info, warning or error, not {cell(severity)!r}.")
    chosen: dict[str, Any] = {"device": device or None, "edge": edge, "kind": kind, "code": code, "severity": severity}
    after, before = time_of("--since", since), time_of("--until", until)
    if count is not None:
        if following or session is not None or who is not None:
            raise CommandError("--count goes with neither --follow nor --session nor --who.")
        with open_log(db) as log:
            counts = log.event_counts(by=_groups(count), since=after, until=before, limit=limit, **chosen)
        columns: list[Column[EventCount]] = [
            *(Column(name, lambda row, name=name: getattr(row, name), rank=0) for name in _groups(count)),  # type: ignore[misc]
            Column("times", lambda row: row.times, "count", rank=0),
            Column("events", lambda row: row.events, "count", rank=1),
            Column("last", lambda row: row.last_at, "moment", rank=1),
        ]
        print_table("Events, counted", columns, counts, as_json=as_json, sort="times", wide=wide, empty=_NO_EVENT)
        return
    chosen |= {"session": session, "who": who}
    with open_log(db) as log:
        if not following:
            found = log.events(since=after, until=before, limit=limit, **chosen)
            more = f" (perhaps more: --limit {limit})" if len(found) == limit else ""
            title = f"Events: {len(found)}{more}"
            print_table(title, EVENTS, found, as_json=as_json, sort="at", wide=wide, empty=_NO_EVENT)
            return
        if before is not None:
            raise CommandError("--until and --follow exclude each other; remove one.")
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
    """Yield new events forever, earliest first, each once even if it is counted again.

    `since` is aware, `pause` waits between two queries, `chosen` are filters of `SessionLog.events`.
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
    for command in (devices, device, edge, sessions, session, events):
        app.command()(command)

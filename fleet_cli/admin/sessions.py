"""Commands of `fleet admin` that read the session log: devices, sessions, totals, events."""

import json
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from fleet_admin.columns import Kind, in_order, shown
from fleet_admin.reports import EVENTS, RUNNING, SESSIONS, device_columns, tally_columns
from fleet_cli.errors import CommandError
from fleet_cli.options import DEFAULT_DB, SHOWN, AsJson, AtMost, Database, Since, Wide, open_log, shown_of, time_of
from fleet_cli.tables import Column, cell, describe, plain, print_json, print_table
from schemas.names import model_name
from schemas.policy import Mode
from schemas.reasons import EndReason

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fleet_edge.session_log import SessionLog
    from fleet_edge.store.views import (
        DeviceView,
        EventCount,
        EventView,
        HourView,
        RoundView,
        SegmentView,
        SessionView,
        Tally,
    )

_HOURS: "Final[list[Column[HourView]]]" = [
    Column("hour", lambda row: row.hour, "moment", rank=0),
    *tally_columns(lambda row: row.counted),
]

_SEGMENTS: "Final[list[Column[SegmentView]]]" = [
    Column("opened", lambda row: row.opened_at, "moment", rank=0),
    Column("edge", lambda row: row.edge, rank=0),
    Column("end", lambda row: row.reason or RUNNING, "state", rank=0),
    Column("tokens", lambda row: row.counted.tokens, "count", rank=0),
    Column("resumed tokens", lambda row: row.resumed_tokens, "count", rank=1),
    Column("acceptance", lambda row: row.counted.acceptance, "percent", rank=1),
    Column("first token", lambda row: row.first_token_ms, "ms", rank=1),
    Column("gap p95", lambda row: row.gap_p95_ms, "ms", rank=1),
    Column("rounds", lambda row: row.counted.rounds, "count", rank=2),
    Column("Open", lambda row: row.open_bytes, "bytes", rank=2, meaning="Its size."),
    Column("prefilled", lambda row: row.counted.prefill_tokens, "count", rank=2),
    Column("reused", lambda row: row.counted.reused_tokens, "count", rank=2),
    Column("target", lambda row: row.target, rank=3),
    Column("draft model", lambda row: model_name(row.draft_model, row.quantization), rank=3),
]

_ROUNDS: "Final[list[Column[RoundView]]]" = [
    Column("judged", lambda row: f"{row.at:%H:%M:%S}", "state", rank=0),
    Column("round", lambda row: row.round, "count", rank=0),
    Column("drafted", lambda row: row.drafted, "count", rank=1),
    Column("tested", lambda row: row.tested, "count", rank=1),
    Column("accepted", lambda row: row.accepted, "count", rank=0),
    Column("batch", lambda row: row.batch, "count", rank=2),
    Column("up", lambda row: row.uplink_bytes, "bytes", rank=1),
    Column("down", lambda row: row.downlink_bytes, "bytes", rank=1),
    Column("queue", lambda row: row.queue_ms, "ms", rank=1),
    Column("step", lambda row: row.compute_ms, "ms", rank=1),
    Column("prompt wait", lambda row: row.prefill_ms, "ms", rank=2),
    Column("base", lambda row: row.base, "count", rank=3),
    Column("form", lambda row: row.form, rank=3),
]

_COMPARED: "Final[list[Column[tuple[str, str, str]]]]" = [
    Column("", lambda row: row[0], rank=0),
    Column("by the edge", lambda row: row[1], "number", rank=0),
    Column("by the device", lambda row: row[2], "number", rank=0),
]


def _device_facts(found: "DeviceView") -> list[tuple[str, object]]:
    return [
        ("state", found.state.value),
        ("since (UTC)", found.state_since),
        ("last seen (UTC)", found.last_sign_at),
        ("labels", " ".join(found.labels) or None),
        ("certificate until (UTC)", found.certificate_until),
        ("plan (device)", found.plan),
        ("round trip (device)", shown(found.round_trip_ms, "ms")),
        ("acceptance since its start (device)", shown(found.told_acceptance, "percent")),
        ("draft time per token (device)", shown(found.draft_ms_per_token, "ms")),
        ("telemetry (UTC)", found.telemetry_at),
        ("software", found.software),
        ("draft model", model_name(found.draft_model, found.quantization)),
        ("first seen (UTC)", found.first_seen_at),
        ("sessions", f"{found.sessions:,}"),
    ]


def _session_facts(found: "SessionView") -> list[tuple[str, object]]:
    shaping = f"{found.temperature:g}, {found.top_k}, {found.top_p:g}" if found.temperature is not None else None
    counted = found.counted
    facts: list[tuple[str, object, Kind]] = [
        ("device", found.device, "text"),
        ("draft model", model_name(found.draft_model, found.quantization), "text"),
        ("target model", found.target, "text"),
        ("mode", found.mode, "text"),
        ("temperature, top-k, top-p", shaping, "text"),
        ("seed", found.seed, "text"),
        ("prompt tokens", found.prompt_tokens, "count"),
        ("tokens prefilled (edge)", counted.prefill_tokens, "count"),
        ("tokens reused (edge)", counted.reused_tokens, "count"),
        ("most new tokens", found.max_new_tokens, "count"),
        ("opened (UTC)", found.opened_at, "moment"),
        ("closed (UTC)", found.closed_at, "moment"),
        ("ended", found.reason or RUNNING, "text"),
        *((("why", f"{found.end_sentence} ({found.end_code})", "text"),) if found.end_sentence else ()),
        ("first token (edge)", found.first_token_ms, "ms"),
        ("token gap p95 (edge)", found.gap_p95_ms, "ms"),
        ("tokens at the end", found.final_tokens, "count"),
        ("of that unverified (device)", found.device_unverified, "count"),
        ("tokens streamed (edge)", counted.streamed, "count"),
        ("of that accepted (edge)", counted.guessed_right, "count"),
        ("guesses (edge)", counted.guessed, "count"),
        ("forced by a grammar (edge)", counted.forced, "count"),
        ("draft model time (device)", found.device_draft_ms, "ms"),
        ("waiting (device)", found.device_wait_ms, "ms"),
        ("of that network", found.network_ms, "ms"),
        ("queue (edge)", counted.queue_ms, "ms"),
        ("prompt (edge)", counted.prefill_ms, "ms"),
        ("steps (edge)", counted.compute_ms, "ms"),
        ("wall time (device)", found.device_wall_ms, "ms"),
        ("mean batch (sessions)", counted.mean_batch, "figure"),
    ]
    return [(name, shown(value, kind)) for name, value, kind in facts]


def _comparison(found: "SessionView") -> list[tuple[str, str, str]]:
    edge = found.counted
    rows: list[tuple[str, object, object, Kind]] = [
        ("tokens", edge.tokens, found.device_tokens, "count"),
        ("rounds", edge.rounds, found.device_rounds, "count"),
        ("drafted tokens", edge.drafted, found.device_drafted, "count"),
        ("tested tokens", edge.tested, found.device_tested, "count"),
        ("accepted tokens", edge.accepted, found.device_accepted, "count"),
        ("acceptance", edge.acceptance, found.device_acceptance, "percent"),
        ("uplink", edge.uplink_bytes, found.device_uplink_bytes, "bytes"),
        ("downlink", edge.downlink_bytes, found.device_downlink_bytes, "bytes"),
    ]
    return [(name, shown(one, kind), shown(other, kind)) for name, one, other, kind in rows]


T = TypeVar("T")

_EVENTS: Final = 20
_LATEST_HOURS: Final = 24
_NO_DEVICES: Final = "No device has been seen: start one with `fleet device run` while an edge is online."
_GROUPINGS: Final = ("device", "draft", "edge", "app", "hour", "day", "month")  # of `totals`, which loads SQLAlchemy

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
    silent: Annotated[
        bool, typer.Option("--silent", help="Only silent devices: online at the broker, but without messages.")
    ] = False,
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
    after = time_of("--since", since)
    with open_log(db) as log:
        found = [
            view
            for view in log.devices()
            if (after is None or view.last_sign_at >= after)
            and (not silent or view.state.value == "silent")
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
    empty = "No device matches." if silent or after or model or version or label else _NO_DEVICES
    print_table(title, columns, rows, sort=order.removeprefix("-"), wide=wide, empty=empty)


def device(
    name: Annotated[str, typer.Argument(metavar="ID")],
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Show a device with its latest hours, sessions and events."""
    with open_log(db) as log:
        found = log.device(name)
        hours = log.hours(name, limit=_LATEST_HOURS)
        latest = log.sessions(device=name, limit=10)
        events = log.events(device=name, limit=_EVENTS)
    if as_json:
        print_json({"device": found, "hours": hours, "sessions": latest, "events": events})
        return
    describe(f"Device {cell(found.device)}", _device_facts(found))
    print_table("Latest hours", _HOURS, hours, wide=wide, empty="No hours: no edge has served it.\n")
    print_table("Latest sessions", SESSIONS, latest, wide=wide, empty="No sessions, or they were purged.\n")
    print_table("Latest events", EVENTS, events, wide=wide, empty="No events.\n")


def sessions(
    device: Annotated[list[str] | None, typer.Option(help="Only this device; repeatable.")] = None,
    edge: Annotated[str | None, typer.Option(help="Only sessions at this edge.")] = None,
    reason: Annotated[EndReason | None, typer.Option(help="Only sessions with this end reason.")] = None,
    mode: Annotated[Mode | None, typer.Option(help="Only sessions with this verification mode.")] = None,
    since: Since = None,
    until: Annotated[str | None, typer.Option(help="Sessions opened before, in the same format as --since.")] = None,
    model: Annotated[str | None, typer.Option(help="Only sessions with this draft model.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Only devices with this label.")] = None,
    sort: Annotated[
        str,
        typer.Option(
            metavar="|".join(_SESSION_ORDERS), help="Sort by this column; applies to the rows within the limit."
        ),
    ] = "opened",
    only_open: Annotated[bool, typer.Option("--open", help="Only running sessions.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="Maximum number, latest first.")] = 50,
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
            reason=reason,
            mode=mode,
            open=only_open,
            model=model,
            label=label or None,
            limit=limit,
        )
    found = _sorted(found, SESSIONS, order)
    more = f" (perhaps more: --limit {limit})" if len(found) == limit else ""
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
    describe(f"Session {found.session}", _session_facts(found))
    print_table("Counted", _COMPARED, _comparison(found), wide=wide)
    print_table("Segments", _SEGMENTS, segments, wide=wide, empty="No segments: the session was served by no edge.\n")
    if rounds:
        empty = "No rounds: none was judged, or they were purged.\n"
        print_table(f"Rounds: {len(judged)}", _ROUNDS, judged, wide=wide, empty=empty)
    print_table("Latest events", EVENTS, events, wide=wide, empty="No events.\n")


def stats(
    since: Since = None,
    until: Annotated[str | None, typer.Option(help="Sessions opened before, in the same format as --since.")] = None,
    by: Annotated[
        str | None, typer.Option(metavar="device|draft|edge|app|hour|day|month", help="Group by this.")
    ] = None,
    limit: AtMost = None,
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
        print_json(dict(list(found.items())[:limit]))
        return
    rows = list(found.items())[: limit or SHOWN]
    period = "" if after is None else f" since {cell(after)} UTC"
    columns: list[Column[tuple[str, Tally]]] = [
        Column(by or "", lambda row: row[0], rank=0),
        *tally_columns(lambda row: row[1]),
    ]
    title = f"Totals{period}: {shown_of(len(rows), len(found))}"
    print_table(title, columns, rows, wide=wide, empty="No sessions in this period.")


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
    for command in (devices, device, sessions, session, stats, events):
        app.command()(command)

"""`fleet admin devices|device|sessions|session|stats`: read the session log. Looking at a database creates none."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import typer

from fleet_admin.columns import in_order
from fleet_admin.reports import SESSIONS, device_columns, tally_columns
from fleet_cli import reports
from fleet_cli.admin.options import DEFAULT_DB, AsJson, Database, Since, Wide, open_log, time_of
from fleet_cli.errors import CommandError
from fleet_cli.tables import Column, cell, print_json, print_table
from schemas.policy import Mode
from schemas.reasons import EndReason

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fleet_edge.store.views import Tally

T = TypeVar("T")

_EVENTS: Final = 20
_HOURS: Final = 24
_SHOWN: Final = 50
_NO_DEVICES: Final = "No device has been seen: start one with `fleet device run` while an edge is online."
_GROUPINGS: Final = ("device", "draft", "edge", "app", "hour", "day", "month")  # of `totals`, which loads SQLAlchemy

# Each by the key of a column, with a `-` where the largest come first: the one to be looked at first is on top.
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


def register(app: typer.Typer) -> None:
    for command in (devices, device, sessions, session, stats):
        app.command()(command)


def devices(
    since: Annotated[str | None, typer.Option(help="Heard of since: 2h, 7d ago, or an ISO 8601 time (UTC).")] = None,
    silent: Annotated[bool, typer.Option("--silent", help="Those that should be there and say nothing.")] = False,
    model: Annotated[str | None, typer.Option(help="That draft with this model.")] = None,
    version: Annotated[str | None, typer.Option(help="That run this release.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="With this label; may be given several times.")] = None,
    sort: Annotated[str, typer.Option(metavar="|".join(_DEVICE_ORDERS), help="By what.")] = "name",
    limit: Annotated[
        int | None, typer.Option(min=1, help=f"At most this many; by default {_SHOWN} in a table and all in JSON.")
    ] = None,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
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
    rows = found[: limit or _SHOWN]
    title = f"Devices: {_of(len(rows), len(found))}"
    empty = "No device is like that." if silent or after or model or version or label else _NO_DEVICES
    print_table(title, columns, rows, sort=order.removeprefix("-"), wide=wide, empty=empty)


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
    model: Annotated[str | None, typer.Option(help="Drafted with this model.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Of devices with this label.")] = None,
    sort: Annotated[
        str, typer.Option(metavar="|".join(_SESSION_ORDERS), help="By what, of those that are found.")
    ] = "opened",
    only_open: Annotated[bool, typer.Option("--open", help="Those that have not ended.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many, the latest first.")] = 50,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
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
    if as_json:
        print_json(found)
        return
    more = f" (perhaps more: --limit {limit})" if len(found) == limit else ""
    title = f"Sessions: {len(found)}{more}"
    print_table(title, SESSIONS, found, sort=order.removeprefix("-"), wide=wide, empty="No session is like that.")


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
    limit: Annotated[
        int | None, typer.Option(min=1, help=f"At most this many; by default {_SHOWN} in a table and all in JSON.")
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
        print_json(dict(list(found.items())[:limit]))
        return
    rows = list(found.items())[: limit or _SHOWN]
    period = "" if after is None else f" since {cell(after)} UTC"
    columns: list[Column[tuple[str, Tally]]] = [
        Column(by or "", lambda row: row[0], rank=0),
        *tally_columns(lambda row: row[1]),
    ]
    print_table(
        f"Totals{period}: {_of(len(rows), len(found))}",
        columns,
        rows,
        wide=wide,
        empty="No edge has served a session in that time.",
    )


def _order(option: str, word: str, orders: "Mapping[str, str]") -> str:
    if word not in orders:
        raise CommandError(f"{option} takes {', '.join(orders)}, not {cell(word)!r}.")
    return orders[word]


def _sorted(rows: "Sequence[T]", columns: "Sequence[Column[T]]", order: str) -> "list[T]":
    column = next(each for each in columns if each.key == order.removeprefix("-"))
    return in_order(rows, column, falling=order.startswith("-"))


def _of(number: int, total: int) -> str:
    return f"{number:,}" if number == total else f"{number:,} of {total:,} (all: --limit {total})"

"""`fleet admin devices|device|sessions|session|stats`: read the session log. Looking at a database creates none."""

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Final

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

_LAST: Final = datetime.max.replace(tzinfo=UTC)


def _least(value: float | None) -> float:
    return math.inf if value is None else value


# The one to be looked at first comes first.
_DEVICE_ORDERS: Final[dict[str, Callable[[Any], Any]]] = {
    "name": lambda view: view.device,
    "seen": lambda view: view.seen_at,
    "sessions": lambda view: -view.sessions,
    "tokens": lambda view: -view.tokens_today,
    "acceptance": lambda view: _least(view.acceptance_24h),
    "round-trip": lambda view: -(view.round_trip_ms or 0.0),
    "draft-time": lambda view: -(view.draft_ms_per_token or 0.0),
    "certificate": lambda view: view.certificate_until or _LAST,
}
_SESSION_ORDERS: Final[dict[str, Callable[[Any], Any]]] = {
    "opened": lambda view: -view.opened_at.timestamp(),
    "tokens": lambda view: -view.counted.tokens,
    "speed": lambda view: _least(view.counted.tokens_per_s),
    "acceptance": lambda view: _least(view.counted.acceptance),
    "first-token": lambda view: -(view.first_token_ms or 0.0),
    "gap": lambda view: -(view.gap_p95_ms or 0.0),
}


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (devices, device, sessions, session, stats):
        app.command()(command)


def devices(
    since: Annotated[str | None, typer.Option(help="Heard of since: 2h, 7d ago, or an ISO 8601 time (UTC).")] = None,
    silent: Annotated[bool, typer.Option("--silent", help="Those that should be there and say nothing.")] = False,
    model: Annotated[str | None, typer.Option(help="That draft with this model.")] = None,
    version: Annotated[str | None, typer.Option(help="That run this release.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="With this label; may be given several times.")] = None,
    sort: Annotated[str, typer.Option(metavar="|".join(_DEVICE_ORDERS), help="By what.")] = "name",
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """List the devices."""
    if sort not in _DEVICE_ORDERS:
        raise CommandError(f"--sort takes {', '.join(_DEVICE_ORDERS)}, not {cell(sort)!r}.")
    after = time_of("--since", since)
    with open_log(db) as log:
        labels = log.labels() if label else {}
        found = [
            view
            for view in log.devices()
            if (after is None or view.seen_at >= after)
            and (not silent or view.silent_since is not None)
            and (model is None or view.draft_model == model)
            and (version is None or view.software == version)
            and (not label or set(labels.get(view.device, ())) & set(label))
        ]
    found.sort(key=_DEVICE_ORDERS[sort])
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
    """List sessions, the latest first."""
    if sort not in _SESSION_ORDERS:
        raise CommandError(f"--sort takes {', '.join(_SESSION_ORDERS)}, not {cell(sort)!r}.")
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
    found.sort(key=_SESSION_ORDERS[sort])
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

"""`fleet admin top|compare`: which devices do most of something, and two periods beside each other."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fleet_admin.columns import ABSENT, Kind, shown
from fleet_cli.admin.options import DEFAULT_DB, AsJson, Database, Wide, open_log, time_of
from fleet_cli.admin.periods import Period, equal_parts, read_period
from fleet_cli.tables import Column, cell, print_json, print_table

if TYPE_CHECKING:
    from fleet_edge.session_log import SessionLog
    from fleet_edge.store.views import Tally

_WATCH_S: Final = 5.0

_LEAST: Final = 100
"""Tokens, or tested draft tokens, below which a speed or an acceptance rate is chance."""


class Rank(StrEnum):
    """By what devices are ranked."""

    TOKENS = "tokens"
    SESSIONS = "sessions"
    ROUNDS = "rounds"
    BYTES = "bytes"
    SLOWEST = "slowest"  # tokens a second that a session gets
    ACCEPTANCE = "acceptance"  # the lowest first
    REFUSALS = "refusals"
    ERRORS = "errors"
    RESUMES = "resumes"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ranked:
    """One device, and what it did in the period."""

    device: str
    sessions: int
    tokens: int
    rounds: int
    bytes: int
    tokens_per_s: float | None
    tested: int
    acceptance: float | None
    resumes: int
    refusals: int
    errors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compared:
    """One figure of two periods; `kind` says how it is shown, as in `fleet_admin.columns`."""

    figure: str
    kind: Kind
    before: float | None
    after: float | None

    @property
    def change_percent(self) -> float | None:
        """By how much the second is more than the first."""
        if self.before is None or self.after is None or not self.before:
            return None
        return 100.0 * (self.after - self.before) / self.before


def register(app: typer.Typer) -> None:
    for command in (top, compare):
        app.command()(command)


def top(
    by: Annotated[
        Rank,
        typer.Option(
            help=f"What is most; slowest and acceptance: the lowest, of devices with at least {_LEAST} tokens."
        ),
    ] = Rank.TOKENS,
    since: Annotated[str, typer.Option(help="Since: 90s, 30m, 2h, 7d ago, or an ISO 8601 time (UTC).")] = "1h",
    edge: Annotated[str | None, typer.Option(help="At this edge.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Of devices with this label.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many.")] = 20,
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until Ctrl-C.")] = False,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Rank the devices by what they did, got or suffered within the last hour, or since any time."""
    with open_log(db) as log:
        while True:
            after = time_of("--since", since) or datetime.now(UTC)
            found = _ranked(log, by, since=after, edge=edge, label=label)
            if as_json:
                print_json(found[:limit])
            else:
                if watch and sys.stdout.isatty():
                    print("\x1b[2J\x1b[H", end="")
                _show_ranked(found[:limit], by, since=after, wide=wide)
            if not watch:
                return
            time.sleep(_WATCH_S)


def compare(
    first: Annotated[str, typer.Argument(metavar="PERIOD")],
    second: Annotated[str, typer.Argument(metavar="PERIOD")],
    edge: Annotated[str | None, typer.Option(help="At this edge.")] = None,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Set two periods beside each other: today, last-week, 2026-11, 2026-11-03, 7d, FROM..TO; 14d..7d and 7d."""
    now = datetime.now(UTC)
    named = read_period(first, now=now), read_period(second, now=now)
    periods = equal_parts(*named)
    with open_log(db) as log:
        before, after = (_figures(log, period, edge) for period in periods)
    found = [
        _Compared(figure=name, kind=kind, before=value, after=after[name][0]) for name, (value, kind) in before.items()
    ]
    if as_json:
        print_json(found)
        return
    columns: list[Column[_Compared]] = [
        Column("", lambda row: row.figure, rank=0),
        Column(_heading(periods[0]), lambda row: shown(row.before, row.kind), "number", key="before", rank=0),
        Column(_heading(periods[1]), lambda row: shown(row.after, row.kind), "number", key="after", rank=0),
        Column("change", lambda row: _percent(row.change_percent), "number", rank=0),
    ]
    title = "Periods compared"
    if periods != named:
        cut, other = named if periods[0] != named[0] else named[::-1]
        title += f": of {cell(cut.name)} only as much as there is of {cell(other.name)}"
    print_table(title, columns, found, wide=wide)


def _ranked(
    log: "SessionLog", by: Rank, *, since: datetime | None, edge: str | None, label: list[str] | None
) -> list[_Ranked]:
    counted: dict[str, Tally] = {}
    for view in log.usage(since=since, by=("device",), edge=edge):
        if view.device is not None:
            counted[view.device] = view.counted
    refusals = _times(log, since=since, edge=edge, kind="refused")
    errors = _times(log, since=since, edge=edge, severity="error")
    names = {*counted, *refusals, *errors}
    if label:
        names &= {name for name, words in log.labels().items() if set(words) & set(label)}
    rows = [_row(name, counted.get(name), refusals=refusals.get(name, 0), errors=errors.get(name, 0)) for name in names]
    return sorted((row for row in rows if _counts(row, by)), key=_order(by))


def _counts(row: _Ranked, by: Rank) -> bool:
    """Return whether a device has written enough to be ranked."""
    number = {Rank.SLOWEST: row.tokens, Rank.ACCEPTANCE: row.tested}.get(by)
    return number is None or number >= _LEAST


def _times(
    log: "SessionLog",
    *,
    since: datetime | None,
    edge: str | None,
    kind: str | None = None,
    severity: str | None = None,
) -> dict[str, int]:
    found = log.event_counts(by=("device",), since=since, edge=edge, kind=kind, severity=severity, limit=100_000)
    return {count.device: count.times for count in found if count.device is not None}


def _row(name: str, counted: "Tally | None", *, refusals: int, errors: int) -> _Ranked:
    return _Ranked(
        device=name,
        sessions=counted.sessions if counted else 0,
        tokens=counted.tokens if counted else 0,
        rounds=counted.rounds if counted else 0,
        bytes=counted.uplink_bytes + counted.downlink_bytes if counted else 0,
        tokens_per_s=counted.tokens_per_s if counted else None,
        tested=counted.tested if counted else 0,
        acceptance=counted.acceptance if counted else None,
        resumes=counted.segments - counted.sessions if counted else 0,
        refusals=refusals,
        errors=errors,
    )


def _order(by: Rank) -> Callable[[_Ranked], tuple[float, str]]:
    def least(value: float | None, device: str) -> tuple[float, str]:
        return (float("inf") if value is None else value, device)

    match by:
        case Rank.SLOWEST:
            return lambda row: least(row.tokens_per_s, row.device)
        case Rank.ACCEPTANCE:
            return lambda row: least(row.acceptance, row.device)
        case _:
            return lambda row: (-getattr(row, by.value), row.device)


def _show_ranked(found: list[_Ranked], by: Rank, *, since: datetime, wide: bool) -> None:
    columns: list[Column[_Ranked]] = [
        Column("device", lambda row: row.device, rank=0),
        Column("tokens", lambda row: row.tokens, "count"),
        Column("sessions", lambda row: row.sessions, "count"),
        Column("tokens/s per session", lambda row: row.tokens_per_s, "figure", key="slowest"),
        Column("acceptance", lambda row: row.acceptance, "percent"),
        Column("bytes", lambda row: row.bytes, "bytes"),
        Column("refusals", lambda row: row.refusals, "count"),
        Column("errors", lambda row: row.errors, "count"),
        Column("rounds", lambda row: row.rounds, "count", rank=2),
        Column("resumes", lambda row: row.resumes, "count", rank=2),
    ]
    least = {Rank.SLOWEST: "tokens", Rank.ACCEPTANCE: "tested draft tokens"}.get(by)
    when = f"since {since:%Y-%m-%d %H:%M} UTC"
    title = f"Devices by {by.value} {when}" + (f", with at least {_LEAST} {least}" if least else "")
    empty = f"No device has {f'at least {_LEAST} {least}' if least else 'done anything'} {when}."
    print_table(title, columns, found, sort=by.value, wide=wide, empty=empty)


def _figures(log: "SessionLog", period: Period, edge: str | None) -> "Mapping[str, tuple[float | None, Kind]]":
    """Return what is compared, by name, and how it is shown."""
    limits: dict[str, Any] = {"since": period.since, "until": period.until}
    [view] = log.usage(**limits, edge=edge)
    counted, latencies = view.counted, log.latencies(**limits, edge=edge)
    first, gap = latencies["first_token"], latencies["gap"]
    figures: dict[str, tuple[float | None, Kind]] = {
        "hours": (period.hours, "figure"),
        "sessions": (counted.sessions, "count"),
        "tokens": (counted.tokens, "count"),
        "tokens per hour": (counted.tokens / period.hours, "count"),
        "tokens/s per session": (counted.tokens_per_s, "figure"),
        "acceptance": (counted.acceptance, "percent"),
        "first token p50": (first.quantile(0.5), "ms"),
        "first token p95": (first.quantile(0.95), "ms"),
        "token gap p95": (gap.quantile(0.95), "ms"),
        "queue per round": (counted.queue_ms_per_round, "ms"),
        "step per round": (counted.compute_ms_per_round, "ms"),
        "up": (counted.uplink_bytes, "bytes"),
        "down": (counted.downlink_bytes, "bytes"),
        "resumes": (counted.segments - counted.sessions, "count"),
    }
    if edge is None:
        figures |= {f"sessions {reason}": (number, "count") for reason, number in log.ends(**limits).items()}
    asked: dict[str, dict[str, Any]] = {"refusals": {"kind": "refused"}, "errors": {"severity": "error"}}
    for name, chosen in asked.items():
        counts = log.event_counts(by=(), **limits, edge=edge, **chosen)
        figures[name] = (sum(count.times for count in counts), "count")
    return figures


def _heading(period: Period) -> str:
    return f"{cell(period.name)} {period.since:%m-%d %H:%M} to {period.until:%m-%d %H:%M}"


def _percent(change: float | None) -> str:
    return ABSENT if change is None else f"{change:+,.1f} %"

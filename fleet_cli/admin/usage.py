"""Commands of `fleet admin` that add up and compare: usage, trends, rankings, periods."""

import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from fleet_admin.columns import ABSENT, Kind, in_order, shown, write_csv
from fleet_admin.reports import Point, model_name, start_column, tally_columns, trend_columns
from fleet_cli.errors import CommandError
from fleet_cli.options import DEFAULT_DB, AsJson, Database, Wide, load_profile, open_log, time_of
from fleet_cli.tables import Column, cell, print_json, print_table
from fleet_common.validation import read_time

if TYPE_CHECKING:
    from fleet_admin.settings import PriceList
    from fleet_edge.session_log import SessionLog
    from fleet_edge.store.totals import Distribution
    from fleet_edge.store.views import Tally, UsageView

_DAY: Final = timedelta(days=1)
_MONTH: Final = re.compile(r"(\d{4})-(\d{2})", re.ASCII)
_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_HELP: Final = "today, yesterday, this-week, last-week, this-month, last-month, 2026-11, 2026-11-03, 7d, or FROM..TO"


@dataclass(frozen=True, slots=True)
class UsagePeriod:
    """A period (UTC); `until` is exclusive."""

    name: str
    since: datetime
    until: datetime  # now, if the period has not ended
    goes_on: bool = False  # whether it ends later

    @property
    def hours(self) -> float:
        return (self.until - self.since) / timedelta(hours=1)


def read_period(text: str, *, now: datetime) -> UsagePeriod:
    """Return a period by its name; none ends after `now`.

    The parts of `FROM..TO` are ages or ISO 8601 times; TO may be `now`. Raises `CommandError` if the name is invalid.
    """
    since, end = _limits(text.strip(), now.astimezone(UTC))
    until = min(end, now)
    if since >= until:
        raise CommandError(f"The period {cell(text)!r} is empty or has not begun; take {_HELP}.")
    return UsagePeriod(text.strip(), since, until, goes_on=end > now)


def equal_parts(one: UsagePeriod, other: UsagePeriod) -> tuple[UsagePeriod, UsagePeriod]:
    """Cut a complete period to the length of a running one, so that both can be compared."""
    if one.goes_on and not other.goes_on:
        return one, _cut(other, one.until - one.since)
    if other.goes_on and not one.goes_on:
        return _cut(one, other.until - other.since), other
    return one, other


def _cut(period: UsagePeriod, length: timedelta) -> UsagePeriod:
    return replace(period, until=min(period.until, period.since + length))


def _limits(text: str, now: datetime) -> tuple[datetime, datetime]:
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    week, month = today - today.weekday() * _DAY, today.replace(day=1)
    named = {
        "today": (today, today + _DAY),
        "yesterday": (today - _DAY, today),
        "this-week": (week, week + 7 * _DAY),
        "last-week": (week - 7 * _DAY, week),
        "this-month": (month, (month + 31 * _DAY).replace(day=1)),
        "last-month": ((month - _DAY).replace(day=1), month),
    }
    if text in named:
        return named[text]
    try:
        if found := _MONTH.fullmatch(text):
            begin = datetime(int(found[1]), int(found[2]), 1, tzinfo=UTC)
            return begin, (begin + 31 * _DAY).replace(day=1)
        if _DATE.fullmatch(text):
            begin = datetime.fromisoformat(text).replace(tzinfo=UTC)
            return begin, begin + _DAY
        begin_text, dots, end_text = text.partition("..")
        end = now if not dots or end_text in {"", "now"} else read_time(end_text, now=now)
        return read_time(begin_text, now=now), end
    except (ValueError, OverflowError):
        raise CommandError(f"{cell(text)!r} is no period: take {_HELP}.") from None


AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV instead of tables.")]

_DIMENSIONS: Final = ("app", "device", "edge", "model", "label")
_GRAINS: Final = ("hour", "day", "month")
_NOTHING: Final = "No sessions in this period."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Usage:
    start: datetime | None
    names: tuple[str | None, ...]
    counted: "Tally"


T = TypeVar("T")


def usage(
    by: Annotated[str, typer.Option(metavar="app,device,edge,model,label,hour|day|month")] = "app",
    since: Annotated[str | None, typer.Option(help="Begin: 90s, 30m, 2h or 7d ago, or an ISO 8601 time (UTC).")] = None,
    until: Annotated[str | None, typer.Option(help="End, in the same format as --since.")] = None,
    device: Annotated[list[str] | None, typer.Option(help="Only this device; repeatable.")] = None,
    edge: Annotated[str | None, typer.Option(help="Only this edge.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Only devices with this label.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="Maximum number of rows.")] = 1000,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    wide: Wide = False,
) -> None:
    """Add up tokens, bytes and time by application, device, edge, model or label, also over time."""
    names, grain = _groups(by)
    after, before, prices = time_of("--since", since), time_of("--until", until), load_profile().prices
    with open_log(db) as log:
        chosen = _labelled(log, device, label)
        found = [] if chosen == [] else _usage(log, names, grain, since=after, until=before, device=chosen, edge=edge)
    found = found[:limit]
    columns: list[Column[_Usage]] = [
        *([start_column(grain, lambda row: row.start)] if grain else ()),
        *(Column(name, lambda row, place=place: row.names[place], rank=0) for place, name in enumerate(names)),  # type: ignore[misc]
        *tally_columns(lambda row: row.counted, prices),
    ]
    if as_json:
        print_json([_as_json(row, names, grain, prices) for row in found])
    elif as_csv:
        _write_csv(columns, found)
    else:
        more = f" (perhaps more: --limit {limit})" if len(found) == limit else ""
        print_table(f"Usage{more}", columns, found, sort="tokens", wide=wide, empty=_NOTHING)


def _as_json(row: _Usage, names: Sequence[str], grain: str | None, prices: "PriceList") -> dict[str, object]:
    return {
        **({grain: row.start} if grain else {}),
        **dict(zip(names, row.names, strict=True)),
        **({"cost": prices.cost(row.counted)} if prices else {}),
        "counted": row.counted,
    }


def _write_csv(columns: Sequence[Column[T]], rows: Iterable[T]) -> None:
    headings = [column.key for column in columns]
    write_csv(sys.stdout, headings, ([column.value(row) for column in columns] for row in rows))


def trend(
    grain: Annotated[
        str, typer.Option(metavar="hour|day|month", help="Length of the time that a row covers.")
    ] = "hour",
    since: Annotated[str, typer.Option(help="Begin: 90s, 30m, 2h or 7d ago, or an ISO 8601 time (UTC).")] = "24h",
    until: Annotated[str | None, typer.Option(help="End, in the same format as --since.")] = None,
    device: Annotated[list[str] | None, typer.Option(help="Only this device; repeatable.")] = None,
    edge: Annotated[str | None, typer.Option(help="Only this edge.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Only devices with this label.")] = None,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    wide: Wide = False,
) -> None:
    """Show tokens, latencies, acceptance, speed and bytes by hour, day or month."""
    if grain not in _GRAINS:
        raise CommandError(f"--grain takes hour, day or month, not {cell(grain)!r}.")
    after, before = time_of("--since", since), time_of("--until", until)
    with open_log(db) as log:
        chosen = _labelled(log, device, label)
        views = [] if chosen == [] else log.usage(since=after, until=before, grain=grain, device=chosen, edge=edge)
        # Latencies are not known by device.
        known = {} if chosen is not None else log.latencies_over_time(grain, since=after, until=before, edge=edge)
    points = [_point(view.start, view.counted, known.get(view.start, {})) for view in views if view.start is not None]
    if as_json:
        print_json(points)
    elif as_csv:
        _write_csv(trend_columns(grain), points)
    else:
        print_table(f"By {grain}", trend_columns(grain), points, wide=wide, empty=_NOTHING)


def _groups(text: str) -> tuple[list[str], str | None]:
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    names = [word for word in words if word not in _GRAINS]
    grains = [word for word in words if word in _GRAINS]
    unknown = [name for name in names if name not in _DIMENSIONS]
    if unknown or len(grains) > 1 or not words:
        wrong = unknown[0] if unknown else ",".join(grains)
        raise CommandError(f"--by takes {', '.join(_DIMENSIONS)} and one of hour, day, month, not {cell(wrong)!r}.")
    return names, grains[0] if grains else None


def _labelled(log: "SessionLog", devices: list[str] | None, labels: list[str] | None) -> list[str] | None:
    """Return the selected devices; None for all."""
    if not labels:
        return devices or None
    found = sorted(name for name, words in log.labels().items() if set(words) & set(labels))
    return [name for name in found if not devices or name in devices]


def _usage(
    log: "SessionLog",
    names: Sequence[str],
    grain: str | None,
    *,
    since: datetime | None,
    until: datetime | None,
    device: list[str] | None,
    edge: str | None,
) -> list[_Usage]:
    """Query and add up; a device with several labels counts for each of them."""
    dimensions: dict[str, tuple[str, ...]] = {
        "app": ("app",),
        "device": ("device",),
        "edge": ("edge",),
        "label": ("device",),
    }
    dimensions |= {"model": ("draft_model", "quantization")}
    by = list(dict.fromkeys(each for name in names for each in dimensions[name]))
    views = log.usage(since=since, until=until, by=by, grain=grain, device=device, edge=edge)
    labels = log.labels() if "label" in names else {}
    added: dict[tuple[datetime | None, tuple[str | None, ...]], Tally] = {}
    for view in views:
        for label in labels.get(view.device or "", (None,)):
            key = view.start, tuple(_name(view, name, label) for name in names)
            known = added.get(key)
            added[key] = view.counted if known is None else _sum(known, view.counted)
    found = [_Usage(start=start, names=key, counted=counted) for (start, key), counted in added.items()]
    return sorted(found, key=lambda row: (row.start.timestamp() if row.start else 0.0, -row.counted.tokens))


def _name(view: "UsageView", name: str, label: str | None) -> str | None:
    match name:
        case "model":
            return model_name(view.draft_model, view.quantization)
        case "label":
            return label
        case _:
            found: str | None = getattr(view, name)
            return found


def _sum(one: "Tally", other: "Tally") -> "Tally":
    return replace(one, **{each.name: getattr(one, each.name) + getattr(other, each.name) for each in fields(one)})


def _point(start: datetime, counted: "Tally", latencies: "Mapping[str, Distribution]") -> Point:
    first, gap = latencies.get("first_token"), latencies.get("gap")
    return Point(
        start=start,
        counted=counted,
        first_token_p50_ms=None if first is None else first.quantile(0.5),
        first_token_p95_ms=None if first is None else first.quantile(0.95),
        gap_p95_ms=None if gap is None else gap.quantile(0.95),
    )


_WATCH_S: Final = 5.0

_LEAST: Final = 100
"""Fewest tokens, or tested draft tokens, for a meaningful speed or acceptance rate."""


class Rank(StrEnum):
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


_NEEDED: Final = {Rank.SLOWEST: "tokens", Rank.ACCEPTANCE: "tested"}
"""Of what a device needs enough to be ranked by how low a figure is."""

_RANKED: Final[list[Column[_Ranked]]] = [
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compared:
    """A figure of two periods; `kind` is its format, as in `fleet_admin.columns`."""

    figure: str
    kind: Kind
    before: float | None
    after: float | None

    @property
    def change_percent(self) -> float | None:
        if self.before is None or self.after is None or not self.before:
            return None
        return 100.0 * (self.after - self.before) / self.before


def top(
    by: Annotated[
        Rank,
        typer.Option(
            help=f"Figure to rank by; slowest and acceptance list the lowest, of devices with at least {_LEAST} tokens."
        ),
    ] = Rank.TOKENS,
    since: Annotated[str, typer.Option(help="Begin: 90s, 30m, 2h or 7d ago, or an ISO 8601 time (UTC).")] = "1h",
    edge: Annotated[str | None, typer.Option(help="Only this edge.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Only devices with this label.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Maximum number.")] = 20,
    watch: Annotated[bool, typer.Option("--watch", help="Repeat until Ctrl-C.")] = False,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Rank the devices by a figure of the last hour, or of any period."""
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
    edge: Annotated[str | None, typer.Option(help="Only this edge.")] = None,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    wide: Wide = False,
) -> None:
    """Compare two periods: today, last-week, 2026-11, 2026-11-03, 7d, FROM..TO; 14d..7d and 7d."""
    now = datetime.now(UTC)
    named = read_period(first, now=now), read_period(second, now=now)
    periods = equal_parts(*named)
    with open_log(db) as log:
        before, after = (_figures(log, period, edge) for period in periods)
    found = [
        _Compared(figure=name, kind=kind, before=value, after=after[name][0]) for name, (value, kind) in before.items()
    ]
    columns: list[Column[_Compared]] = [
        Column("", lambda row: row.figure, rank=0),
        Column(_heading(periods[0]), lambda row: shown(row.before, row.kind), "number", key="before", rank=0),
        Column(_heading(periods[1]), lambda row: shown(row.after, row.kind), "number", key="after", rank=0),
        Column("change", lambda row: _percent(row.change_percent), "number", rank=0),
    ]
    title = "Periods compared"
    if periods != named:
        cut, other = named if periods[0] != named[0] else named[::-1]
        title += f": {cell(cut.name)} cut to the length of {cell(other.name)}"
    print_table(title, columns, found, as_json=as_json, wide=wide)


def _ranked(
    log: "SessionLog", by: Rank, *, since: datetime | None, edge: str | None, label: list[str] | None
) -> list[_Ranked]:
    from fleet_edge.store.views import Tally

    found = log.usage(since=since, by=("device",), edge=edge)
    counted = {view.device: view.counted for view in found if view.device is not None}
    refusals = _times(log, since=since, edge=edge, kind="refused")
    errors = _times(log, since=since, edge=edge, severity="error")
    names = {*counted, *refusals, *errors}
    if label:
        names &= {name for name, words in log.labels().items() if set(words) & set(label)}
    nothing = Tally(sessions=0, segments=0, duration_ms=0.0)
    rows = [
        _Ranked(
            device=name,
            sessions=sums.sessions,
            tokens=sums.tokens,
            rounds=sums.rounds,
            bytes=sums.uplink_bytes + sums.downlink_bytes,
            tokens_per_s=sums.tokens_per_s,
            tested=sums.tested,
            acceptance=sums.acceptance,
            resumes=sums.segments - sums.sessions,
            refusals=refusals.get(name, 0),
            errors=errors.get(name, 0),
        )
        for name in sorted(names)
        for sums in (counted.get(name, nothing),)
    ]
    needed = _NEEDED.get(by)
    enough = [row for row in rows if needed is None or getattr(row, needed) >= _LEAST]
    return in_order(enough, next(each for each in _RANKED if each.key == by.value), falling=needed is None)


def _times(
    log: "SessionLog", *, since: datetime | None, edge: str | None, kind: str | None = None, severity: str | None = None
) -> dict[str, int]:
    found = log.event_counts(by=("device",), since=since, edge=edge, kind=kind, severity=severity, limit=100_000)
    return {count.device: count.times for count in found if count.device is not None}


def _show_ranked(found: list[_Ranked], by: Rank, *, since: datetime, wide: bool) -> None:
    least = {Rank.SLOWEST: "tokens", Rank.ACCEPTANCE: "tested draft tokens"}.get(by)
    when = f"since {since:%Y-%m-%d %H:%M} UTC"
    title = f"Devices by {by.value} {when}" + (f", with at least {_LEAST} {least}" if least else "")
    empty = f"No device has {f'at least {_LEAST} {least}' if least else 'done anything'} {when}."
    print_table(title, _RANKED, found, sort=by.value, wide=wide, empty=empty)


def _figures(log: "SessionLog", period: UsagePeriod, edge: str | None) -> "Mapping[str, tuple[float | None, Kind]]":
    """Return value and format of each figure, by name."""
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


def _heading(period: UsagePeriod) -> str:
    return f"{cell(period.name)} {period.since:%m-%d %H:%M} to {period.until:%m-%d %H:%M}"


def _percent(change: float | None) -> str:
    return ABSENT if change is None else f"{change:+,.1f} %"


def register(app: typer.Typer) -> None:
    for command in (usage, trend, top, compare):
        app.command()(command)

"""Command `fleet admin usage`: sums by dimension and time, rankings, and two periods compared."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fleet_admin.columns import ABSENT, Kind, in_order, shown, write_csv
from fleet_admin.reports import start_column, tally_columns
from fleet_cli.errors import CommandError
from fleet_cli.options import DEFAULT_DB, AsJson, Database, Wide, open_log
from fleet_cli.tables import Column, cell, print_json, print_table
from fleet_common.validation import read_time
from schemas.names import model_name

if TYPE_CHECKING:
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


_DIMENSIONS: Final = ("app", "device", "edge", "model", "target", "label")
_GRAINS: Final = ("hour", "day", "month")
_NOTHING: Final = "No sessions in this period."
_LEAST: Final = 100
"""Fewest tokens, or verified draft tokens, for a meaningful speed or acceptance rate."""

_LOWEST: Final = {"speed": "tokens", "acceptance": "verified draft tokens"}
"""Figures of which the lowest comes first, and what a row needs enough of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Usage:
    """Sums of a combination of names and a time; latencies by time alone, refusals and errors by device alone."""

    start: datetime | None
    names: tuple[str | None, ...]
    counted: "Tally"
    latencies: "Mapping[str, Distribution]" = field(default_factory=dict)
    refusals: int = 0
    errors: int = 0

    def quantile(self, measure: str, share: float) -> float | None:
        return self.latencies[measure].quantile(share) if measure in self.latencies else None


def usage(
    by: Annotated[
        str | None,
        typer.Option(metavar=",".join(_DIMENSIONS), help="Rows for each of these; by default app, or the time."),
    ] = None,
    per: Annotated[str | None, typer.Option(metavar="hour|day|month", help="Rows for each hour, day or month.")] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            help="Column to sort by: tokens, sessions, bytes, resumes, refusals, … the highest first; speed and "
            f"acceptance the lowest first, with at least {_LEAST} tokens."
        ),
    ] = None,
    between: Annotated[str | None, typer.Option(metavar="PERIOD,PERIOD", help=f"Compare two periods: {_HELP}.")] = None,
    since: Annotated[
        str | None, typer.Option(help="Begin: 90s, 30m, 2h or 7d ago, an ISO 8601 time (UTC), or last-week, 2026-11 …")
    ] = None,
    until: Annotated[str | None, typer.Option(help="End, like --since; of a period its begin.")] = None,
    device: Annotated[list[str] | None, typer.Option(help="Only this device; repeatable.")] = None,
    edge: Annotated[str | None, typer.Option(help="Only this edge.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Only devices with this label.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="Maximum number of rows.")] = 1000,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of tables.")] = False,
    wide: Wide = False,
) -> None:
    """Add up tokens, latencies, acceptance and bytes by application, device, edge, model, label or time."""
    if between is not None:
        if by or per or sort or since or until or device or label:
            raise CommandError("--between goes with --edge alone: it compares sums of all devices.")
        _compare(between, edge, db, as_json=as_json, wide=wide)
        return
    names = _names("app" if by is None and per is None else by or "")
    if per not in {None, *_GRAINS}:
        raise CommandError(f"--per takes hour, day or month, not {cell(per)!r}.")
    now = datetime.now(UTC)
    period: dict[str, Any] = {
        "since": None if since is None else _limits(since.strip(), now)[0],
        "until": None if until is None else _limits(until.strip(), now)[0],
    }
    with open_log(db) as log:
        chosen = _labelled(log, device, label)
        found = [] if chosen == [] else _usage(log, names, per, **period, device=chosen, edge=edge)
        if names == ["device"] and per is None:
            found = _with_events(log, found, **period, edge=edge, devices=chosen)
        elif not names and per and chosen is None:  # latencies are not known by device
            known = log.latencies_over_time(per, **period, edge=edge)
            found = [replace(row, latencies=known.get(row.start, {})) for row in found if row.start is not None]
    columns = _columns(names, per)
    found, empty = (found, _NOTHING) if sort is None else _sorted(found, columns, sort)
    found = found[:limit]
    if as_json:
        print_json([_as_json(row, names, per) for row in found])
    elif as_csv:
        headings = [column.key for column in columns]
        write_csv(sys.stdout, headings, ([column.value(row) for column in columns] for row in found))
    else:
        more = f" (perhaps more: --limit {limit})" if len(found) == limit else ""
        print_table(f"Usage{more}", columns, found, sort=sort or "tokens", wide=wide, empty=empty)


def _sorted(rows: Sequence[_Usage], columns: Sequence[Column[_Usage]], sort: str) -> tuple[list[_Usage], str]:
    """Return the rows in order, and what to say if there are none."""
    keys = {column.key: column for column in columns}
    if sort not in keys:
        raise CommandError(f"--sort takes {', '.join(keys)}, not {cell(sort)!r}.")
    if sort not in _LOWEST:
        return in_order(rows, keys[sort], falling=True), _NOTHING
    enough = [row for row in rows if (row.counted.tested if sort == "acceptance" else row.counted.tokens) >= _LEAST]
    return in_order(enough, keys[sort], falling=False), f"No row has at least {_LEAST} {_LOWEST[sort]} in this period."


def _columns(names: Sequence[str], per: str | None) -> list[Column[_Usage]]:
    counted: list[Column[_Usage]] = tally_columns(lambda row: row.counted)
    columns: list[Column[_Usage]] = [
        *([start_column(per, lambda row: row.start)] if per else ()),
        *(Column(name, lambda row, place=place: row.names[place], rank=0) for place, name in enumerate(names)),  # type: ignore[misc]
        counted[0],
    ]
    if not names:
        columns += [
            Column("first token p95", lambda row: row.quantile("first_token", 0.95), "ms", key="first_token", rank=0),
            Column("gap p95", lambda row: row.quantile("gap", 0.95), "ms", key="gap", rank=1),
        ]
    columns += counted[1:]
    columns.append(Column("bytes", lambda row: row.counted.uplink_bytes + row.counted.downlink_bytes, "bytes", rank=2))
    if list(names) == ["device"] and per is None:
        columns += [
            Column("refusals", lambda row: row.refusals, "count", rank=1),
            Column("errors", lambda row: row.errors, "count", rank=1),
        ]
    return columns


def _as_json(row: _Usage, names: Sequence[str], grain: str | None) -> dict[str, object]:
    return {
        **({grain: row.start} if grain else {}),
        **dict(zip(names, row.names, strict=True)),
        "counted": row.counted,
        **(
            {}
            if names
            else {"first_token_p95_ms": row.quantile("first_token", 0.95), "gap_p95_ms": row.quantile("gap", 0.95)}
        ),
        **({"refusals": row.refusals, "errors": row.errors} if list(names) == ["device"] and not grain else {}),
    }


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if unknown := [name for name in names if name not in _DIMENSIONS]:
        raise CommandError(f"--by takes {', '.join(_DIMENSIONS)}, not {cell(unknown[0])!r}; for times see --per.")
    return names


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
        "target": ("target_id",),
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
        case "target":
            return view.target_id
        case _:
            found: str | None = getattr(view, name)
            return found


def _sum(one: "Tally", other: "Tally") -> "Tally":
    return replace(one, **{each.name: getattr(one, each.name) + getattr(other, each.name) for each in fields(one)})


def _with_events(
    log: "SessionLog",
    found: Sequence[_Usage],
    *,
    since: datetime | None,
    until: datetime | None,
    edge: str | None,
    devices: list[str] | None,
) -> list[_Usage]:
    """Add what devices were refused and what failed, also of those without a session."""
    from fleet_edge.store.views import Tally

    refusals = _times(log, since=since, until=until, edge=edge, kind="refused")
    errors = _times(log, since=since, until=until, edge=edge, severity="error")
    rows = {row.names[0]: row for row in found}
    others = sorted({*refusals, *errors} - rows.keys())
    nothing = Tally(sessions=0, segments=0, duration_ms=0.0)
    rows |= {name: _Usage(start=None, names=(name,), counted=nothing) for name in others}
    return [
        replace(row, refusals=refusals.get(name or "", 0), errors=errors.get(name or "", 0))
        for name, row in rows.items()
        if devices is None or name in devices
    ]


def _times(log: "SessionLog", **chosen: Any) -> dict[str, int]:  # noqa: ANN401 - as `SessionLog.event_counts`
    found = log.event_counts(by=("device",), limit=100_000, **chosen)
    return {count.device: count.times for count in found if count.device is not None}


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


def _compare(text: str, edge: str | None, db: str, *, as_json: bool, wide: bool) -> None:
    now = datetime.now(UTC)
    words = text.split(",")
    if len(words) != 2:  # noqa: PLR2004
        raise CommandError(f"--between takes two periods with a comma between them, not {cell(text)!r}: {_HELP}.")
    named = read_period(words[0], now=now), read_period(words[1], now=now)
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
    app.command()(usage)

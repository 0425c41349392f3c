"""Command `fleet admin usage`: sums by dimension and time, and rankings."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fleet_admin.columns import in_order, write_csv
from fleet_admin.reports import start_column, tally_columns
from fleet_cli.errors import CommandError
from fleet_cli.options import DEFAULT_DB, AsJson, Database, Wide, load_profile, open_log
from fleet_cli.tables import Column, cell, print_json, print_table
from fleet_common.validation import read_time
from schemas.names import model_name

if TYPE_CHECKING:
    from fleet_admin.settings import PriceList
    from fleet_edge.session_log import SessionLog
    from fleet_edge.store.totals import Distribution
    from fleet_edge.store.views import Tally, UsageView

_DAY: Final = timedelta(days=1)
_MONTH: Final = re.compile(r"(\d{4})-(\d{2})", re.ASCII)
_HELP: Final = "today, yesterday, this-week, last-week, this-month, last-month, 2026-11, an age such as 7d, or a time"


def begin_of(text: str, *, now: datetime) -> datetime:
    """Return a time, or the begin of a period, by its name; raises `CommandError` if it is invalid."""
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    week, month = today - today.weekday() * _DAY, today.replace(day=1)
    named = {
        "today": today,
        "yesterday": today - _DAY,
        "this-week": week,
        "last-week": week - 7 * _DAY,
        "this-month": month,
        "last-month": (month - _DAY).replace(day=1),
    }
    try:
        if found := _MONTH.fullmatch(text):
            return datetime(int(found[1]), int(found[2]), 1, tzinfo=UTC)
        return named[text] if text in named else read_time(text, now=now)
    except ValueError:
        raise CommandError(f"{cell(text)!r} is no time or period: take {_HELP}.") from None


_DIMENSIONS: Final = ("app", "device", "edge", "model", "label")
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
        typer.Option(
            metavar="app,device,edge,model,label", help="Rows for each of these; by default app, or the time."
        ),
    ] = None,
    per: Annotated[str | None, typer.Option(metavar="hour|day|month", help="Rows for each hour, day or month.")] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            help="Column to sort by: tokens, sessions, bytes, resumes, refusals, … the highest first; speed and "
            f"acceptance the lowest first, with at least {_LEAST} tokens."
        ),
    ] = None,
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
    names = _names("app" if by is None and per is None else by or "")
    if per not in {None, *_GRAINS}:
        raise CommandError(f"--per takes hour, day or month, not {cell(per)!r}.")
    now = datetime.now(UTC)
    period: dict[str, Any] = {
        "since": None if since is None else begin_of(since.strip(), now=now),
        "until": None if until is None else begin_of(until.strip(), now=now),
    }
    prices = load_profile().prices
    with open_log(db) as log:
        chosen = _labelled(log, device, label)
        found = [] if chosen == [] else _usage(log, names, per, **period, device=chosen, edge=edge)
        if names == ["device"] and per is None:
            found = _with_events(log, found, **period, edge=edge, devices=chosen)
        elif not names and per and chosen is None:  # latencies are not known by device
            known = log.latencies_over_time(per, **period, edge=edge)
            found = [replace(row, latencies=known.get(row.start, {})) for row in found if row.start is not None]
    columns = _columns(names, per, prices)
    found, empty = (found, _NOTHING) if sort is None else _sorted(found, columns, sort)
    found = found[:limit]
    if as_json:
        print_json([_as_json(row, names, per, prices) for row in found])
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


def _columns(names: Sequence[str], per: str | None, prices: "PriceList") -> list[Column[_Usage]]:
    counted: list[Column[_Usage]] = tally_columns(lambda row: row.counted, prices)
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


def _as_json(row: _Usage, names: Sequence[str], grain: str | None, prices: "PriceList") -> dict[str, object]:
    return {
        **({grain: row.start} if grain else {}),
        **dict(zip(names, row.names, strict=True)),
        **({"cost": prices.cost(row.counted)} if prices else {}),
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


def register(app: typer.Typer) -> None:
    app.command()(usage)

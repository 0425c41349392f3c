"""`fleet admin usage|trend`: what was written, by whom and for what; and how it went over time."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import typer

from fleet_admin.csv_output import write_csv
from fleet_admin.reports import Point, model_name, start_column, tally_columns, trend_columns
from fleet_cli.admin.options import DEFAULT_DB, AsJson, Database, Wide, open_log, time_of
from fleet_cli.errors import CommandError
from fleet_cli.tables import Column, cell, print_json, print_table

if TYPE_CHECKING:
    from fleet_edge.session_log import SessionLog
    from fleet_edge.store.views import Tally, UsageView

AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV rather than tables.")]

_DIMENSIONS: Final = ("app", "device", "edge", "model", "label")
_GRAINS: Final = ("hour", "day", "month")
_MOST_TIMES: Final = 400
"""Points in time for which latencies are looked up, each by queries of its own."""

_NOTHING: Final = "No edge has served such a session in that time."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Usage:
    """What was written by those that have all of this in common."""

    start: datetime | None
    names: tuple[str | None, ...]
    counted: "Tally"


T = TypeVar("T")


def register(app: typer.Typer) -> None:
    for command in (usage, trend):
        app.command()(command)


def usage(
    by: Annotated[str, typer.Option(metavar="app,device,edge,model,label,hour|day|month")] = "app",
    since: Annotated[str | None, typer.Option(help="Since: 90s, 30m, 2h, 7d ago, or an ISO 8601 time (UTC).")] = None,
    until: Annotated[str | None, typer.Option(help="Before: as --since.")] = None,
    device: Annotated[list[str] | None, typer.Option(help="Of this device; may be given several times.")] = None,
    edge: Annotated[str | None, typer.Option(help="At this edge.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Of devices with this label.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="At most so many rows.")] = 1000,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    wide: Wide = False,
) -> None:
    """Add up tokens, bytes and time by application, device, edge, model or label, over time if asked for."""
    names, grain = _groups(by)
    after, before = time_of("--since", since), time_of("--until", until)
    with open_log(db) as log:
        chosen = _labelled(log, device, label)
        found = [] if chosen == [] else _usage(log, names, grain, since=after, until=before, device=chosen, edge=edge)
    found = found[:limit]
    columns: list[Column[_Usage]] = [
        *([start_column(grain, lambda row: row.start)] if grain else ()),
        *(Column(name, lambda row, place=place: row.names[place], rank=0) for place, name in enumerate(names)),  # type: ignore[misc]
        *tally_columns(lambda row: row.counted),
    ]
    if as_json:
        print_json([_as_json(row, names, grain) for row in found])
    elif as_csv:
        _write_csv(columns, found)
    else:
        more = f" (perhaps more: --limit {limit})" if len(found) == limit else ""
        print_table(f"Usage{more}", columns, found, sort="tokens", wide=wide, empty=_NOTHING)


def _as_json(row: _Usage, names: Sequence[str], grain: str | None) -> dict[str, object]:
    return {
        **({grain: row.start} if grain else {}),
        **dict(zip(names, row.names, strict=True)),
        "counted": row.counted,
    }


def _write_csv(columns: Sequence[Column[T]], rows: Iterable[T]) -> None:
    headings = [column.key for column in columns]
    write_csv(sys.stdout, headings, ([column.value(row) for column in columns] for row in rows))


def trend(
    grain: Annotated[str, typer.Option(metavar="hour|day|month", help="How long each row is.")] = "hour",
    since: Annotated[str, typer.Option(help="Since: 90s, 30m, 2h, 7d ago, or an ISO 8601 time (UTC).")] = "24h",
    until: Annotated[str | None, typer.Option(help="Before: as --since.")] = None,
    device: Annotated[list[str] | None, typer.Option(help="Of this device; may be given several times.")] = None,
    edge: Annotated[str | None, typer.Option(help="At this edge.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Of devices with this label.")] = None,
    db: Database = DEFAULT_DB,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    wide: Wide = False,
) -> None:
    """Show tokens, latencies, acceptance, speed and bytes hour by hour, day by day or month by month."""
    if grain not in _GRAINS:
        raise CommandError(f"--grain takes hour, day or month, not {cell(grain)!r}.")
    after, before = time_of("--since", since), time_of("--until", until)
    with open_log(db) as log:
        chosen = _labelled(log, device, label)
        views = [] if chosen == [] else log.usage(since=after, until=before, grain=grain, device=chosen, edge=edge)
        points = _points(log, views, until=before, edge=edge, latencies=chosen is None)
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
    """Return the devices that are chosen; None for all."""
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
    """Ask for all that is told apart; a device with several labels counts for each of them."""
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
    found = [_Usage(start=start, names=told, counted=counted) for (start, told), counted in added.items()]
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


def _points(
    log: "SessionLog", views: "Sequence[UsageView]", *, until: datetime | None, edge: str | None, latencies: bool
) -> list[Point]:
    starts = [view.start for view in views if view.start is not None]
    points = []
    for view, end in zip(views, [*starts[1:], until], strict=False):
        if view.start is None:
            continue
        told = log.latencies(since=view.start, until=end, edge=edge) if latencies and len(views) <= _MOST_TIMES else {}
        first, gap = told.get("first_token"), told.get("gap")
        points.append(
            Point(
                start=view.start,
                counted=view.counted,
                first_token_p50_ms=None if first is None else first.quantile(0.5),
                first_token_p95_ms=None if first is None else first.quantile(0.95),
                gap_p95_ms=None if gap is None else gap.quantile(0.95),
            )
        )
    return points

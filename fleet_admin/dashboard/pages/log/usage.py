"""Usage: what applications, devices, draft models and edges have cost, over a time and by day."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Final

from starlette.responses import Response

from fleet_admin.columns import Column
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.grid import Grid
from fleet_admin.dashboard.pages.page import Page
from fleet_admin.dashboard.ranges import RANGES, range_of
from fleet_admin.dashboard.series import series
from fleet_admin.dashboard.visit import Visit
from fleet_admin.dashboard.web.csv import csv_response
from fleet_admin.reports import edge_seconds, model_name, tally_columns
from fleet_edge.store.views import UsageView

_BY: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "app": ("application", ("app",)),
    "device": ("device", ("device",)),
    "model": ("draft model", ("draft_model", "quantization")),
    "edge": ("edge", ("edge",)),
}
"""What usage is told apart by: in words, and as the log has it."""

_NAMES: Final[Mapping[str, Callable[[UsageView], str]]] = {
    "app": lambda row: row.app or "",
    "device": lambda row: row.device or "",
    "model": lambda row: model_name(row.draft_model, row.quantization) or "",
    "edge": lambda row: row.edge or "",
}
_DAILY: Final = timedelta(days=31)
"""Up to which length a time is cut into days; what is longer, into months; up to two days, into hours."""

_HOURLY: Final = timedelta(days=2)


def _columns(by: str, words: str) -> list[Column[UsageView]]:
    return [Column(words, _NAMES[by], key="name", rank=0), *tally_columns(lambda row: row.counted)]


_GRIDS: Final = {by: Grid[UsageView](_columns(by, words), sort="-tokens") for by, (words, _) in _BY.items()}
_BY_TIME: Final = {
    by: Grid[UsageView](
        (Column("time", lambda row: row.start, "moment", key="start", rank=0), *_columns(by, words)), sort="-start"
    )
    for by, (words, _) in _BY.items()
}


def show(visit: Visit) -> Response:
    """Show usage by what is asked for, with a chart over time; or give it as CSV, also by day."""
    name, length = range_of(visit.query("range", "30d"))
    by = visit.query("by", "app")
    if by not in _BY:
        raise Problem(400, f"Usage is told apart by {', '.join(_BY)}.")
    grain = "hour" if length <= _HOURLY else "day" if length <= _DAILY else "month"
    log, since, dimensions = visit.services.log, visit.now - length, _BY[by][1]
    if visit.query("format") == "csv":
        by_time = visit.query("over") == "time"
        rows = log.usage(since=since, by=dimensions, grain=grain if by_time else None)
        found = (_BY_TIME if by_time else _GRIDS)[by].view(rows, visit.admission.query)
        return csv_response("usage", found.headings, found.lines())
    totals = log.usage(since=since, grain=grain)
    total = log.usage(since=since)
    return visit.page(
        "usage.html",
        title="Usage",
        view=_GRIDS[by].view(log.usage(since=since, by=dimensions), visit.admission.query),
        kinds=[(key, words) for key, (words, _) in _BY.items()],
        by=by,
        grain=grain,
        ranges=RANGES,
        range=name,
        total=total[0].counted if total else None,
        edge_s=edge_seconds(total[0].counted) if total else None,
        tokens=_chart(totals, lambda row: row.counted.tokens, unit="tokens"),
        bytes=_chart(totals, lambda row: (row.counted.uplink_bytes + row.counted.downlink_bytes) / 1e6, unit="MB"),
    )


def _chart(rows: list[UsageView], value: Callable[[UsageView], float], *, unit: str) -> dict[str, object]:
    dated = [(row.start, row) for row in rows if row.start is not None]
    return series(dated, lambda each: each[0], [(unit, lambda each: value(each[1]))], unit=unit)


PAGES: Final = (Page("/usage", "Usage", show, menu=True),)

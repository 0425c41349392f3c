"""Pages of what the session log holds: usage, alerts, the audit log."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from starlette.responses import Response

from fleet_admin.columns import Column
from fleet_admin.dashboard.charts import RANGES, Timeline, range_of
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.grid import CellLink, Grid, about, address
from fleet_admin.dashboard.rendering import csv_response
from fleet_admin.dashboard.visit import Page, Visit
from fleet_admin.reports import (
    ALERTS,
    AUDIT,
    edge_seconds,
    tally_columns,
)
from fleet_edge.alerts.alerts import MAX_OPEN
from fleet_edge.alerts.rules import grouped
from fleet_edge.store.views import AlertView, AuditView, UsageView
from schemas.names import model_name

_BY: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "app": ("application", ("app",)),
    "device": ("device", ("device",)),
    "model": ("draft model", ("draft_model", "quantization")),
    "edge": ("edge", ("edge",)),
    "target": ("target identity", ("target_id",)),
}
"""Dimensions of usage: label, and column of the log."""

_NAMES: Final[Mapping[str, Callable[[UsageView], str]]] = {
    "app": lambda row: row.app or "",
    "device": lambda row: row.device or "",
    "model": lambda row: model_name(row.draft_model, row.quantization) or "",
    "edge": lambda row: row.edge or "",
    "target": lambda row: row.target_id or "",
}
_LINKS: Final[Mapping[str, dict[str, CellLink[UsageView]]]] = {
    "device": {"name": lambda row: address("devices", row.device or "")},
    "edge": {"name": lambda row: address("edges", row.edge or "")},
}


_TIME: Final[Column[UsageView]] = Column("time", lambda row: row.start, "moment", key="start", rank=0)


def _usage_grid(by: str, *, by_time: bool = False) -> Grid[UsageView]:
    columns: list[Column[UsageView]] = [
        Column(_BY[by][0], _NAMES[by], key="name", rank=0),
        *tally_columns(lambda row: row.counted),
    ]
    if by_time:
        return Grid((_TIME, *columns), sort="-start")
    return Grid(columns, sort="-tokens", links=_LINKS.get(by))


def show_usage(visit: Visit) -> Response:
    """Show usage by a dimension with a chart over time, or return it as CSV."""
    line = Timeline.of(visit, "30d")
    by = visit.query("by", "app")
    if by not in _BY:
        raise Problem(400, f"Usage is grouped by {', '.join(_BY)}.")
    log, since, dimensions = visit.services.log, line.begin, _BY[by][1]
    if visit.query("format") == "csv":
        by_time = visit.query("over") == "time"
        rows = log.usage(since=since, by=dimensions, grain=line.grain if by_time else None)
        found = _usage_grid(by, by_time=by_time).view(rows, visit.admission.query)
        return csv_response("usage", found.headings, found.lines())
    drawn = partial(line.chart, {each.start: each for each in log.usage(since=since, grain=line.grain)}, sums=True)
    total = log.usage(since=since)
    return visit.page(
        "usage.html",
        title="Usage",
        view=_usage_grid(by).view(log.usage(since=since, by=dimensions), visit.admission.query),
        kinds=[(key, words) for key, (words, _) in _BY.items()],
        by=by,
        grain=line.grain,
        ranges=RANGES,
        range=line.range,
        total=total[0].counted if total else None,
        edge_s=edge_seconds(total[0].counted) if total else None,
        charts={
            "Tokens": drawn({"tokens": lambda each: each.counted.tokens}),
            "Traffic": drawn(
                {"up": lambda each: each.counted.uplink_bytes, "down": lambda each: each.counted.downlink_bytes},
                unit="B",
                kind="bytes",
            ),
        },
    )


_ALERTS_PATH: Final = "/alerts"
_MAX_ALERTS: Final = 1_000  # that are over
_MAX_SHOWN: Final = 200  # of one condition
_ALERTS_GRID: Final = Grid[AlertView](ALERTS, sort="-since", links={"subject": about})


def show_alerts(visit: Visit) -> Response:
    alerts = visit.services.alerts
    if visit.query("format") == "csv":
        view = _ALERTS_GRID.view(alerts.list(limit=MAX_OPEN + _MAX_ALERTS), visit.admission.query)
        return csv_response("alerts", view.headings, view.lines())
    is_open = alerts.open(limit=MAX_OPEN)
    groups = grouped(is_open)
    return visit.page(
        "alerts.html",
        title="Alerts",
        groups=groups,
        about=about,
        most=_MAX_SHOWN,
        outdated=alerts.evaluation().sentence,
        number=len(is_open),
        critical=sum(each.critical for each in groups),
        view=_ALERTS_GRID.view(alerts.list(open=False, limit=_MAX_ALERTS), visit.admission.query),
    )


_MAX_ACTIONS: Final = 2_000
_MAX_CSV: Final = 50_000

_AUDIT_GRID: Final = Grid[AuditView](AUDIT, sort="-at")


def show_audit(visit: Visit) -> Response:
    name, length = range_of(visit, "30d")
    as_csv = visit.query("format") == "csv"
    limit = _MAX_CSV if as_csv else _MAX_ACTIONS + 1
    rows = visit.services.steering.log.audit(since=visit.now - length, limit=limit)
    view = _AUDIT_GRID.view(rows[:_MAX_ACTIONS] if not as_csv else rows, visit.admission.query)
    if as_csv:
        return csv_response("audit", view.headings, view.lines())
    return visit.page(
        "audit.html",
        title="Audit log",
        view=view,
        ranges=RANGES,
        range=name,
        most=_MAX_ACTIONS if len(rows) > _MAX_ACTIONS else None,
    )


PAGES: Final = (
    Page("/usage", "Usage", show_usage, menu=True),
    Page(_ALERTS_PATH, "Alerts", show_alerts, menu=True),
    Page("/audit", "Audit log", show_audit, menu=True),
)

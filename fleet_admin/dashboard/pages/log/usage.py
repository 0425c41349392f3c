"""Usage: what applications, devices, draft models and edges have cost, over a time and by day."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Final

from starlette.responses import Response

from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.grid import Column, Grid
from fleet_admin.dashboard.pages.page import Page
from fleet_admin.dashboard.ranges import RANGES, range_of
from fleet_admin.dashboard.series import series
from fleet_admin.dashboard.visit import Visit
from fleet_admin.dashboard.web.csv import csv_response
from fleet_edge.store.views import UsageView

__all__ = ["PAGES"]

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
    "model": lambda row: f"{row.draft_model or ''} {row.quantization or ''}".strip(),
    "edge": lambda row: row.edge or "",
}
_DAILY: Final = timedelta(days=31)
"""Up to which length a time is cut into days; what is longer, into months; up to two days, into hours."""

_HOURLY: Final = timedelta(days=2)


def _edge_ms(row: UsageView) -> float | None:
    """Return the time of an edge that texts took: of a step, each of its sessions has a share alike."""
    batch = row.counted.mean_batch
    return row.counted.compute_ms / batch / 1e3 if batch else None


def _columns(by: str, words: str) -> tuple[Column[UsageView], ...]:
    return (
        Column("name", words, _NAMES[by]),
        Column("tokens", "tokens", lambda row: row.counted.tokens, kind="count"),
        Column("sessions", "sessions", lambda row: row.counted.sessions, kind="count"),
        Column("edge_s", "edge time, s", _edge_ms, kind="figure", meaning="Steps, each shared by its sessions alike."),
        Column("acceptance", "acceptance", lambda row: row.counted.acceptance, kind="percent"),
        Column("streamed", "written by edges", lambda row: row.counted.streamed, kind="count", common=False),
        Column("prompt", "prompt tokens computed", lambda row: row.counted.prefill_tokens, kind="count"),
        Column("reused", "prompt tokens reused", lambda row: row.counted.reused_tokens, kind="count", common=False),
        Column("up", "up", lambda row: row.counted.uplink_bytes, kind="bytes"),
        Column("down", "down", lambda row: row.counted.downlink_bytes, kind="bytes"),
        Column("rounds", "rounds", lambda row: row.counted.rounds, kind="count", common=False),
    )


_GRIDS: Final = {by: Grid[UsageView](_columns(by, words), sort="-tokens") for by, (words, _) in _BY.items()}
_BY_TIME: Final = {
    by: Grid[UsageView](
        (Column("start", "time", lambda row: row.start, kind="moment"), *_columns(by, words)), sort="-start"
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
        edge_s=_edge_ms(total[0]) if total else None,
        tokens=_chart(totals, lambda row: row.counted.tokens, unit="tokens"),
        bytes=_chart(totals, lambda row: (row.counted.uplink_bytes + row.counted.downlink_bytes) / 1e6, unit="MB"),
    )


def _chart(rows: list[UsageView], value: Callable[[UsageView], float], *, unit: str) -> dict[str, object]:
    dated = [(row.start, row) for row in rows if row.start is not None]
    return series(dated, lambda each: each[0], [(unit, lambda each: value(each[1]))], unit=unit)


PAGES: Final = (Page("/usage", "Usage", show, menu=True),)

"""Edges: how busy each is, what it could still take, its release and its certificate."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from urllib.parse import urlencode

from starlette.responses import Response

from fleet_admin.dashboard.grid import Column, Grid
from fleet_admin.dashboard.pages.page import Page
from fleet_admin.dashboard.visit import Visit
from fleet_admin.dashboard.web.csv import csv_response
from fleet_edge.store.views import EdgeView
from schemas.control import Presence

__all__ = ["PAGES"]

_FRESH: Final = timedelta(minutes=1)
"""An edge says every few seconds how busy it is; what is older is not how it is now."""

_DAY_S: Final = 86_400


@dataclass(frozen=True, slots=True)
class _Row:
    edge: EdgeView
    fresh: bool
    state: str
    certificate_days: float | None
    wanted: str | None

    @property
    def free(self) -> int | None:
        """Sessions that it would still open now; None if that is not known."""
        if not self.fresh:
            return None
        return 0 if self.edge.presence == Presence.DRAINING else self.edge.free_sessions


def _sessions(row: _Row) -> str:
    return f"/sessions?{urlencode({'edge': row.edge.edge})}"


_GRID: Final = Grid[_Row](
    (
        Column("edge", "edge", lambda row: row.edge.edge, link=_sessions),
        Column("state", "state", lambda row: row.state, state=True),
        Column("since", "since", lambda row: row.edge.presence_since, kind="ago"),
        Column("open", "open sessions", lambda row: row.edge.open_sessions if row.fresh else None, kind="count"),
        Column("free", "could open", lambda row: row.free, kind="count",
               meaning="Sessions that it may still open before it refuses one."),
        Column("tokens", "tokens/s", lambda row: row.edge.tokens_per_s if row.fresh else None, kind="figure"),
        Column("batch", "batch", lambda row: row.edge.batch_sessions if row.fresh else None, kind="figure",
               meaning="Mean number of sessions verified in one step."),
        Column("step", "step", lambda row: row.edge.step_ms if row.fresh else None, kind="ms"),
        Column("queue", "queue", lambda row: row.edge.queue_ms if row.fresh else None, kind="ms",
               meaning="Mean wait of a draft for its step."),
        Column("kv", "K/V in use", lambda row: row.edge.kv_usage if row.fresh else None, kind="percent",
               meaning="Of the memory for keys and values."),
        Column("spool", "records waiting", lambda row: row.edge.spooled_records, kind="count",
               meaning="Of the session log, on the edge's disk, because the database did not take them."),
        Column("release", "release", lambda row: row.edge.software),
        Column("wanted", "release wanted", lambda row: row.wanted, meaning="By the latest rollout."),
        Column("certificate", "certificate", lambda row: row.certificate_days, kind="days",
               meaning="Until it ends."),
        Column("target", "target model", lambda row: row.edge.target),
        Column("seen", "seen", lambda row: row.edge.seen_at, kind="ago"),
        Column("load", "load told", lambda row: row.edge.load_at, kind="ago", common=False),
        Column("first_seen", "first seen", lambda row: row.edge.first_seen_at, kind="moment", common=False),
    ),
    sort="edge",
)  # fmt: skip


def show(visit: Visit) -> Response:
    """Show the table, or give it as CSV."""
    log, now = visit.services.log, visit.now
    wanted = {each.name: each.wanted for each in log.releases() if each.kind == "edge"}
    rows = [_row(each, wanted.get(each.edge), now=now) for each in log.edges()]
    view = _GRID.view(rows, visit.admission.query)
    if visit.query("format") == "csv":
        return csv_response("edges", view.headings, view.lines())
    fresh = [row.edge for row in rows if row.fresh]
    return visit.page(
        "edges.html",
        title="Edges",
        view=view,
        open_sessions=sum(each.open_sessions or 0 for each in fresh),
        free=sum(row.free or 0 for row in rows),
        tokens_per_s=sum(each.tokens_per_s or 0.0 for each in fresh),
        fullest=max((each.kv_usage for each in fresh if each.kv_usage is not None), default=None),
        waiting=sum(row.edge.spooled_records or 0 for row in rows),
    )


def _row(edge: EdgeView, wanted: str | None, *, now: datetime) -> _Row:
    there = edge.presence != Presence.OFFLINE
    fresh = there and edge.load_at is not None and now - edge.load_at < _FRESH
    quiet = there and edge.load_at is not None and not fresh
    days = None if edge.certificate_until is None else (edge.certificate_until - now).total_seconds() / _DAY_S
    return _Row(edge, fresh, "silent" if quiet else edge.presence or "unknown", days, wanted)


PAGES: Final = (Page("/edges", "Edges", show, menu=True),)

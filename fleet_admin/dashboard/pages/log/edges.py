"""Edges: how busy each is, what it could still take, its release and its certificate."""

from typing import Final
from urllib.parse import urlencode

from starlette.responses import Response

from fleet_admin.columns import Column
from fleet_admin.dashboard.grid import Grid
from fleet_admin.dashboard.pages.page import Page
from fleet_admin.dashboard.visit import Visit
from fleet_admin.dashboard.web.csv import csv_response
from fleet_admin.reports import edge_columns
from fleet_edge.store.states import MachineState
from fleet_edge.store.views import EdgeView


def show(visit: Visit) -> Response:
    """Show the table, or give it as CSV."""
    log = visit.services.log
    wanted = {each.name: each.wanted for each in log.releases() if each.kind == "edge"}
    rolled_out: Column[EdgeView] = Column(
        "release wanted", lambda row: wanted.get(row.edge), key="wanted", rank=2, meaning="By the latest rollout."
    )
    rows = log.edges()
    grid = Grid([*edge_columns(visit.now), rolled_out], sort="edge", links={"edge": _sessions})
    view = grid.view(rows, visit.admission.query)
    if visit.query("format") == "csv":
        return csv_response("edges", view.headings, view.lines())
    serving = [row for row in rows if row.state in (MachineState.ONLINE, MachineState.DRAINING)]
    return visit.page(
        "edges.html",
        title="Edges",
        view=view,
        open_sessions=sum(each.open_sessions or 0 for each in serving),
        free=sum(each.free_sessions or 0 for each in serving if each.state is MachineState.ONLINE),
        tokens_per_s=sum(each.tokens_per_s or 0.0 for each in serving),
        fullest=max((each.kv_usage for each in serving if each.kv_usage is not None), default=None),
        waiting=sum(row.spooled_records or 0 for row in rows),
    )


def _sessions(row: EdgeView) -> str:
    return f"/sessions?{urlencode({'edge': row.edge})}"


PAGES: Final = (Page("/edges", "Edges", show, menu=True),)

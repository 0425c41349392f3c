"""Audit log: who changed what, when, and what came of it."""

from datetime import timedelta
from typing import Final

from starlette.responses import Response

from fleet_admin.dashboard.grid import Grid
from fleet_admin.dashboard.pages.page import Page
from fleet_admin.dashboard.ranges import RANGES, range_of
from fleet_admin.dashboard.visit import Visit
from fleet_admin.dashboard.web.csv import csv_response
from fleet_admin.reports import AUDIT
from fleet_edge.store.steering.views import AuditView

_MOST: Final = 2_000
_MOST_CSV: Final = 50_000

_GRID: Final = Grid[AuditView](AUDIT, sort="-at")


def show(visit: Visit) -> Response:
    """Show the actions of a range of time, or give them as CSV."""
    name, length = range_of(visit.query("range", "30d"))
    as_csv = visit.query("format") == "csv"
    rows = _audit(visit, length, limit=_MOST_CSV if as_csv else _MOST + 1)
    view = _GRID.view(rows[:_MOST] if not as_csv else rows, visit.admission.query)
    if as_csv:
        return csv_response("audit", view.headings, view.lines())
    return visit.page(
        "audit.html", title="Audit log", view=view, ranges=RANGES, range=name, most=_MOST if len(rows) > _MOST else None
    )


def _audit(visit: Visit, length: timedelta, *, limit: int) -> list[AuditView]:
    return visit.services.steering.log.audit(since=visit.now - length, limit=limit)


PAGES: Final = (Page("/audit", "Audit log", show, menu=True),)

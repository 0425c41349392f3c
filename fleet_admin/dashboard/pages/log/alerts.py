"""Alerts: what is wrong now, and what was; an operator acknowledges and clears."""

from collections.abc import Callable
from typing import Final
from urllib.parse import quote

from starlette.responses import Response

from fleet_admin.alerts.errors import AlertError
from fleet_admin.alerts.views import AlertSeverity, AlertView
from fleet_admin.dashboard.grid import Grid
from fleet_admin.dashboard.pages.page import Page, action
from fleet_admin.dashboard.visit import Visit
from fleet_admin.dashboard.web.csv import csv_response
from fleet_admin.reports import ALERTS, alert_state

_PATH: Final = "/alerts"
_MOST: Final = 1_000
_MOST_AT_ONCE: Final = 100


def _about(alert: AlertView) -> str:
    return f"/devices/{quote(alert.device, safe='')}" if alert.device is not None else ""


_GRID: Final = Grid[AlertView](ALERTS, sort="-since")


def show(visit: Visit) -> Response:
    """Show the open alerts, and below them those that are over; or give all as CSV."""
    alerts = visit.services.alerts
    if visit.query("format") == "csv":
        view = _GRID.view(alerts.list(limit=_MOST), visit.admission.query)
        return csv_response("alerts", view.headings, view.lines())
    is_open = alerts.open(limit=_MOST)
    return visit.page(
        "alerts.html",
        title="Alerts",
        alerts=[(each, alert_state(each), _about(each)) for each in is_open[:_MOST_AT_ONCE]],
        number=len(is_open),
        critical=sum(each.severity == AlertSeverity.CRITICAL for each in is_open),
        waiting=sum(each.acknowledged_at is None for each in is_open),
        view=_GRID.view(alerts.list(open=False, limit=_MOST), visit.admission.query),
    )


def acknowledge(visit: Visit) -> Response:
    """Say that somebody takes care of it."""
    return _each(visit, visit.services.alerts.acknowledge, "acknowledged")


def clear(visit: Visit) -> Response:
    """End it; what is still wrong makes a new one."""
    return _each(visit, visit.services.alerts.clear, "cleared")


def _each(visit: Visit, act: Callable[..., AlertView], word: str) -> Response:
    """Act on the alerts that are ticked, or the one whose button was pressed."""
    chosen = visit.forms("alert")[:_MOST_AT_ONCE]
    done, why = 0, "None is chosen."
    for alert in chosen:
        try:
            act(alert, who=visit.visitor.name, source=visit.visitor.address)
            done += 1
        except AlertError as error:
            why = str(error)
    if done < len(chosen) or not chosen:
        return visit.redirect(_PATH, said=f"{done} of {len(chosen)} {word}. {why}")
    return visit.redirect(_PATH, said=f"{done} {word}.")


PAGES: Final = (
    Page(_PATH, "Alerts", show, menu=True),
    action(f"{_PATH}/acknowledge", acknowledge),
    action(f"{_PATH}/clear", clear),
)

"""Devices: a table to filter, to choose columns of, and to save as CSV."""

from typing import Final
from urllib.parse import quote

from starlette.responses import Response

from fleet_admin.columns import Column
from fleet_admin.dashboard.acts import ACTS
from fleet_admin.dashboard.grid import Grid, GridView
from fleet_admin.dashboard.pages.page import Page
from fleet_admin.dashboard.visit import Visit
from fleet_admin.dashboard.web.body import Values
from fleet_admin.dashboard.web.csv import csv_response
from fleet_admin.reports import device_columns
from fleet_edge.store.views import DeviceView


def show(visit: Visit) -> Response:
    """Show the table, or give it as CSV."""
    view = _view(visit, visit.admission.query)
    if visit.query("format") == "csv":
        return csv_response("devices", view.headings, view.lines())
    return visit.page("devices.html", title="Devices", view=view, acts=ACTS)


def chosen_devices(visit: Visit, query: Values) -> list[str]:
    """Return the names of the devices that a filter meets."""
    return sorted(row.device for row in _view(visit, query).found)


def _view(visit: Visit, query: Values) -> GridView[DeviceView]:
    log = visit.services.log
    wanted = {each.name: each.wanted for each in log.releases() if each.kind == "device"}
    rolled_out: Column[DeviceView] = Column(
        "wanted", lambda row: wanted.get(row.device), rank=2, meaning="The release that was last rolled out to it."
    )
    grid = Grid([*device_columns(visit.now), rolled_out], sort="device", links={"device": _address})
    return grid.view(log.devices(), query)


def _address(row: DeviceView) -> str:
    return f"/devices/{quote(row.device, safe='')}"


PAGES: Final = (Page("/devices", "Devices", show, menu=True),)

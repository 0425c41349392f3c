"""Devices: a table to filter, to choose columns of, and to save as CSV."""

from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from starlette.responses import Response

from fleet_admin.dashboard.acts import ACTS
from fleet_admin.dashboard.device_states import device_state
from fleet_admin.dashboard.grid import Column, Grid
from fleet_admin.dashboard.pages.page import Page
from fleet_admin.dashboard.visit import Visit
from fleet_admin.dashboard.web.body import Values
from fleet_admin.dashboard.web.csv import csv_response
from fleet_edge.store.views import DeviceView

__all__ = ["PAGES", "chosen_devices"]


@dataclass(frozen=True, slots=True)
class _Row:
    device: DeviceView
    state: str


def _address(row: _Row) -> str:
    return f"/devices/{quote(row.device.device, safe='')}"


_GRID: Final = Grid[_Row](
    (
        Column("device", "device", lambda row: row.device.device, link=_address),
        Column("state", "state", lambda row: row.state, state=True),
        Column("seen", "seen", lambda row: row.device.seen_at, kind="ago"),
        Column("draft", "draft model", lambda row: row.device.draft_model),
        Column("quantization", "quantization", lambda row: row.device.quantization),
        Column("release", "release", lambda row: row.device.software),
        Column("sessions", "sessions", lambda row: row.device.sessions, kind="count"),
        Column("last_session", "last session", lambda row: row.device.last_session_at, kind="ago"),
        Column("first_seen", "first seen", lambda row: row.device.first_seen_at, kind="moment", common=False),
    ),
    sort="device",
)  # fmt: skip


def show(visit: Visit) -> Response:
    """Show the table, or give it as CSV."""
    view = _GRID.view(_rows(visit), visit.admission.query)
    if visit.query("format") == "csv":
        return csv_response("devices", view.headings, view.lines())
    return visit.page("devices.html", title="Devices", view=view, acts=ACTS)


def chosen_devices(visit: Visit, query: Values) -> list[str]:
    """Return the names of the devices that a filter meets."""
    return sorted(row.device.device for row in _GRID.view(_rows(visit), query).found)


def _rows(visit: Visit) -> list[_Row]:
    log = visit.services.log
    fenced = {each.device for each in log.fences()}
    return [_Row(each, device_state(each, fenced=each.device in fenced, now=visit.now)) for each in log.devices()]


PAGES: Final = (Page("/devices", "Devices", show, menu=True),)

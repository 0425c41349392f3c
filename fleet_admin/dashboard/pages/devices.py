"""Devices: a table to filter, to choose columns of, and to save as CSV."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final
from urllib.parse import quote

from starlette.responses import Response

from fleet_admin.dashboard.acts import ACTS
from fleet_admin.dashboard.device_states import days_left, device_state, state_since
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
    since: datetime | None
    wanted: str | None
    labels: str
    certificate_days: float | None


def _address(row: _Row) -> str:
    return f"/devices/{quote(row.device.device, safe='')}"


_GRID: Final = Grid[_Row](
    (
        Column("device", "device", lambda row: row.device.device, link=_address),
        Column("state", "state", lambda row: row.state, state=True),
        Column("since", "since", lambda row: row.since, kind="ago"),
        Column("verdict", "last verdict", lambda row: row.device.last_verdict_at, kind="ago"),
        Column("edge", "edge", lambda row: row.device.last_edge, meaning="That served its latest session."),
        Column("draft", "draft model", lambda row: row.device.draft_model),
        Column("quantization", "quantization", lambda row: row.device.quantization, common=False),
        Column("release", "release", lambda row: row.device.software, meaning="That it runs, as it says itself."),
        Column("wanted", "wanted", lambda row: row.wanted, meaning="The release that was last rolled out to it."),
        Column("round_trip", "round trip", lambda row: row.device.round_trip_ms, kind="ms"),
        Column("acceptance_1h", "acceptance 1 h", lambda row: row.device.acceptance_1h, kind="percent"),
        Column("acceptance_24h", "acceptance 24 h", lambda row: row.device.acceptance_24h, kind="percent"),
        Column("told", "acceptance told", lambda row: row.device.told_acceptance, kind="percent", common=False),
        Column("plan", "plan", lambda row: row.device.plan),
        Column("tokens_today", "tokens today", lambda row: row.device.tokens_today, kind="count"),
        Column("sessions", "sessions", lambda row: row.device.sessions, kind="count", common=False),
        Column("certificate", "certificate", lambda row: row.certificate_days, kind="days", meaning="Days left."),
        Column("labels", "labels", lambda row: row.labels),
        Column("seen", "state told", lambda row: row.device.seen_at, kind="ago", common=False),
        Column("telemetry", "telemetry", lambda row: row.device.telemetry_at, kind="ago", common=False),
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
    services = visit.services
    fenced = {each.device for each in services.log.fences()}
    known = services.steering.log.known()
    wanted = {each.name: each.wanted for each in services.log.releases() if each.kind == "device"}
    rows = []
    for device in services.log.devices():
        name = device.device
        chosen = known.get(name)
        retired = chosen is not None and chosen.retired_at is not None
        state = device_state(device, fenced=name in fenced, now=visit.now, retired=retired)
        rows.append(
            _Row(
                device=device,
                state=state,
                since=state_since(device, state),
                wanted=wanted.get(name),
                labels="" if chosen is None else " ".join(chosen.labels),
                certificate_days=days_left(device.certificate_until, now=visit.now),
            )
        )
    return rows


PAGES: Final = (Page("/devices", "Devices", show, menu=True),)

"""One device: what it is, what it did in each hour, its sessions and events."""

from datetime import datetime, timedelta
from typing import Final

from starlette.responses import Response

from fleet_admin.dashboard.acts import ACTS
from fleet_admin.dashboard.pages.page import Page
from fleet_admin.dashboard.series import series
from fleet_admin.dashboard.visit import Visit
from fleet_admin.reports import days_left
from fleet_edge.store.views import HourView

_HOURS: Final = 72
_SESSIONS: Final = 20
_EVENTS: Final = 30
_COMMANDS: Final = 15


def show(visit: Visit) -> Response:
    log, name = visit.services.log, visit.path("device")
    device = log.device(name)
    fence = next((each for each in log.fences() if each.device == name), None)
    hours = [each for each in log.hours(name, limit=_HOURS) if each.hour >= visit.now - timedelta(hours=_HOURS)]
    steering = visit.services.steering
    wanted = next((each for each in log.releases() if each.kind == "device" and each.name == name), None)
    return visit.page(
        "device.html",
        title=name,
        device=device,
        acts=ACTS,
        fence=fence,
        certificate_days=days_left(device.certificate_until, visit.now),
        wanted=wanted,
        settings=steering.settings_of(name),
        absence=steering.absence,
        commands=steering.log.commands(devices=[name], limit=_COMMANDS),
        sessions=log.sessions(device=name, limit=_SESSIONS),
        events=log.events(device=name, limit=_EVENTS),
        tokens=series(
            hours,
            _hour,
            [("tokens", lambda each: float(each.counted.tokens))],
            unit="an hour",
            kind="count",
            between=(visit.now - timedelta(hours=_HOURS), visit.now),
        ),
        acceptance=series(
            hours,
            _hour,
            [("acceptance", lambda each: each.counted.acceptance)],
            unit="%",
            kind="percent",
            between=(visit.now - timedelta(hours=_HOURS), visit.now),
        ),
    )


def _hour(each: HourView) -> datetime:
    return each.hour


PAGES: Final = (Page("/devices/{device}", "Device", show),)

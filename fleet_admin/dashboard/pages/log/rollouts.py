"""Rollouts: what the playbooks did to which machine, and which machine runs another release than it should."""

from typing import Final
from urllib.parse import quote

from starlette.responses import Response

from fleet_admin.dashboard.grid import Grid
from fleet_admin.dashboard.pages.page import Page
from fleet_admin.dashboard.visit import Visit
from fleet_admin.dashboard.web.csv import csv_response
from fleet_admin.reports import MACHINES, RELEASES, ROLLOUTS
from fleet_edge.store.rollouts import MachineRelease, MachineRollout, Rollout

_PATH: Final = "/rollouts"
_MOST: Final = 500


def _address(rollout: str) -> str:
    return f"{_PATH}/{quote(rollout, safe='')}"


_ROLLOUTS: Final = Grid[Rollout](ROLLOUTS, sort="-started", links={"rollout": lambda row: _address(row.rollout)})
_MACHINES: Final = Grid[MachineRollout](MACHINES, sort="name")
_RELEASES: Final = Grid[MachineRelease](RELEASES, sort="name", links={"rollout": lambda row: _address(row.rollout)})


def show(visit: Visit) -> Response:
    """Show the latest rollouts, or give them as CSV."""
    view = _ROLLOUTS.view(visit.services.log.rollouts(limit=_MOST), visit.admission.query)
    if visit.query("format") == "csv":
        return csv_response("rollouts", view.headings, view.lines())
    drifting = sum(each.drift for each in visit.services.log.releases())
    return visit.page("rollouts.html", title="Rollouts", view=view, drifting=drifting)


def show_one(visit: Visit) -> Response:
    """Show the machines of one rollout, or give them as CSV."""
    name = visit.path("rollout")
    view = _MACHINES.view(visit.services.log.rollout(name), visit.admission.query)
    if visit.query("format") == "csv":
        return csv_response("rollout", view.headings, view.lines())
    return visit.page("machines.html", title=f"Rollout {name}", view=view, name="machines")


def show_releases(visit: Visit) -> Response:
    """Show the release that each machine should run beside the one that it runs, or give it as CSV."""
    view = _RELEASES.view(visit.services.log.releases(), visit.admission.query)
    if visit.query("format") == "csv":
        return csv_response("releases", view.headings, view.lines())
    return visit.page("machines.html", title="Releases", view=view, name="machines")


PAGES: Final = (
    Page(_PATH, "Rollouts", show, menu=True),
    # Before the next, which would take it for a rollout's name.
    Page(f"{_PATH}/releases", "Releases", show_releases),
    Page(f"{_PATH}/{{rollout}}", "Rollout", show_one),
)

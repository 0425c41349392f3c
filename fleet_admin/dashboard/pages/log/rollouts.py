"""Rollouts: what the playbooks did to which machine, and which machine runs another release than it should."""

from typing import Final
from urllib.parse import quote

from starlette.responses import Response

from fleet_admin.dashboard.grid import Column, Grid
from fleet_admin.dashboard.pages.page import Page
from fleet_admin.dashboard.visit import Visit
from fleet_admin.dashboard.web.csv import csv_response
from fleet_edge.store.rollouts import MachineRelease, MachineRollout, Rollout, RolloutOutcome

__all__ = ["PAGES"]

_PATH: Final = "/rollouts"
_MOST: Final = 500
_GOOD: Final = frozenset({RolloutOutcome.PROVEN, RolloutOutcome.UNCHANGED, RolloutOutcome.REMOVED})


def _state(outcome: str) -> str:
    """Return an outcome as a state that has a colour."""
    return outcome.replace("-", " ")


def _whole_state(rollout: Rollout) -> str:
    outcomes = rollout.outcomes.keys()
    if RolloutOutcome.FAILED in outcomes:
        return "failed"
    if RolloutOutcome.WENT_BACK in outcomes:
        return "went back"
    if rollout.ended_at is None:
        return "waiting"
    return "done" if outcomes <= _GOOD else "stopped"


def _counts(rollout: Rollout) -> str:
    return ", ".join(f"{number:,} {_state(outcome)}" for outcome, number in sorted(rollout.outcomes.items()))


def _address(rollout: str) -> str:
    return f"{_PATH}/{quote(rollout, safe='')}"


_ROLLOUTS: Final = Grid[Rollout](
    (
        Column("rollout", "rollout", lambda row: row.rollout, link=lambda row: _address(row.rollout)),
        Column("state", "state", _whole_state, state=True),
        Column("action", "action", lambda row: row.action),
        Column("release", "release wanted", lambda row: row.wanted,
               meaning="Version and digest of the configuration; none where machines were to run different ones."),
        Column("started", "begun", lambda row: row.started_at, kind="moment"),
        Column("ended", "ended", lambda row: row.ended_at, kind="moment"),
        Column("machines", "machines", lambda row: row.machines, kind="count"),
        Column("outcomes", "outcomes", _counts),
        Column("who", "who", lambda row: row.who),
    ),
    sort="-started",
)  # fmt: skip

_MACHINES: Final = Grid[MachineRollout](
    (
        Column("host", "machine", lambda row: row.host),
        Column("kind", "kind", lambda row: row.kind),
        Column("name", "name", lambda row: row.name),
        Column("outcome", "outcome", lambda row: _state(row.outcome), state=True),
        Column("found", "found", lambda row: row.found),
        Column("wanted", "wanted", lambda row: row.wanted),
        Column("running", "running", lambda row: row.running),
        Column("started", "begun", lambda row: row.started_at, kind="moment", common=False),
        Column("ended", "ended", lambda row: row.ended_at, kind="moment"),
        Column("why", "why", lambda row: row.sentence),
    ),
    sort="host",
)

_RELEASES: Final = Grid[MachineRelease](
    (
        Column("name", "name", lambda row: row.name),
        Column("kind", "kind", lambda row: row.kind),
        Column("host", "machine", lambda row: row.host),
        Column("drift", "as wanted", lambda row: "differs" if row.drift else "ok", state=True),
        Column("wanted", "wanted", lambda row: row.wanted),
        Column("running", "running", lambda row: row.running),
        Column("software", "says itself", lambda row: row.software,
               meaning="The version that the machine itself says at the broker."),
        Column("outcome", "latest outcome", lambda row: _state(row.outcome), state=True),
        Column("since", "since", lambda row: row.since, kind="ago"),
        Column("rollout", "by rollout", lambda row: row.rollout, link=lambda row: _address(row.rollout)),
    ),
    sort="name",
)  # fmt: skip


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

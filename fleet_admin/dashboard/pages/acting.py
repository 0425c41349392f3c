"""Acting on devices: first a preview of whom an act meets, then the act on exactly those, and what comes of it."""

from collections.abc import Sequence
from typing import Final

from starlette.responses import Response

from fleet_admin.dashboard.accounts.roles import Role
from fleet_admin.dashboard.acts import MOST_DEVICES, act_of
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.pages.devices import chosen_devices
from fleet_admin.dashboard.pages.page import Page, action
from fleet_admin.dashboard.visit import Visit
from fleet_admin.dashboard.web.body import parse_values
from schemas.errors import InvalidName
from schemas.names import check_name

_ALL: Final = "filter"


def preview(visit: Visit) -> Response:
    """Show whom an act meets; nothing is done."""
    act = act_of(visit.form("act"))
    if visit.form("whom") == _ALL:
        query = visit.admission.form.get("query", ("",))[-1]
        if not query.isascii():
            raise Problem(400, "The filter cannot be read; choose the devices again.")
        devices = chosen_devices(visit, parse_values(query.encode("ascii"), what="query"))
    else:
        devices = _checked(visit.admission.form.get("device", ()))
    if not devices:
        raise Problem(400, "No device is chosen; tick some, or choose all that the filter meets.")
    argument = " ".join(visit.form("argument").split())
    if act.required and not argument:
        raise Problem(400, f"{act.words}: say with what ({act.argument}), such as {act.example}.")
    if not act.argument and argument:
        raise Problem(400, f"{act.words} takes nothing beside; leave that field empty.")
    act.check(argument)
    absence = visit.services.steering.absence if act.live else ""
    return visit.page(
        "acting.html", title=act.words, act=act, argument=argument, devices=devices, problem=absence, absence=absence
    )


def act(visit: Visit) -> Response:
    """Begin it; a page of its own shows what comes of it."""
    wanted = act_of(visit.form("act"))
    devices = _checked(visit.admission.form.get("devices", ("",))[-1].split(","))
    services, argument, actor = visit.services, visit.form("argument"), visit.actor
    if wanted.live:
        services.steering.reach()
    job = services.jobs.begin(
        f"{wanted.words} {argument}".strip(),
        who=actor.who,
        now=visit.now,
        devices=len(devices),
        steps=lambda: wanted.run(services, devices, argument, actor),
    )
    return visit.redirect(f"/acts/{job.id}")


def show(visit: Visit) -> Response:
    """Show what has come of an act so far."""
    job = visit.services.jobs.find(visit.path("job"))
    outcomes = sorted(job.outcomes, key=lambda each: (each.state == "done", each.device))
    return visit.page("acted.html", title=job.words, job=job, outcomes=outcomes)


def _checked(names: Sequence[str]) -> list[str]:
    """Return the names of devices that a form has.

    Raises:
        Problem: One is none, or they are too many.
    """
    found = sorted({name for name in names if name})
    if len(found) > MOST_DEVICES:
        raise Problem(400, f"At most {MOST_DEVICES:,} devices are acted on at once; choose fewer.")
    try:
        return [check_name(name) for name in found]
    except InvalidName as error:
        raise Problem(400, str(error)) from None


PAGES: Final = (
    action("/devices/act", preview),
    action("/devices/act/do", act),
    Page("/acts/{job}", "Act", show, role=Role.OPERATOR),
)

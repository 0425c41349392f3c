"""Acting on devices: first a preview of whom an act meets, then the act on exactly those, and what came of it."""

from collections import Counter
from collections.abc import Sequence
from typing import Final

from starlette.responses import Response

from fleet_admin.dashboard.acts import MOST_DEVICES, act_of
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.pages.devices import chosen_devices
from fleet_admin.dashboard.pages.page import Page, action
from fleet_admin.dashboard.visit import Visit
from fleet_admin.dashboard.web.body import parse_values
from schemas.errors import InvalidName
from schemas.names import check_name

__all__ = ["PAGES"]

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
    return visit.page("acting.html", title=act.words, act=act, argument=visit.form("argument"), devices=devices)


def act(visit: Visit) -> Response:
    """Do it, and show what came of it at each device."""
    wanted = act_of(visit.form("act"))
    devices = _checked(visit.admission.form.get("devices", ("",))[-1].split(","))
    outcomes = sorted(wanted.run(visit, devices, visit.form("argument")), key=lambda each: each.device)
    counts = Counter(each.state for each in outcomes)
    return visit.page("acted.html", title=wanted.words, act=wanted, outcomes=outcomes, counts=counts)


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


PAGES: Final[tuple[Page, ...]] = (action("/devices/act", preview), action("/devices/act/do", act))

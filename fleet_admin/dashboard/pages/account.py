"""One's own account: password and API keys."""

import math
from typing import Final

from starlette.responses import Response

from fleet_admin.dashboard.accounts.attempts import Attempt
from fleet_admin.dashboard.accounts.roles import Role
from fleet_admin.dashboard.errors import AccountError
from fleet_admin.dashboard.pages.page import Page, action
from fleet_admin.dashboard.visit import Visit
from fleet_common.validation import read_duration

_PATH: Final = "/account"


def show(visit: Visit) -> Response:
    """Show the account, its keys, and forms to change them."""
    return _page(visit)


def change_password(visit: Visit) -> Response:
    """Take another password; every browser of the account has to log in again."""
    visitor, form = visit.visitor, visit.admission.form
    old, new, again = (form.get(each, ("",))[-1] for each in ("old", "new", "again"))
    services = visit.services
    attempt = Attempt(visitor.address, visitor.name, browser=f"of {visitor.name}")  # it is logged in
    if (wait_s := services.attempts.take(attempt)) > 0:
        return _page(visit, problem=f"There were too many attempts; try again in {math.ceil(wait_s)} s.", status=429)
    if not services.accounts.check(visitor.name, old):
        return _page(visit, problem="That is not the password up to now.", status=403)
    services.attempts.succeeded(attempt)
    if new != again:
        return _page(visit, problem="The two new passwords differ.", status=400)
    try:
        services.accounts.set_password(visitor.name, new, actor=visit.actor)
    except AccountError as error:
        return _page(visit, problem=str(error), status=400)
    response = visit.redirect(_PATH, said="The password is changed; other browsers have to log in again.")
    visit.give_cookie(response, services.logins.begin(visitor.name, address=visitor.address))
    visit.remember_browser(response, visitor.name)
    return response


def add_key(visit: Visit) -> Response:
    """Make a key, and show it this once."""
    visitor = visit.visitor
    try:
        lasts = read_duration(visit.form("lasts")) if visit.form("lasts") else None
        role = Role(visit.form("role", Role.VIEWER))
        key = visit.services.keys.add(
            visit.form("name"), account=visitor.name, role=role, actor=visit.actor, lasts=lasts
        )
    except (AccountError, ValueError, OverflowError) as error:
        return _page(visit, problem=str(error), status=400)
    # Not by way of another page: a secret should be in one answer alone.
    return _page(visit, key=key)


def remove_key(visit: Visit) -> Response:
    try:
        removed = visit.services.keys.remove(visit.form("id"), account=visit.visitor.name, actor=visit.actor)
    except AccountError as error:
        return _page(visit, problem=str(error), status=404)
    return visit.redirect(_PATH, said=f"The key {removed.name} is no longer taken.")


def _page(visit: Visit, *, problem: str = "", key: str = "", status: int = 200) -> Response:
    return visit.page(
        "account.html",
        title="Account",
        status=status,
        keys=visit.services.keys.list(account=visit.visitor.name),
        problem=problem,
        key=key,
        roles=list(Role) if visit.may_act else [Role.VIEWER],
    )


PAGES: Final = (
    Page(_PATH, "Account", show),
    action(f"{_PATH}/password", change_password, role=Role.VIEWER),
    action(f"{_PATH}/keys/add", add_key),
    action(f"{_PATH}/keys/remove", remove_key),
)

"""Login and logout."""

import math
from typing import Final

from starlette.responses import Response

from fleet_admin.dashboard.accounts.attempts import Attempt
from fleet_admin.dashboard.accounts.roles import Role
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.pages.page import Page, action
from fleet_admin.dashboard.visit import Visit
from fleet_admin.dashboard.web.gate import cookie_name

_MOST_NAME: Final = 63


def show(visit: Visit) -> Response:
    return _form(visit)


def log_in(visit: Visit) -> Response:
    """Check a name and a password."""
    name, address = visit.form("account"), visit.admission.origin.address
    # As it was typed: a password may begin with a space.
    password = visit.admission.form.get("password", ("",))[-1]
    services = visit.services
    browser = services.accounts.familiar(name, visit.browser)
    attempt = Attempt(address, name[:_MOST_NAME], browser)
    wait_s = services.attempts.take(attempt)
    if wait_s > 0:
        raise Problem(
            429,
            f"There were too many attempts; try again in {math.ceil(wait_s)} s.",
            retry_after_s=math.ceil(wait_s),
        )
    if not services.accounts.check(name, password):
        return _form(visit, problem="This name and this password do not belong together.", status=403)
    services.attempts.succeeded(attempt)
    response = visit.redirect(own_path(visit.form("next")))
    visit.give_cookie(response, services.logins.begin(name, address=address))
    if browser is None:
        visit.remember_browser(response, name)
    return response


def log_out(visit: Visit) -> Response:
    """End the login, here and in the database."""
    visit.services.logins.end(visit.admission.cookie)
    response = visit.redirect("/login")
    secure = visit.admission.origin.secure
    response.delete_cookie(cookie_name(secure=secure), secure=secure, httponly=True, samesite="lax")
    return response


def own_path(text: str) -> str:
    """Return a path of these pages as it is, and the first page for anything else: `//elsewhere` is a host."""
    if not text.startswith("/") or text.startswith(("//", "/\\", "/login", "/logout")) or not text.isascii():
        return "/"
    return text if text.isprintable() and "\\" not in text else "/"


def _form(visit: Visit, *, problem: str = "", status: int = 200) -> Response:
    again = visit.form("next") or visit.query("next") if visit.admission.form or visit.admission.query else ""
    return visit.page("login.html", title="Log in", status=status, next=own_path(again), problem=problem)


PAGES: Final = (
    Page("/login", "Log in", show),
    action("/login", log_in, role=Role.VIEWER),
    action("/logout", log_out, role=Role.VIEWER),
)

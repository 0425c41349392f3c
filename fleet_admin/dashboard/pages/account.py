"""Pages of one's own account: password, login and logout."""

import math
from typing import Final

from starlette.responses import RedirectResponse, Response

from fleet_admin.dashboard.errors import AccountError, Problem
from fleet_admin.dashboard.gate import cookie_name
from fleet_admin.dashboard.settings import AccountRole
from fleet_admin.dashboard.visit import Page, Visit, action

_PATH: Final = "/account"


def change_password(visit: Visit) -> Response:
    """Change the password and log out every browser of the account."""
    visitor, form = visit.visitor, visit.admission.form
    old, new, again = (form.get(each, "") for each in ("old", "new", "again"))
    services = visit.services
    if (wait_s := services.attempts.take(visitor.address)) > 0:
        return _page(visit, problem=f"Too many attempts; try again in {math.ceil(wait_s)} s.", status=429)
    if not services.accounts.check(visitor.name, old):
        return _page(visit, problem="The current password is wrong.", status=403)
    services.attempts.succeeded(visitor.address)
    if new != again:
        return _page(visit, problem="The two new passwords differ.", status=400)
    try:
        services.accounts.set_password(visitor.name, new, actor=visit.actor)
    except AccountError as error:
        return _page(visit, problem=str(error), status=400)
    response = RedirectResponse(f"{_PATH}?changed=1", 303)
    visit.give_cookie(response, services.logins.begin(visitor.name, address=visitor.address))
    return response


def _page(visit: Visit, *, problem: str = "", status: int = 200) -> Response:
    return visit.page("account.html", title="Account", status=status, problem=problem)


def log_in(visit: Visit) -> Response:
    name, address = visit.form("account"), visit.admission.address
    # Not stripped: a password may begin with a space.
    password = visit.admission.form.get("password", "")
    services = visit.services
    if (wait_s := services.attempts.take(address, name)) > 0:
        raise Problem(
            429,
            f"Too many attempts; try again in {math.ceil(wait_s)} s.",
            retry_after_s=math.ceil(wait_s),
        )
    if not services.accounts.check(name, password):
        return _form(visit, problem="The name or the password is wrong.", status=403)
    services.attempts.succeeded(address, name)
    response = RedirectResponse(own_path(visit.form("next")), 303)
    visit.give_cookie(response, services.logins.begin(name, address=address))
    return response


def log_out(visit: Visit) -> Response:
    visit.services.logins.end(visit.admission.cookie)
    response = RedirectResponse("/login", 303)
    secure = visit.admission.secure
    response.delete_cookie(cookie_name(secure=secure), secure=secure, httponly=True, samesite="lax")
    return response


def own_path(text: str) -> str:
    """Return a path of these pages; the first page for anything else, because `//elsewhere` is a host."""
    if not text.startswith("/") or text.startswith(("//", "/\\", "/login", "/logout")) or not text.isascii():
        return "/"
    return text if text.isprintable() and "\\" not in text else "/"


def _form(visit: Visit, *, problem: str = "", status: int = 200) -> Response:
    again = own_path(visit.form("next") or visit.query("next"))
    return visit.page("login.html", title="Log in", status=status, next=again, problem=problem)


PAGES: Final = (
    Page(_PATH, "Account", _page),
    action(f"{_PATH}/password", change_password, role=AccountRole.VIEWER),
    Page("/login", "Log in", _form),
    action("/login", log_in, role=AccountRole.VIEWER),
    action("/logout", log_out, role=AccountRole.VIEWER),
)

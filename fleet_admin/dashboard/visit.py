"""Requests to pages, and the responses that a page can give."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from fleet_admin.dashboard.accounts import new_token
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.gate import CSRF_FIELD, Admission, cookie_name
from fleet_admin.dashboard.rendering import render
from fleet_admin.dashboard.services import Services
from fleet_admin.dashboard.settings import AccountRole, Visitor
from fleet_admin.steering.planning import Actor

_LONGEST: Final = 200
"""Most characters of a value in an address."""

_BROWSER_S: Final = 180 * 86_400
"""Seconds for which a browser is remembered."""


@dataclass(frozen=True, slots=True)
class Visit:
    request: Request
    admission: Admission
    services: Services
    now: datetime
    menu: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def visitor(self) -> Visitor:
        """Return the visitor; raises `Problem` if not logged in."""
        if self.admission.visitor is None:
            raise Problem(401, "Log in first.")
        return self.admission.visitor

    @property
    def actor(self) -> Actor:
        return Actor(self.visitor.name, self.visitor.address)

    @property
    def may_act(self) -> bool:
        return self.admission.visitor is not None and self.admission.visitor.role.includes(AccountRole.OPERATOR)

    def path(self, name: str) -> str:
        value: str = self.request.path_params[name]
        if len(value) > _LONGEST:
            raise Problem(404, "There is nothing of that name.")
        return value

    def query(self, name: str, default: str = "") -> str:
        return self._value(self.admission.query, name, default)

    def form(self, name: str, default: str = "") -> str:
        return self._value(self.admission.form, name, default)

    def forms(self, name: str) -> tuple[str, ...]:
        return tuple(each.strip()[:_LONGEST] for each in self.admission.form.get(name, ()))

    def page(self, template: str, *, title: str, status: int = 200, **values: Any) -> Response:  # noqa: ANN401
        """Respond with a page; its template gets the values, and the visit as `visit`."""
        cookie, fresh = self.admission.cookie, False
        if not cookie:
            # Every form needs a cookie against forged requests, also that of the login.
            cookie, fresh = new_token(), True
        admission = replace(self.admission, cookie=cookie, query={}, form={})
        said = self.query("said")
        name = self.admission.visitor.name if self.admission.visitor else ""
        content = render(
            template,
            {
                "visit": self,
                "title": title,
                "csrf": admission.csrf,
                "csrf_field": CSRF_FIELD,
                "here": self.here(),
                "said": self.services.said.take(name, said) if said else None,
                **({"status": status} if status != 200 else {}),  # noqa: PLR2004 - HTTP's own number
                **values,
            },
        )
        response = HTMLResponse(content, status)
        if fresh:
            self.give_cookie(response, cookie)
        return response

    def here(self, **changes: str | None) -> str:
        """Return this page's address with some query fields changed, or removed where None."""
        kept = {name: values for name, values in self.admission.query.items() if name not in {"said", *changes}}
        pairs = [(name, value) for name, values in kept.items() for value in values]
        pairs += [(name, value) for name, value in changes.items() if value is not None]
        return self.request.url.path + (f"?{urlencode(pairs)}" if pairs else "")

    def redirect(self, path: str, *, said: str = "") -> Response:
        """Redirect to one of our pages, which shows the message `said` once.

        `path` begins with one slash, and was checked if it comes from the request.
        """
        if said:
            name = self.services.said.keep(self.visitor.name, said)
            path += f"{'&' if '?' in path else '?'}said={name}"
        return RedirectResponse(path, 303)

    def give_cookie(self, response: Response, value: str) -> None:
        """Set a cookie that scripts cannot read and that forms of other sites do not send."""
        secure = self.admission.origin.secure
        response.set_cookie(cookie_name(secure=secure), value, secure=secure, httponly=True, samesite="lax", path="/")

    @property
    def browser(self) -> str:
        """Return the token set by `remember_browser`; empty if none."""
        return self.request.cookies.get(_browser_cookie(secure=self.admission.origin.secure), "")

    def remember_browser(self, response: Response, account: str) -> None:
        """Set a token after a login, so that guesses by others do not slow this browser down."""
        token, secure = self.services.accounts.browser_token(account), self.admission.origin.secure
        if token is not None:
            response.set_cookie(
                _browser_cookie(secure=secure),
                token,
                max_age=_BROWSER_S,
                secure=secure,
                httponly=True,
                samesite="lax",
                path="/",
            )

    @staticmethod
    def _value(values: Mapping[str, tuple[str, ...]], name: str, default: str) -> str:
        value = values.get(name, (default,))[-1].strip()
        if len(value) > _LONGEST:
            raise Problem(400, f"The field {name} has more than {_LONGEST} characters; shorten it.")
        return value


def _browser_cookie(*, secure: bool) -> str:
    return f"{cookie_name(secure=secure)}-browser"


@dataclass(frozen=True, slots=True)
class Page:
    """A page, or the target of a form; `answer` is called on a thread and may block."""

    path: str
    title: str
    answer: Callable[[Visit], Response]
    menu: bool = False
    method: str = "GET"
    role: AccountRole = AccountRole.VIEWER


def action(path: str, answer: Callable[[Visit], Response], *, role: AccountRole = AccountRole.OPERATOR) -> Page:
    """Return the target of a form; for operators by default."""
    return Page(path, "", answer, method="POST", role=role)

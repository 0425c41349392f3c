"""Visit: one request to a page, with who asks, what they ask by, and the answers that a page can give."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from fleet_admin.dashboard.accounts.roles import Role, Visitor
from fleet_admin.dashboard.accounts.secrets import new_token
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.rendering import render
from fleet_admin.dashboard.services import Services
from fleet_admin.dashboard.web.gate import CSRF_FIELD, Admission, cookie_name
from fleet_admin.steering.views import Actor

_LONGEST: Final = 200
"""Characters of a value that a page is chosen by."""

_BROWSER_S: Final = 180 * 86_400
"""Seconds for which a browser is remembered."""


@dataclass(frozen=True, slots=True)
class Visit:
    """One request.

    Attributes:
        request: As it came.
        admission: What the gate has found out of it.
        services: What pages are made of.
        now: When it came (UTC).
        menu: Entries of the menu: path, title.
    """

    request: Request
    admission: Admission
    services: Services
    now: datetime
    menu: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def visitor(self) -> Visitor:
        """Who asks.

        Raises:
            Problem: Nobody who is known.
        """
        if self.admission.visitor is None:
            raise Problem(401, "Log in first.")
        return self.admission.visitor

    @property
    def actor(self) -> Actor:
        """Who acts, for the audit log."""
        return Actor(self.visitor.name, self.visitor.address)

    @property
    def may_act(self) -> bool:
        """Whether whoever asks may change things: what only operators can do is not shown to others."""
        return self.admission.visitor is not None and self.admission.visitor.role.includes(Role.OPERATOR)

    def path(self, name: str) -> str:
        """Return a part of the path."""
        value: str = self.request.path_params[name]
        if len(value) > _LONGEST:
            raise Problem(404, "There is nothing of that name.")
        return value

    def query(self, name: str, default: str = "") -> str:
        """Return the last value of a field of the query, without spaces around it."""
        return self._value(self.admission.query, name, default)

    def form(self, name: str, default: str = "") -> str:
        """Return the last value of a field of the form, without spaces around it."""
        return self._value(self.admission.form, name, default)

    def forms(self, name: str) -> tuple[str, ...]:
        """Return all values of a field of the form."""
        return tuple(each.strip()[:_LONGEST] for each in self.admission.form.get(name, ()))

    def page(self, template: str, *, title: str, status: int = 200, **values: Any) -> Response:  # noqa: ANN401
        """Answer with a page; its template gets the values, and the visit as `visit`."""
        cookie, fresh = self.admission.cookie, False
        if not cookie:
            # Forms need a cookie to be told from those of other pages, also that of the login.
            cookie, fresh = new_token(), True
        admission = Admission(
            origin=self.admission.origin, visitor=self.admission.visitor, cookie=cookie, query={}, form={}, body=b""
        )
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
                **values,
            },
        )
        response = HTMLResponse(content, status)
        if fresh:
            self.give_cookie(response, cookie)
        return response

    def here(self, **changes: str | None) -> str:
        """Return the address of this page, with some fields of its query changed, or left out where None."""
        kept = {name: values for name, values in self.admission.query.items() if name not in {"said", *changes}}
        pairs = [(name, value) for name, values in kept.items() for value in values]
        pairs += [(name, value) for name, value in changes.items() if value is not None]
        return self.request.url.path + (f"?{urlencode(pairs)}" if pairs else "")

    def redirect(self, path: str, *, said: str = "") -> Response:
        """Answer a form: have the browser load a page of ours, which shows a sentence once.

        Args:
            path: Begins with one slash, and was not taken from the request without a check.
            said: The sentence.
        """
        if said:
            name = self.services.said.keep(self.visitor.name, said)
            path += f"{'&' if '?' in path else '?'}said={name}"
        return RedirectResponse(path, 303)

    def give_cookie(self, response: Response, value: str) -> None:
        """Have the browser keep a cookie that scripts cannot read and other pages' forms do not carry."""
        secure = self.admission.origin.secure
        response.set_cookie(cookie_name(secure=secure), value, secure=secure, httponly=True, samesite="lax", path="/")

    @property
    def browser(self) -> str:
        """What `remember_browser` has given the browser; empty if nothing."""
        return self.request.cookies.get(_browser_cookie(secure=self.admission.origin.secure), "")

    def remember_browser(self, response: Response, account: str) -> None:
        """Have the browser keep a token of having logged in under an account: other people's guesses do not slow it."""
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

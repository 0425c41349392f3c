"""Requests to pages, and the responses that a page can give."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlencode

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from fleet_admin.dashboard.accounts import csrf_token, new_token
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.gate import CSRF_FIELD, Admission, cookie_name
from fleet_admin.dashboard.rendering import render
from fleet_admin.dashboard.services import Services
from fleet_admin.dashboard.settings import AccountRole, Visitor
from fleet_admin.steering.planning import Actor

_LONGEST: Final = 200
"""Most characters of a value in an address."""


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

    def page(self, template: str, *, title: str, status: int = 200, **values: Any) -> Response:  # noqa: ANN401
        """Respond with a page; its template gets the values, and the visit as `visit`."""
        cookie = self.admission.cookie or new_token()  # every form needs one against forged requests
        content = render(
            template,
            {
                "visit": self,
                "title": title,
                "csrf": csrf_token(cookie),
                "csrf_field": CSRF_FIELD,
                "here": self.here(),
                **({"status": status} if status != 200 else {}),  # noqa: PLR2004 - HTTP's own number
                **values,
            },
        )
        response = HTMLResponse(content, status)
        if cookie != self.admission.cookie:
            self.give_cookie(response, cookie)
        return response

    def here(self, **changes: str | None) -> str:
        """Return this page's address with some query fields changed, or removed where None."""
        pairs = [pair for pair in self.admission.query.multi_items() if pair[0] not in changes]
        pairs += [(name, value) for name, value in changes.items() if value is not None]
        return self.request.url.path + (f"?{urlencode(pairs)}" if pairs else "")

    def give_cookie(self, response: Response, value: str) -> None:
        """Set a cookie that scripts cannot read and that forms of other sites do not send."""
        secure = self.admission.secure
        response.set_cookie(cookie_name(secure=secure), value, secure=secure, httponly=True, samesite="lax", path="/")

    @staticmethod
    def _value(values: QueryParams, name: str, default: str) -> str:
        value = values.get(name, default).strip()
        if len(value) > _LONGEST:
            raise Problem(400, f"The field {name} has more than {_LONGEST} characters; shorten it.")
        return value


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

"""Gate: every request passes here first, and what is not allowed ends here.

In this order: the name that it was sent to, who sends it, whether it is a page of ours that sends it, its body. A route
that nobody thought of is therefore shut to whoever is not logged in, and closed to forms of other pages.
"""

import hmac
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

import anyio.to_thread
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fleet_admin.dashboard.accounts.accounts import Accounts
from fleet_admin.dashboard.accounts.keys import ApiKeys
from fleet_admin.dashboard.accounts.logins import Logins
from fleet_admin.dashboard.accounts.roles import Visitor
from fleet_admin.dashboard.accounts.secrets import csrf_token
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.settings import DashboardSettings
from fleet_admin.dashboard.web.body import Values, parse_values, read_body
from fleet_admin.dashboard.web.headers import security_headers
from fleet_admin.dashboard.web.origin import Origin, origin_of
from schemas.errors import FleetError, InvalidName
from schemas.names import check_name

CSRF_FIELD: Final = "csrf"
"""Field of every form, which only a page that the cookie's browser was sent can know."""

API: Final = "/api/"
_OPEN: Final = frozenset({"/healthz", "/login"})
_OPEN_FOLDER: Final = "/static/"
_SAFE: Final = frozenset({"GET", "HEAD"})
_FORM: Final = "application/x-www-form-urlencoded"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Admission:
    """What the gate has found out of a request.

    Attributes:
        origin: Where it comes from.
        visitor: Who sends it; None only where anybody may.
        cookie: That of its login; empty without.
        query: The fields behind the question mark.
        form: The fields of its body.
        body: Its body, as it came.
    """

    origin: Origin
    visitor: Visitor | None
    cookie: str
    query: Values
    form: Values
    body: bytes

    @property
    def csrf(self) -> str:
        """What the forms of the answer have to carry."""
        return csrf_token(self.cookie)


def cookie_name(*, secure: bool) -> str:
    """Return the name of the login's cookie: over TLS one that no other host of the domain can set."""
    return "__Host-fleet" if secure else "fleet"


class Gate:
    """ASGI middleware.

    Args:
        app: What it guards; finds an `Admission` in its `state.admission`.
        settings: Of the dashboard.
        accounts: Roles of those whom a proxy names.
        logins: Whose cookies are taken.
        keys: Which are taken.
        refuse: Makes the answer to a request that ends here.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: DashboardSettings,
        accounts: Accounts,
        logins: Logins,
        keys: ApiKeys,
        refuse: Callable[[Request, Exception], Response],
    ) -> None:
        self._app = app
        self._settings = settings
        self._trusted = settings.trusted()
        self._names = settings.allowed_names()
        self._accounts = accounts
        self._logins = logins
        self._keys = keys
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"  # neither lifespan nor WebSocket is switched on
        origin = origin_of(scope, trusted=self._trusted)

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *security_headers(secure=origin.secure)]
                headers = MutableHeaders(scope=message)
                if "cache-control" not in headers:
                    headers["cache-control"] = "no-store"
            await send(message)

        try:
            admission = await self._admit(scope, receive, origin)
        except FleetError as problem:
            await self._turn_away(scope, problem, origin)(scope, receive, send_safely)
            return
        scope.setdefault("state", {})["admission"] = admission
        await self._app(scope, receive, send_safely)

    async def _admit(self, scope: Scope, receive: Receive, origin: Origin) -> Admission:
        if not origin.named(self._names):
            raise Problem(421, "This dashboard does not answer under that name; its setting `names` lists its names.")
        if "\0" in scope["path"]:
            raise Problem(400, "The path holds a NUL character, which no name has.")
        query = parse_values(scope.get("query_string", b""), what="query")
        request, method, path = Request(scope), scope["method"], scope["path"]
        cookie = request.cookies.get(cookie_name(secure=origin.secure), "")
        open_to_all = path in _OPEN or path.startswith(_OPEN_FOLDER)
        visitor = None
        if not open_to_all:
            visitor = await anyio.to_thread.run_sync(self._recognise, request, origin, cookie)
            if visitor is None:
                raise Problem(401, "Log in first, or send an API key.")
        form: Values = {}
        body = b""
        if method not in _SAFE:
            body = await read_body(scope, receive)
            if visitor is None or visitor.by != "key":
                form = self._form(request, body, origin, cookie)
        return Admission(origin, visitor, cookie, query, form, body)

    def _recognise(self, request: Request, origin: Origin, cookie: str) -> Visitor | None:
        kind, _, shown = request.headers.get("authorization", "").partition(" ")
        if request.url.path.startswith(API) and kind.lower() == "bearer":
            return self._keys.find(shown.strip(), address=origin.address)
        if (name := self._named_by_proxy(request.headers, origin)) is not None:
            role = self._accounts.role(name) or self._settings.proxy_role
            return None if role is None else Visitor(name, role, "proxy", origin.address)
        login = self._logins.find(cookie) if cookie else None
        return None if login is None else Visitor(login.account, login.role, "login", origin.address)

    def _named_by_proxy(self, headers: Headers, origin: Origin) -> str | None:
        if not (self._settings.proxy_account and origin.proxied):
            return None
        said = headers.getlist(self._settings.proxy_account)
        try:
            return check_name(said[0]) if len(said) == 1 else None
        except InvalidName:
            return None

    def _form(self, request: Request, body: bytes, origin: Origin, cookie: str) -> Values:
        """Return the form, if a page of ours has sent it."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != _FORM:
            raise Problem(415, "Changes are sent as a form of these pages, or with an API key.")
        form = parse_values(body, what="form")
        shown = form.get(CSRF_FIELD, ("",))[0]
        right = hmac.compare_digest(shown.encode("utf-8", "replace"), csrf_token(cookie).encode())
        if not right or not cookie or request.headers.get("origin", "").lower() != origin.url:
            raise Problem(403, "This form does not come from a page of this dashboard, or is too old; load it again.")
        return form

    def _turn_away(self, scope: Scope, problem: FleetError, origin: Origin) -> Response:
        request = Request(scope)
        unknown = isinstance(problem, Problem) and problem.status == 401  # noqa: PLR2004 - HTTP's own number
        if unknown and not scope["path"].startswith(API) and scope["method"] in _SAFE:
            # htmx would put the login into the middle of a page; this has it load the page anew.
            if "hx-request" in request.headers:
                return Response(status_code=204, headers={"HX-Refresh": "true"})
            here = scope["path"] + (f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else "")
            return RedirectResponse(f"/login?next={quote(here[:1000], safe='')}", 303)
        _log.info("Refused %s from %s: %s", scope["method"], origin.address, problem)
        return self._refuse(request, problem)

"""Gate: middleware that every request passes after the proxies' headers are read.

It checks, in this order: the requested host name, the sender, whether the request comes from our pages, the body. So a
route without checks of its own is closed to anonymous visitors and to forms of other sites.
"""

import hmac
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

import anyio.to_thread
from starlette.datastructures import MutableHeaders, QueryParams
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from fleet_admin.dashboard.accounts import Accounts, Logins, csrf_token
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.settings import DashboardSettings, Visitor
from fleet_common.http_server import LOOPBACK, is_named
from schemas.errors import FleetError, InvalidName
from schemas.names import check_name

_MAX_BYTES: Final = 256 * 1024
_MAX_QUERY: Final = 8_000


class Proxies(ProxyHeadersMiddleware):
    """ASGI middleware that takes client and scheme from a trusted proxy, and notes as `state.proxied` that it did."""

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def] # noqa: ANN001
        client = scope.get("client")
        scope.setdefault("state", {})["proxied"] = client is not None and client[0] in self.trusted_hosts
        await super().__call__(scope, receive, send)


async def read_body(request: Request) -> bytes:
    """Read a request's body; raises `Problem` if it is too large."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MAX_BYTES:
            raise Problem(413, f"The body has more than {_MAX_BYTES:,} bytes; send less at once.")
    return bytes(body)


def parse_values(encoded: bytes) -> QueryParams:
    """Parse an urlencoded form or query; raises `Problem` if a value cannot be stored."""
    values = QueryParams(encoded.decode("latin-1"))
    if any("\0" in text for pair in values.multi_items() for text in pair):
        raise Problem(400, "A field holds a NUL character, which is not allowed.")
    return values


CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""No inline script and style, so that a missing escape has no effect."""

_ALWAYS: Final[Mapping[str, str]] = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Not `no-referrer`: with it browsers send forms with the origin `null`, which other sites send too.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}

_OVER_TLS: Final[Mapping[str, str]] = {"strict-transport-security": "max-age=31536000"}

CSRF_FIELD: Final = "csrf"
"""Field of every form, known only to pages sent to the cookie's browser."""

_OPEN: Final = frozenset({"/healthz", "/login"})
_OPEN_FOLDER: Final = "/static/"
_SAFE: Final = frozenset({"GET", "HEAD"})
_FORM: Final = "application/x-www-form-urlencoded"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Admission:
    """What the gate knows about a request; `visitor` is None only on public paths, `secure` is for TLS."""

    address: str
    secure: bool
    visitor: Visitor | None
    cookie: str
    query: QueryParams
    form: QueryParams


def cookie_name(*, secure: bool) -> str:
    """Return the login cookie's name: over TLS one that no other host of the domain can set."""
    return "__Host-fleet" if secure else "fleet"


class Gate:
    """ASGI middleware that admits or refuses requests; `app` finds an `Admission` in its `state.admission`."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: DashboardSettings,
        accounts: Accounts,
        logins: Logins,
        refuse: Callable[[Request, Exception], Response],
    ) -> None:
        self._app = app
        self._settings = settings
        self._names = LOOPBACK | settings.allowed_names()
        self._accounts = accounts
        self._logins = logins
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"  # neither lifespan nor WebSocket is switched on
        started = False

        async def send_safely(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers.update({**_ALWAYS, **(_OVER_TLS if scope["scheme"] == "https" else {})})
                headers.setdefault("cache-control", "no-store")
            await send(message)

        request = Request(scope, receive)
        try:
            request.state.admission = await self._admit(request)
            await self._app(scope, receive, send_safely)
        except Exception as error:
            if started:
                raise
            await self._turn_away(request, error)(scope, receive, send_safely)

    async def _admit(self, request: Request) -> Admission:
        path, query = request.scope["path"], request.scope.get("query_string", b"")
        if not is_named(request.scope, self._names):
            raise Problem(421, "This dashboard does not answer under that name; its setting `names` lists its names.")
        if "\0" in path:
            raise Problem(400, "The path holds a NUL character, which is not allowed.")
        if len(query) > _MAX_QUERY:
            raise Problem(414, f"The query has more than {_MAX_QUERY:,} characters; use fewer filters.")
        values = parse_values(query)
        secure, address = request.url.scheme == "https", request.client.host if request.client else ""
        cookie = request.cookies.get(cookie_name(secure=secure), "")
        visitor = None
        if path not in _OPEN and not path.startswith(_OPEN_FOLDER):
            visitor = await anyio.to_thread.run_sync(self._recognise, request, address, cookie)
            if visitor is None:
                raise Problem(401, "Log in first.")
        form = QueryParams() if request.method in _SAFE else self._form(request, await read_body(request), cookie)
        return Admission(address, secure, visitor, cookie, values, form)

    def _recognise(self, request: Request, address: str, cookie: str) -> Visitor | None:
        if (name := self._named_by_proxy(request)) is not None:
            role = self._accounts.role(name)
            return None if role is None else Visitor(name, role, "proxy", address)
        login = self._logins.find(cookie) if cookie else None
        return None if login is None else Visitor(login.account, login.role, "login", address)

    def _named_by_proxy(self, request: Request) -> str | None:
        if not (self._settings.proxy_account and request.state.proxied):
            return None
        said = request.headers.getlist(self._settings.proxy_account)
        try:
            return check_name(said[0]) if len(said) == 1 else None
        except InvalidName:
            return None

    def _form(self, request: Request, body: bytes, cookie: str) -> QueryParams:
        """Return the form if one of our pages has sent it."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != _FORM:
            raise Problem(415, "Changes are sent as a form of these pages.")
        form = parse_values(body)
        right = hmac.compare_digest(form.get(CSRF_FIELD, "").encode("utf-8", "replace"), csrf_token(cookie).encode())
        ours = f"{request.url.scheme}://{request.headers['host']}".lower()
        if not right or not cookie or request.headers.get("origin", "").lower() != ours:
            raise Problem(403, "This form does not come from a page of this dashboard, or is too old; load it again.")
        return form

    def _turn_away(self, request: Request, error: Exception) -> Response:
        unknown = isinstance(error, Problem) and error.status == 401  # noqa: PLR2004 - HTTP's own number
        if unknown and request.method in _SAFE:
            # htmx would insert the login into the page; this header makes it reload the page.
            if "hx-request" in request.headers:
                return Response(status_code=204, headers={"HX-Refresh": "true"})
            query = request.scope["query_string"].decode("latin-1")
            here = request.scope["path"] + (f"?{query}" if query else "")
            return RedirectResponse(f"/login?next={quote(here[:1000], safe='')}", 303)
        if isinstance(error, FleetError):
            _log.info("Refused %s: %s", request.method, error)
        return self._refuse(request, error)

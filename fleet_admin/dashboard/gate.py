"""Gate: middleware that every request passes first.

It checks, in this order: the requested host name, the sender, whether the request comes from our pages, the body. So a
route without checks of its own is closed to anonymous visitors and to forms of other sites.
"""

import hmac
import ipaddress
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, quote

import anyio.to_thread
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fleet_admin.dashboard.accounts import Accounts, Logins, csrf_token
from fleet_admin.dashboard.errors import Problem
from fleet_admin.dashboard.settings import DashboardSettings, Network, Visitor
from schemas.errors import FleetError, InvalidName
from schemas.names import check_name

_OF_THIS_MACHINE: Final = frozenset({"127.0.0.1", "localhost", "[::1]"})


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request comes from and goes to.

    Attributes:
        address: Of the client, or of the last untrusted proxy.
        secure: Whether the client used TLS, with us or with a trusted proxy.
        proxied: Whether a trusted proxy forwarded it, so that its headers are trusted.
        host: The Host header, with its port.
    """

    address: str
    secure: bool
    proxied: bool
    host: str

    def named(self, allowed: frozenset[str]) -> bool:
        """A request to another name than ours is DNS rebinding."""
        host = self.host.lower()
        name, colon, port = host.rpartition(":")
        name = name if colon and port.isascii() and port.isdigit() else host
        return name in _OF_THIS_MACHINE or name in allowed or host in allowed

    @property
    def url(self) -> str:
        """Return the origin of our pages, as browsers write it."""
        return f"{'https' if self.secure else 'http'}://{self.host}".lower()


def origin_of(scope: Scope, *, trusted: Sequence[Network]) -> Origin:
    """Return a request's origin. With two Host headers, `host` is empty."""
    headers = Headers(scope=scope)
    hosts = headers.getlist("host")
    client = scope.get("client")
    address = str(client[0]) if client else ""
    secure, proxied = scope.get("scheme") == "https", _within(address, trusted)
    if proxied:
        secure = headers.get("x-forwarded-proto", "").split(",")[-1].strip().lower() == "https"
        passed = [each.strip() for line in headers.getlist("x-forwarded-for") for each in line.split(",")]
        # From the right: entries left of the first untrusted one may be forged.
        address = next((each for each in reversed(passed) if each and not _within(each, trusted)), address)
    return Origin(_plain(address), secure, proxied, hosts[0] if len(hosts) == 1 else "")


def _within(address: str, trusted: Sequence[Network]) -> bool:
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(known in network for network in trusted if network.version == known.version)


def _plain(address: str) -> str:
    """Return the address alone: a header may hold anything."""
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        return "unknown"


_MAX_BYTES: Final = 256 * 1024
_MAX_FIELDS: Final = 4_000  # a box ticked for each of some thousand devices
_MAX_QUERY: Final = 8_000

Values = Mapping[str, tuple[str, ...]]
"""Fields of a form or of a query, each with all of its values."""


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """Read a request's body; raises `Problem` if it is too large or the client disconnects."""
    length = Headers(scope=scope).get("content-length", "0")
    if not length.isascii() or not length.isdigit() or int(length) > _MAX_BYTES:
        raise Problem(413, f"The body has more than {_MAX_BYTES:,} bytes; send less at once.")
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Problem(400, "The connection was closed before the whole body had come.")
        body += message.get("body", b"")
        if len(body) > _MAX_BYTES:
            raise Problem(413, f"The body has more than {_MAX_BYTES:,} bytes; send less at once.")
        if not message.get("more_body", False):
            return bytes(body)


def parse_values(encoded: bytes, *, what: str) -> Values:
    """Parse an urlencoded form or query; raises `Problem` if it is invalid or has too many fields."""
    if what == "query" and len(encoded) > _MAX_QUERY:
        raise Problem(414, f"The query has more than {_MAX_QUERY:,} characters; use fewer filters.")
    try:
        pairs = parse_qsl(encoded.decode("ascii"), keep_blank_values=True, max_num_fields=_MAX_FIELDS, errors="strict")
    except ValueError:
        raise Problem(400, f"The {what} cannot be read; send it as a browser's form does.") from None
    if any("\0" in name or "\0" in value for name, value in pairs):
        raise Problem(400, f"The {what} holds a NUL character, which is not allowed.")
    values: dict[str, list[str]] = {}
    for name, value in pairs:
        values.setdefault(name, []).append(value)
    return {name: tuple(each) for name, each in values.items()}


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


def security_headers(*, secure: bool) -> list[tuple[bytes, bytes]]:
    """Return the security headers in ASGI's form; over TLS with HSTS."""
    headers = {**_ALWAYS, **(_OVER_TLS if secure else {})}
    return [(name.encode(), value.encode()) for name, value in headers.items()]


CSRF_FIELD: Final = "csrf"
"""Field of every form, known only to pages sent to the cookie's browser."""

_OPEN: Final = frozenset({"/healthz", "/login"})
_OPEN_FOLDER: Final = "/static/"
_SAFE: Final = frozenset({"GET", "HEAD"})
_FORM: Final = "application/x-www-form-urlencoded"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Admission:
    """What the gate knows about a request; `visitor` is None only on public paths."""

    origin: Origin
    visitor: Visitor | None
    cookie: str
    query: Values
    form: Values

    @property
    def csrf(self) -> str:
        """Return the token for the forms of the response."""
        return csrf_token(self.cookie)


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
        self._trusted = settings.trusted()
        self._names = settings.allowed_names()
        self._accounts = accounts
        self._logins = logins
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"  # neither lifespan nor WebSocket is switched on
        origin = origin_of(scope, trusted=self._trusted)
        started = False

        async def send_safely(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
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
        try:
            await self._app(scope, receive, send_safely)
        except Exception as error:
            if started:
                raise
            await self._refuse(Request(scope), error)(scope, receive, send_safely)

    async def _admit(self, scope: Scope, receive: Receive, origin: Origin) -> Admission:
        if not origin.named(self._names):
            raise Problem(421, "This dashboard does not answer under that name; its setting `names` lists its names.")
        if "\0" in scope["path"]:
            raise Problem(400, "The path holds a NUL character, which is not allowed.")
        query = parse_values(scope.get("query_string", b""), what="query")
        request, method, path = Request(scope), scope["method"], scope["path"]
        cookie = request.cookies.get(cookie_name(secure=origin.secure), "")
        open_to_all = path in _OPEN or path.startswith(_OPEN_FOLDER)
        visitor = None
        if not open_to_all:
            visitor = await anyio.to_thread.run_sync(self._recognise, request, origin, cookie)
            if visitor is None:
                raise Problem(401, "Log in first.")
        form: Values = {}
        if method not in _SAFE:
            form = self._form(request, await read_body(scope, receive), origin, cookie)
        return Admission(origin, visitor, cookie, query, form)

    def _recognise(self, request: Request, origin: Origin, cookie: str) -> Visitor | None:
        if (name := self._named_by_proxy(request.headers, origin)) is not None:
            role = self._accounts.role(name)
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
        """Return the form if one of our pages has sent it."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != _FORM:
            raise Problem(415, "Changes are sent as a form of these pages.")
        form = parse_values(body, what="form")
        shown = form.get(CSRF_FIELD, ("",))[0]
        right = hmac.compare_digest(shown.encode("utf-8", "replace"), csrf_token(cookie).encode())
        if not right or not cookie or request.headers.get("origin", "").lower() != origin.url:
            raise Problem(403, "This form does not come from a page of this dashboard, or is too old; load it again.")
        return form

    def _turn_away(self, scope: Scope, problem: FleetError, origin: Origin) -> Response:
        request = Request(scope)
        unknown = isinstance(problem, Problem) and problem.status == 401  # noqa: PLR2004 - HTTP's own number
        if unknown and scope["method"] in _SAFE:
            # htmx would insert the login into the page; this header makes it reload the page.
            if "hx-request" in request.headers:
                return Response(status_code=204, headers={"HX-Refresh": "true"})
            here = scope["path"] + (f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else "")
            return RedirectResponse(f"/login?next={quote(here[:1000], safe='')}", 303)
        _log.info("Refused %s from %s: %s", scope["method"], origin.address, problem)
        return self._refuse(request, problem)

"""Access guard of the API: programs on this machine may use it, web pages in a browser on it may not.

The port is open on loopback only. A page of any origin can still make a browser send requests there, under a
name of its own that it lets resolve to 127.0.0.1; such a request carries that name in its Host header. Requests
under the right name cannot be read by the page, since no CORS header is sent, nor can it send JSON without asking.
"""

import base64
import hmac
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from fleet_device.api.problems import ApiProblem
from fleet_device.applications import ApplicationsFile
from fleet_device.errors import ConfigurationError

_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "[::1]"})
_OPEN: Final = "/healthz"

_SHOWN: Final = frozenset({"/", "/status"})
_READS: Final = frozenset({"GET", "HEAD"})
"""What a browser shows: it can send no bearer token, but asks its user for a password, and the token is taken as that.
From then on it sends it with whatever a page of another origin has it ask for here: it counts for reading alone."""


class Guard:
    """ASGI middleware.

    Args:
        app: What it guards.
        token: What to ask for as a bearer token, if anything.
        applications: Whose keys are taken too; whose request it is stands in its `state.application`.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, applications: ApplicationsFile | None = None) -> None:
        self._app = app
        self._token = token.encode() if token is not None else None
        self._applications = applications

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (problem := self._problem(scope)) is not None:
            await problem.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _problem(self, scope: Scope) -> ApiProblem | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or _name(hosts[0]) not in _LOOPBACK:
            return ApiProblem(421, "This API answers only under the names 127.0.0.1 and localhost.", code="wrong_host")
        if (self._token is None and self._applications is None) or scope["path"] == _OPEN:
            return None
        shown = scope["path"] in _SHOWN and scope["method"] in _READS
        # In constant time: how long the comparison takes must not tell how much of a guess was right.
        given = _given(headers.get("authorization", ""), password=shown)
        if self._token is not None and hmac.compare_digest(given, self._token):
            return None
        if self._applications is not None:
            try:
                application = self._applications.find(given)
            except ConfigurationError as error:
                return ApiProblem(503, str(error), kind="api_error", code="applications")
            if application is not None:
                scope.setdefault("state", {})["application"] = application
                return None
        return ApiProblem(
            401,
            "A bearer token is required: send the device's api_token as the API key."
            if self._applications is None
            else "A bearer token is required: send the application's key, which `fleet device app add` has printed.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": 'Basic realm="fleet device", charset="UTF-8"' if shown else "Bearer"},
        )


def _given(authorization: str, *, password: bool) -> bytes:
    """Return the token in an Authorization header; empty if there is none.

    Args:
        authorization: The header.
        password: Whether it may be the password of a browser's user.
    """
    kind, _, given = authorization.partition(" ")
    raw = given.strip().encode("latin-1")
    if kind.lower() == "bearer":
        return raw
    if not password or kind.lower() != "basic":
        return b""
    try:
        return base64.b64decode(raw, validate=True).partition(b":")[2]
    except ValueError:
        return b""


def _name(host: str) -> str:
    """Return a Host header's name without the port."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdigit() else host.lower()

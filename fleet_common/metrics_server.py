"""HTTP endpoint of a program's metrics and health: `/metrics`, `/healthz`, `/readyz`.

Slow requests, floods and web pages that make a browser send requests get nothing: there are few connections, silent
ones are closed first, each is closed after some seconds, and on loopback a request must name a loopback host.
"""

import hmac
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fleet_common.http_server import LOOPBACK, HttpServer, bearer_token, is_named, listen
from fleet_common.metrics import CONTENT_TYPE, Health, ListenAddress, MetricsPages

_AT_ONCE: Final = 64
_LONGEST_S: Final = 10.0
_GRACE_S: Final = 1
_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class MetricsServer(HttpServer):
    """Serves pages until stopped; raise HttpServerError if the address cannot be listened on.

    Without a `token` no bearer token is required; any connection is closed after `longest_s`.
    """

    def __init__(
        self, address: ListenAddress, pages: MetricsPages, *, token: bytes | None = None, longest_s: float = _LONGEST_S
    ) -> None:
        sock = listen(address.host, address.port, setting="metrics.listen")
        app = _application(pages, token, local=address.loopback)
        super().__init__(
            app, sock, name="metrics", grace_s=_GRACE_S, most=_AT_ONCE, request_s=longest_s, answer_s=longest_s
        )


def _application(pages: MetricsPages, token: bytes | None, *, local: bool) -> Starlette:
    def trusted(request: Request) -> bool:
        # Constant time: the duration must not reveal how much of a guess was right.
        return token is None or hmac.compare_digest(bearer_token(request.scope), token)

    def check_host(request: Request) -> None:
        if local and not is_named(request.scope, LOOPBACK):
            raise HTTPException(421, "This endpoint only answers under a loopback name.\n", _HEADERS)

    # Not coroutines: they wait for the program's threads.
    def metrics(request: Request) -> Response:
        check_host(request)
        if not trusted(request):
            raise HTTPException(401, "A bearer token is required.\n", {**_HEADERS, "WWW-Authenticate": "Bearer"})
        return Response(pages.metrics(), headers={**_HEADERS, "Content-Type": CONTENT_TYPE})

    def health(request: Request) -> Response:
        check_host(request)
        found = pages.alive() if request.url.path == "/healthz" else pages.ready()
        return _health(found, trusted=trusted(request))

    async def missing(_request: Request, _error: Exception) -> Response:
        return PlainTextResponse("There are /metrics, /healthz and /readyz.\n", 404, _HEADERS)

    routes = [Route("/metrics", metrics), Route("/healthz", health), Route("/readyz", health)]
    return Starlette(routes=routes, exception_handlers={404: missing})


def _health(health: Health, *, trusted: bool) -> Response:
    """Return the health for everybody, and the failed checks only for clients with the token."""
    body: dict[str, object] = {"status": "ok" if health.well else "unavailable"}
    if trusted:
        body["checks"] = {name: sentence or "ok" for name, sentence in health.checks.items()}
    return JSONResponse(body, 200 if health.well else 503, _HEADERS)

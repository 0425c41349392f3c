"""ASGI application of the dashboard, and the server that runs it."""

import errno
import logging
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from fleet_admin.dashboard.errors import AccountError, DashboardError, Problem
from fleet_admin.dashboard.gate import Gate
from fleet_admin.dashboard.pages import account, fleet, log, sessions
from fleet_admin.dashboard.rendering import asset_route, render
from fleet_admin.dashboard.services import Services, open_services
from fleet_admin.dashboard.serving import Live, Workers
from fleet_admin.dashboard.settings import DashboardSettings
from fleet_admin.dashboard.visit import Page, Visit
from fleet_admin.steering import SteeringError
from fleet_common.http_server import HttpServer
from fleet_common.metrics import ListenAddress
from fleet_edge.store.errors import InvalidQuery, NotFound, StoreError, StoreUnavailable
from schemas.errors import FleetError

PAGES: Final[tuple[Page, ...]] = (*fleet.PAGES, *sessions.PAGES, *log.PAGES, *account.PAGES)
"""All pages, in the order of the menu."""

_THREADS: Final = 8
"""Requests processed at once; at most a third of them for one account."""

_ANSWER_S: Final = 20.0
"""Time limit of one response."""

_WATCHERS: Final = 100
"""Pages with live updates; others must be reloaded."""

_log = logging.getLogger(__name__)

_STATUS: Final[tuple[tuple[type[FleetError], int], ...]] = (
    (NotFound, 404),
    (InvalidQuery, 400),
    (AccountError, 400),
    (SteeringError, 400),
    (StoreUnavailable, 503),
    (StoreError, 409),  # several of what was asked for
)


def create_app(services: Services) -> Starlette:
    settings = services.settings
    workers = Workers(threads=_THREADS, answer_s=_ANSWER_S)
    live = Live(services.log.latest, most=_WATCHERS, clock=services.clock)
    menu = tuple((page.path, page.title) for page in PAGES if page.menu)

    async def watch(request: Request) -> Response:
        return live.response(account=request.state.admission.visitor.name)

    async def healthy(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    def refuse(request: Request, error: Exception) -> Response:
        """Return the response to a failed request: a page, with the menu for who is logged in."""
        status, sentence, headers = _explain(error)
        title, admission = f"Error {status}", getattr(request.state, "admission", None)
        if admission is None or admission.visitor is None:
            page: Response = HTMLResponse(
                render("problem.html", {"title": title, "status": status, "sentence": sentence}), status
            )
        else:
            visit = Visit(request, replace(admission, query={}), services, services.now(), menu)
            page = visit.page("problem.html", title=title, status=status, sentence=sentence)
        page.headers.update(headers)
        return page

    return Starlette(
        routes=[
            *(_route(page, services=services, workers=workers, menu=menu) for page in PAGES),
            Route("/live", watch),
            Route("/healthz", healthy),
            asset_route(),
        ],
        middleware=[
            Middleware(
                Gate,
                settings=settings,
                accounts=services.accounts,
                logins=services.logins,
                refuse=refuse,
            )
        ],
        exception_handlers={FleetError: refuse, HTTPException: refuse},  # others: the gate
    )


def _route(page: Page, *, services: Services, workers: Workers, menu: tuple[tuple[str, str], ...]) -> Route:
    async def answer(request: Request) -> Response:
        visit = Visit(request, request.state.admission, services, services.now(), menu)
        visitor = visit.admission.visitor
        if visitor is not None and not visitor.role.includes(page.role):
            raise Problem(403, f"The account {visitor.name} may only read; ask an operator.")
        # Rate-limit anonymous requests by address, because password hashing is expensive.
        account = visitor.name if visitor is not None else f" {visit.admission.origin.address}"
        work: Callable[[], Response] = partial(page.answer, visit)
        return await workers.run(work, account=account)

    return Route(page.path, answer, methods=[page.method])


def _explain(error: Exception) -> tuple[int, str, dict[str, str]]:
    match error:
        case Problem():
            wait = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
            return error.status, str(error), wait
        case FleetError():
            return next((status for kind, status in _STATUS if isinstance(error, kind)), 500), str(error), {}
        case HTTPException():
            return error.status_code, f"{error.detail}.", dict(error.headers or {})
        case _:
            _log.error("A page failed.", exc_info=error)
            return 500, "This page failed; the dashboard's log has the reason.", {}


_GRACE_S: Final = 2
_KEEP_ALIVE_S: Final = 10
_BACKLOG: Final = 512


class DashboardServer:
    """Serves the dashboard at `address` from its construction until it is stopped.

    Raises:
        DashboardError: The address or the certificate cannot be used.
        StoreError: The database cannot be opened.
    """

    def __init__(self, settings: DashboardSettings, *, services: Services | None = None) -> None:
        self._services = services or open_services(settings)
        app = create_app(self._services)
        address = ListenAddress.read(settings.listen)
        sock = _listen(address.host, address.port)
        scheme = "https" if settings.https_certificate else "http"
        shown = f"[{address.host}]" if ":" in address.host else address.host
        self.address = f"{scheme}://{shown}:{sock.getsockname()[1]}/"
        try:
            self._server = HttpServer(
                app,
                sock,
                name="dashboard",
                grace_s=_GRACE_S,
                keep_alive_s=_KEEP_ALIVE_S,
                certificate=settings.https_certificate,
            )
        except (OSError, ValueError) as error:
            sock.close()
            raise DashboardError(
                f"The certificate {settings.https_certificate} cannot be used ({error}): put certificate, chain "
                "and key into that file, and correct https_certificate."
            ) from error
        self._server.start()
        self._services.steering.start()

    def wait(self) -> None:
        self._server.wait()

    def stop(self) -> None:
        """Stop after the running requests, with a short time limit. Idempotent."""
        self._services.steering.stop()
        self._server.stop()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        what = (
            "is in use: stop what listens there"
            if error.errno == errno.EADDRINUSE
            else f"cannot be used ({error.strerror})"
        )
        raise DashboardError(f"The dashboard's address {host}:{port} {what}, or listen elsewhere.") from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener

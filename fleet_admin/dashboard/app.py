"""ASGI application: routes of all pages behind the gate, errors as pages or as JSON."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from fleet_admin.alerts.errors import NoSuchAlert
from fleet_admin.dashboard.api.routes import api_routes
from fleet_admin.dashboard.errors import AccountError, Problem
from fleet_admin.dashboard.pages.page import Page
from fleet_admin.dashboard.pages.registry import PAGES
from fleet_admin.dashboard.rendering import render
from fleet_admin.dashboard.services import Services
from fleet_admin.dashboard.visit import Visit
from fleet_admin.dashboard.web.assets import asset_route
from fleet_admin.dashboard.web.gate import API, Gate
from fleet_admin.dashboard.web.live import Live
from fleet_admin.dashboard.web.workers import Workers
from fleet_admin.steering import SteeringError
from fleet_edge.store.errors import InvalidQuery, NotFound, StoreError, StoreUnavailable
from schemas.errors import FleetError

_log = logging.getLogger(__name__)

_STATUS: Final[tuple[tuple[type[FleetError], int], ...]] = (
    (NotFound, 404),
    (NoSuchAlert, 404),
    (InvalidQuery, 400),
    (AccountError, 400),
    (SteeringError, 400),
    (StoreUnavailable, 503),
    (StoreError, 409),  # several of what was asked for
)


def create_app(services: Services) -> Starlette:
    """Return the dashboard as an ASGI application."""
    settings = services.settings
    workers = Workers(threads=settings.threads, answer_s=settings.answer_s)
    live = Live(services.log.latest, most=settings.watchers, clock=services.clock)
    menu = tuple((page.path, page.title) for page in PAGES if page.menu)

    async def watch(request: Request) -> Response:
        return live.response(account=request.state.admission.visitor.name)

    async def healthy(_request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[
            *(_route(page, services=services, workers=workers, menu=menu) for page in PAGES),
            *api_routes(services, workers, now=services.now),
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
                keys=services.keys,
                refuse=_refuse,
            )
        ],
        exception_handlers={FleetError: _refuse, HTTPException: _refuse, Exception: _refuse},
    )


def _route(page: Page, *, services: Services, workers: Workers, menu: tuple[tuple[str, str], ...]) -> Route:
    async def answer(request: Request) -> Response:
        visit = Visit(request, request.state.admission, services, services.now(), menu)
        visitor = visit.admission.visitor
        if visitor is not None and not visitor.role.includes(page.role):
            raise Problem(403, f"The account {visitor.name} may look, and not do this; ask an operator.")
        # Who is not known yet takes a share by address: logins are dear.
        account = visitor.name if visitor is not None else f" {visit.admission.origin.address}"
        work: Callable[[], Response] = partial(page.answer, visit)
        return await workers.run(work, account=account)

    return Route(page.path, answer, methods=[page.method])


def _refuse(request: Request, error: Exception) -> Response:
    """Return the answer to a request that cannot be served: a page, or JSON for programs."""
    status, sentence, headers = _explain(error)
    if request.url.path.startswith(API):
        return JSONResponse({"error": {"status": status, "sentence": sentence}}, status, headers)
    return HTMLResponse(render("problem.html", {"status": status, "sentence": sentence}), status, headers)


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
            return 500, "This page failed; the dashboard's log says why.", {}

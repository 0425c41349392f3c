"""ASGI application of the dashboard, its worker threads, and the server that runs it."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fleet_admin.dashboard.errors import AccountError, Problem
from fleet_admin.dashboard.gate import Gate, Proxies
from fleet_admin.dashboard.pages import account, fleet, log, sessions
from fleet_admin.dashboard.rendering import asset_route, render
from fleet_admin.dashboard.services import Services, open_services
from fleet_admin.dashboard.settings import DashboardSettings
from fleet_admin.dashboard.visit import Page, Visit
from fleet_admin.report import ReportError
from fleet_admin.steering import SteeringError
from fleet_common.http_server import HttpServer, listen
from fleet_common.metrics import ListenAddress
from fleet_edge.session_log import InvalidQuery, NotFound, StoreError, StoreUnavailable
from schemas.errors import FleetError


def _latest(visit: Visit) -> Response:
    """Return the time of the log's latest record: pages whose time differs reload their parts."""
    return PlainTextResponse(str(visit.services.log.latest()))


PAGES: Final[tuple[Page, ...]] = (*fleet.PAGES, *log.PAGES, *sessions.PAGES, *account.PAGES, Page("/live", "", _latest))
"""All pages, in the order of the menu."""

_THREADS: Final = 8
"""Requests processed at once; at most a third of them for one account."""

_ANSWER_S: Final = 20.0
"""Time limit of one response."""

_log = logging.getLogger(__name__)

_STATUS: Final[tuple[tuple[type[FleetError], int], ...]] = (
    (NotFound, 404),
    (InvalidQuery, 400),
    (AccountError, 400),
    (SteeringError, 400),
    (ReportError, 400),
    (StoreUnavailable, 503),
    (StoreError, 409),  # several of what was asked for
)


T = TypeVar("T")

_SHARE: Final = 3
_MAX_WAITING: Final = 8
"""Waiting requests of one account: a browser opens several pages at once."""


class Workers:
    """Threads that answer requests, shared so that a slow query or a busy account blocks nobody else.

    A thread that exceeds its time is not reused before the database has answered; the database's own time-outs end
    that. Called from one event loop.

    Args:
        threads: Maximum; a third of them for one account.
        answer_s: Time limit of one answer, including its wait.
    """

    def __init__(self, *, threads: int, answer_s: float) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dashboard")
        self._max_of_one = max(1, threads // _SHARE)
        self._answer_s = answer_s
        self._asked = Counter[str]()
        self._places: dict[str, asyncio.Semaphore] = {}

    async def run(self, work: Callable[[], T], *, account: str) -> T:
        """Run a function on a thread and return its result.

        Raises:
            Problem: It took too long, or the account has too many requests in progress.
        """
        if self._asked[account] >= self._max_of_one + _MAX_WAITING:
            raise Problem(429, "Your earlier requests are still running; try again soon.", retry_after_s=5)
        self._asked[account] += 1
        places = self._places.setdefault(account, asyncio.Semaphore(self._max_of_one))
        loop = asyncio.get_running_loop()

        def done() -> None:
            places.release()
            self._leave(account)

        def tell(_future: Future[T]) -> None:
            # The loop may have ended meanwhile.
            if not loop.is_closed():
                loop.call_soon_threadsafe(done)

        try:
            async with asyncio.timeout(self._answer_s):
                try:
                    await places.acquire()
                except BaseException:
                    self._leave(account)
                    raise
                future = self._pool.submit(work)
                future.add_done_callback(tell)
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise Problem(
                503, f"The answer took more than {self._answer_s:g} s; choose a shorter time range or fewer columns."
            ) from None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _leave(self, account: str) -> None:
        self._asked[account] -= 1
        if not self._asked[account]:
            del self._asked[account]
            self._places.pop(account, None)


def create_app(services: Services) -> Starlette:
    settings = services.settings
    workers = Workers(threads=_THREADS, answer_s=_ANSWER_S)
    menu = tuple((page.path, page.title) for page in PAGES if page.menu)

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
            visit = Visit(request, replace(admission, query=QueryParams()), services, services.now(), menu)
            page = visit.page("problem.html", title=title, status=status, sentence=sentence)
        page.headers.update(headers)
        return page

    return Starlette(
        routes=[
            *(_route(page, services=services, workers=workers, menu=menu) for page in PAGES),
            Route("/healthz", healthy),
            asset_route(),
        ],
        middleware=[
            Middleware(Proxies, trusted_hosts=[str(each) for each in settings.trusted()]),
            Middleware(
                Gate,
                settings=settings,
                accounts=services.accounts,
                logins=services.logins,
                refuse=refuse,
            ),
        ],
        exception_handlers={FleetError: refuse, HTTPException: refuse},  # others: the gate
    )


def _route(page: Page, *, services: Services, workers: Workers, menu: tuple[tuple[str, str], ...]) -> Route:
    async def answer(request: Request) -> Response:
        visit = Visit(request, request.state.admission, services, services.now(), menu)
        visitor = visit.admission.visitor
        if visitor is not None and not visitor.role.includes(page.role):
            raise Problem(403, f"The account {visitor.name} may only read; ask an operator.")
        # Strangers share their threads, so that logins, which are expensive, delay nobody who has logged in.
        account = "" if visitor is None else visitor.name
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


class DashboardServer(HttpServer):
    """Serves the dashboard at `address` from its construction until it is stopped.

    Raises:
        HttpServerError: The address or the certificate cannot be used.
        StoreError: The database cannot be opened.
    """

    def __init__(self, settings: DashboardSettings, *, services: Services | None = None) -> None:
        self._services = services or open_services(settings)
        address = ListenAddress.read(settings.listen)
        super().__init__(
            create_app(self._services),
            listen(address.host, address.port, setting="listen"),
            name="dashboard",
            grace_s=_GRACE_S,
            keep_alive_s=_KEEP_ALIVE_S,
            certificate=settings.https_certificate,
            setting="https_certificate",
        )
        self.start()
        self._services.steering.start()

    def stop(self) -> None:
        """Stop after the running requests, with a short time limit. Idempotent."""
        self._services.steering.stop()
        super().stop()

"""Access to the API: which programs may use it, and quotas of applications.

A web page that sends requests under the right name cannot read the answers, since no CORS header is sent, nor can it
send JSON without asking.

Quotas count the tokens of prompts and generations since the start of the device. A request that has begun runs to its
end, so an application may exceed its quota once; it then waits until that is made up for.
"""

import math
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from fleet_common.http_server import LOOPBACK, bearer_token, is_named
from fleet_common.limits import TokenBucket
from fleet_device.api.problems import ApiProblem
from fleet_device.applications import Application, ApplicationsFile
from fleet_device.errors import ConfigurationError
from fleet_device.requests.generate import GeneratedText, Piece
from fleet_device.requests.queue import Delayed, Failed

_MINUTE_S: Final = 60.0
_DAY_S: Final = 86_400.0
_REQUEST_S: Final = 2  # until a request may have ended


@dataclass(slots=True)
class _Used:
    requests: int = 0
    buckets: dict[float, TokenBucket] = field(default_factory=dict)


class ApplicationQuotas:
    """Usage of all applications. Callable on any thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._used: dict[str, _Used] = {}
        self._changing = threading.Lock()

    def begin(self, application: Application | None, *, requests: int) -> None:
        """Count requests as begun; raise ApiProblem if the application is over its quota."""
        if application is None:
            return
        most = application.requests_at_once
        if most is not None and requests > most:
            sentence = (
                f"The application {application.name!r} may have {most} requests at once; {requests} were requested."
            )
            raise ApiProblem(400, sentence, param="n")
        with self._changing:
            used = self._used.setdefault(application.name, _Used())
            for period, rate, period_s in _rates(application):
                if wait_s := self._bucket(used, rate, period_s).wait_s(1.0, self._clock()):
                    raise _over(f"has used its {rate} tokens per {period}", application, wait_s)
            if most is not None and used.requests + requests > most:
                raise _over(f"has {used.requests} requests at once of at most {most}", application, _REQUEST_S)
            used.requests += requests

    def note(self, application: Application | None, event: Piece | Delayed | GeneratedText | Failed) -> None:
        if application is not None and isinstance(event, Piece | GeneratedText):
            tokens = event.tokens if isinstance(event, Piece) else len(event.request.prompt)
            with self._changing:
                used = self._used.setdefault(application.name, _Used())
                for _, rate, period_s in _rates(application):
                    self._bucket(used, rate, period_s).spend(tokens, self._clock())
        if isinstance(event, GeneratedText | Failed):
            self.end(application)

    def end(self, application: Application | None, *, requests: int = 1) -> None:
        """Uncount requests that have ended, or did not run."""
        if application is not None:
            with self._changing:
                used = self._used.setdefault(application.name, _Used())
                used.requests = max(0, used.requests - requests)

    def _bucket(self, used: _Used, rate: int, period_s: float) -> TokenBucket:
        bucket = used.buckets.setdefault(period_s, TokenBucket(rate / period_s, rate, now=self._clock()))
        bucket.rate, bucket.burst = rate / period_s, rate  # they may have been changed
        return bucket


def _rates(application: Application) -> list[tuple[str, int, float]]:
    rates = [("minute", application.tokens_per_min, _MINUTE_S), ("day", application.tokens_per_day, _DAY_S)]
    return [(period, rate, period_s) for period, rate, period_s in rates if rate is not None]


def _over(what: str, application: Application, wait_s: float) -> ApiProblem:
    seconds = max(1, math.ceil(wait_s))
    return ApiProblem(
        429,
        f"The application {application.name!r} {what}; ask again in {seconds} s.",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds)},
    )


HEALTH_PATHS: Final = ("/healthz", "/health")
"""Need no key. vLLM and llama.cpp serve `/health`; load generators ask for it first."""


class AccessGuard:
    """ASGI middleware that accepts an application's key, any program without a file, and sets `state.application`.

    `names` are hosts that a request may name, besides the address at which it arrives; None for any. Paths in `public`
    need no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        applications: ApplicationsFile | None = None,
        names: frozenset[str] | None = LOOPBACK,
        public: Collection[str] = HEALTH_PATHS,
    ) -> None:
        self._app = app
        self._public = public
        self._names = names
        self._applications = applications

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (problem := self._problem(scope)) is not None:
            await problem.response(scope["path"])(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _problem(self, scope: Scope) -> ApiProblem | None:
        if self._names is not None and not is_named(scope, self._names):
            return ApiProblem(
                421,
                "This API does not answer under that name: use localhost or its address, or add the name to api_hosts.",
                code="wrong_host",
            )
        if self._applications is None or scope["path"] in self._public:
            return None
        try:
            application = self._applications.find(bearer_token(scope))
        except ConfigurationError as error:
            return ApiProblem(503, str(error), kind="api_error", code="applications")
        if application is not None:
            scope.setdefault("state", {})["application"] = application
            return None
        return ApiProblem(
            401,
            "A bearer token is required: send the application's key, which `fleet device app add` has printed.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

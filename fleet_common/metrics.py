"""Metrics for Prometheus: families and their values, and the HTTP endpoint `/metrics`, `/healthz`, `/readyz`.

Counting needs no library: a counter is a number, a histogram a list of numbers. `exposition` needs prometheus-client.

Slow requests, floods and web pages that make a browser send requests get nothing: there are few connections, silent
ones are closed first, each is closed after some seconds, and on loopback a request must name a loopback host.
"""

import hmac
import ipaddress
import json
import logging
import socket
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from fleet_common.limits import Connections, cut
from fleet_common.settings import setting
from schemas.errors import FleetError

if TYPE_CHECKING:
    from prometheus_client.core import Metric as PrometheusMetric

_log = logging.getLogger(__name__)


class MetricsError(FleetError):
    """The metrics endpoint cannot serve. The message is one sentence for the user."""


class MetricsUnavailable(MetricsError):  # noqa: N818 - reads as what it says
    """A library that metrics need is missing."""


PREFIX: Final = "dssd_"


class MetricKind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """Definition of a metric.

    Attributes:
        name: With the prefix; a counter's ends in `_total`.
        labels: Label names. Labels have few values: no devices, no sessions.
    """

    name: str
    kind: MetricKind
    meaning: str
    labels: tuple[str, ...] = ()

    def of(self, value: float) -> "Family":
        return Family(self, values={(): value})

    def by(self, values: Mapping[str, float]) -> "Family":
        return Family(self, values={(label,): value for label, value in sorted(values.items())})

    def spread(self, histogram: "Histogram") -> "Family":
        return Family(self, histogram=histogram)


@dataclass(slots=True)
class Histogram:
    """Histogram. One thread observes, any may read.

    `bounds` are the upper bounds of the buckets, ascending; the last bucket has none.
    """

    bounds: Sequence[float]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def quantile(self, share: float, *, since: Sequence[int] = ()) -> float | None:
        """Return a bucket's bound above a quantile: infinite in the last bucket, None without observations.

        `share` is from 0 to 1; only observations after the counts `since` matter.
        """
        before = since or [0] * len(self.counts)
        counts = [now - then for now, then in zip(list(self.counts), before, strict=True)]
        wanted, seen = share * sum(counts), 0
        if not sum(counts):
            return None
        for bound, count in zip([*self.bounds, float("inf")], counts, strict=True):
            seen += count
            if seen >= wanted and count:
                return bound
        return float("inf")


@dataclass(frozen=True, slots=True)
class Family:
    """A metric with its current values, by label values, or its histogram."""

    metric: Metric
    values: Mapping[tuple[str, ...], float] = field(default_factory=dict)
    histogram: Histogram | None = None

    def buckets(self) -> Iterable[tuple[str, float]]:
        """Yield upper bounds, as text, and the cumulative counts."""
        assert self.histogram is not None
        seen = 0
        for bound, count in zip([*self.histogram.bounds, float("inf")], list(self.histogram.counts), strict=True):
            seen += count
            yield ("+Inf" if bound == float("inf") else f"{bound:g}"), seen


CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def require_library() -> None:
    try:
        import prometheus_client  # noqa: F401, PLC0415 - optional
    except ModuleNotFoundError as error:
        raise MetricsUnavailable(
            "Metrics need the package 'prometheus-client': install this one with the extra 'metrics', or leave "
            "`metrics.listen` out."
        ) from error


def exposition(families: Iterable[Family]) -> bytes:
    """Return the families in Prometheus's text format; raise MetricsUnavailable without the library."""
    require_library()
    from prometheus_client import CollectorRegistry, generate_latest  # noqa: PLC0415 - optional
    from prometheus_client.registry import Collector  # noqa: PLC0415 - likewise

    class _Once(Collector):
        def collect(self) -> Iterator["PrometheusMetric"]:
            return map(_collected, families)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once())
    return generate_latest(registry)


def _collected(family: Family) -> "PrometheusMetric":
    from prometheus_client.core import (  # noqa: PLC0415 - optional
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    metric = family.metric
    if family.histogram is not None:
        spread = HistogramMetricFamily(metric.name, metric.meaning)
        spread.add_metric([], buckets=list(family.buckets()), sum_value=family.histogram.total)
        return spread
    kind = CounterMetricFamily if metric.kind is MetricKind.COUNTER else GaugeMetricFamily
    simple = kind(metric.name, metric.meaning, labels=metric.labels)
    for labels, value in family.values.items():
        simple.add_metric(labels, value)
    return simple


_LEAST_TOKEN: Final = 16
_MOST_TOKEN: Final = 4096
_MOST_PORT: Final = 65_535


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Address to listen on; `host` is an IP address or `localhost`, `port` 0 is any free port."""

    host: str
    port: int

    @classmethod
    def read(cls, text: str) -> "ListenAddress":
        """Read `HOST:PORT`, an IPv6 address in brackets; the message of ValueError ends a sentence."""
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
        if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > _MOST_PORT:
            raise ValueError("it must be an address and a port, such as 127.0.0.1:9464 or [::1]:9464")
        if host != "localhost":
            try:
                ipaddress.ip_address(host)
            except ValueError:
                raise ValueError(f"{host[:60]!r} is no IP address; 0.0.0.0 listens on all of this machine's") from None
        return cls(host, int(port))

    @property
    def loopback(self) -> bool:
        return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback


class MetricsSettings(BaseModel):
    """Where metrics, `/healthz` and `/readyz` are served, and who may read them."""

    model_config = ConfigDict(extra="forbid")

    listen: str = setting(
        "",
        "Address and port of `/metrics`, `/healthz` and `/readyz`, such as `127.0.0.1:9464`; beyond loopback only "
        "with `metrics.token_file`. Empty for none.",
        rare=True,
        in_flags=False,
    )
    token_file: Path | None = setting(
        None, "File with the bearer token for reading metrics.", rare=True, in_flags=False
    )

    traces: bool = setting(
        False,  # noqa: FBT003 - a default
        "Whether to send a span per session and step by OTLP (variables `OTEL_…`).",
        rare=True,
        in_flags=False,
    )

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, text: str) -> str:
        if text:
            ListenAddress.read(text)
        return text

    @model_validator(mode="after")
    def _check_token(self) -> Self:
        if self.address is not None and not self.address.loopback and self.token_file is None:
            raise ValueError(
                "beyond loopback metrics need a bearer token: name its file in 'metrics.token_file', or listen on "
                "127.0.0.1"
            )
        return self

    @property
    def address(self) -> ListenAddress | None:
        return ListenAddress.read(self.listen) if self.listen else None

    def token(self) -> bytes | None:
        """Read the bearer token, None if none is required; raise MetricsError if its file is unusable."""
        return None if self.token_file is None else read_token(self.token_file.expanduser())


def read_token(path: Path) -> bytes:
    """Read a token file; raise MetricsError if it cannot be read or holds no token."""
    try:
        with path.open("rb") as file:
            token = file.read(_MOST_TOKEN + 1).strip()
    except OSError as error:
        raise MetricsError(f"The token's file {path} cannot be read ({error.strerror}).") from error
    if not _LEAST_TOKEN <= len(token) <= _MOST_TOKEN or not all(33 <= byte < 127 for byte in token):  # noqa: PLR2004
        raise MetricsError(
            f"The token in {path} must be {_LEAST_TOKEN} to {_MOST_TOKEN} printable characters without spaces: make "
            "one with `openssl rand -hex 32`."
        )
    return token


_AT_ONCE: Final = 64
_LONGEST_S: Final = 10.0
_ANSWER_S: Final = 1.0
"""Seconds after which a connection whose client does not read its answer may be closed, to make room for another."""

_BACKLOG: Final = 512
_SWEEP_S: Final = 0.1
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "[::1]", "::1"})


@dataclass(frozen=True, slots=True)
class Health:
    """Result of a health check: a sentence for each failed check, an empty string for others."""

    checks: Mapping[str, str]

    @property
    def well(self) -> bool:
        return not any(self.checks.values())


@dataclass(frozen=True, slots=True)
class Pages:
    """Content of the endpoint. Called on its threads, several at a time.

    A program that is not `alive` should be restarted; one that is not `ready` accepts no work.
    """

    metrics: Callable[[], bytes]
    alive: Callable[[], Health]
    ready: Callable[[], Health]


class MetricsServer:
    """Serve pages until stopped; raise MetricsError if the address cannot be listened on.

    Without a `token` no bearer token is required; any connection is closed after `longest_s`.
    """

    def __init__(
        self, address: ListenAddress, pages: Pages, *, token: bytes | None = None, longest_s: float = _LONGEST_S
    ) -> None:
        handler = type("_BoundHandler", (_Handler,), {"pages": pages, "token": token, "local": address.loopback})
        try:
            self._server = _Server(address, handler, longest_s)
        except OSError as error:
            raise MetricsError(
                f"Metrics cannot be served on {address.host}:{address.port} ({error.strerror}): set "
                "`metrics.listen` to another address or port."
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": _SWEEP_S}, name="metrics", daemon=True
        )

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        name = str(host)
        return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop and close all connections. Idempotent."""
        if self._thread.ident is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = _BACKLOG

    def __init__(self, address: ListenAddress, handler: type[BaseHTTPRequestHandler], longest_s: float) -> None:
        self.address_family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        self._connections: Connections[socket.socket] = Connections(_AT_ONCE, clock=time.monotonic, answer_s=_ANSWER_S)
        self._counting = threading.Lock()
        self._longest_s = longest_s
        super().__init__((address.host, address.port), handler)

    def server_bind(self) -> None:
        """Bind without looking up the machine's name, which may take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ANN401 - as its base has it
        with self._counting:
            ends = self._connections.add(request, str(client_address[0]))
        if ends is not None:
            cut(ends)
        return ends is not request

    def service_actions(self) -> None:
        with self._counting:
            overdue = self._connections.overdue(wait_s=self._longest_s, answer_s=self._longest_s)
        for each in overdue:
            cut(each)

    def answers(self, request: socket.socket) -> None:
        with self._counting:
            self._connections.note(request, waits=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as its base has it
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._counting:
                self._connections.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002 - as its base has it
        """Log at debug level only: a client that goes away is no fault of ours."""
        _log.debug("A request for metrics could not be answered.", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    pages: ClassVar[Pages]
    token: ClassVar[bytes | None]
    local: ClassVar[bool]
    timeout = 5.0  # seconds without a byte

    def do_GET(self) -> None:
        assert isinstance(self.server, _Server)
        self.server.answers(self.connection)
        if self.local and _host_name(self.headers.get("Host", "")) not in _LOOPBACK:
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, "This endpoint only answers under a loopback name.\n")
            return
        try:
            self._serve(self.path.partition("?")[0], trusted=self._trusted())
        except OSError:
            raise  # the client's connection
        except Exception:  # noqa: BLE001 - logged with its traceback
            _log.exception("A request to the metrics endpoint failed.")
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "Internal error; see the log of the program.\n")

    def _serve(self, path: str, *, trusted: bool) -> None:
        if path == "/healthz":
            self._send_health(self.pages.alive(), trusted=trusted)
        elif path == "/readyz":
            self._send_health(self.pages.ready(), trusted=trusted)
        elif path != "/metrics":
            self._answer(HTTPStatus.NOT_FOUND, "There are /metrics, /healthz and /readyz.\n")
        elif not trusted:
            self._answer(HTTPStatus.UNAUTHORIZED, "A bearer token is required.\n")
        else:
            self._answer(HTTPStatus.OK, self.pages.metrics(), kind=CONTENT_TYPE)

    do_HEAD = do_GET  # noqa: N815 - as its base calls it

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401 - as its base has it
        """Log nothing: scrapes are frequent, and the log must not contain what clients send."""

    def version_string(self) -> str:
        return "dssd-fleet"

    def _trusted(self) -> bool:
        if self.token is None:
            return True
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        # Constant time: the duration must not reveal how much of a guess was right.
        same = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self.token)
        return kind.lower() == "bearer" and same

    def _send_health(self, health: Health, *, trusted: bool) -> None:
        """Send the health to everybody, and the failed checks only to clients with the token."""
        body: dict[str, object] = {"status": "ok" if health.well else "unavailable"}
        if trusted:
            body["checks"] = {name: sentence or "ok" for name, sentence in health.checks.items()}
        status = HTTPStatus.OK if health.well else HTTPStatus.SERVICE_UNAVAILABLE
        self._answer(status, json.dumps(body) + "\n", kind="application/json")

    def _answer(self, status: HTTPStatus, body: str | bytes, *, kind: str = "text/plain; charset=utf-8") -> None:
        payload = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(payload)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if status is HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)


def _host_name(host: str) -> str:
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdigit() and name else host.lower()

"""HTTP endpoint of the metrics: `/metrics`, `/healthz` and `/readyz`, for few and brief requests.

A request that takes long, a flood of them, and a web page that makes a browser ask here get nothing: connections are
few, those that say nothing end first, each ends after some seconds, and on loopback a request must name loopback as its
host.
"""

import contextlib
import hmac
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Final

from fleet_common.connections import Connections
from fleet_common.metrics.errors import MetricsError
from fleet_common.metrics.exposition import CONTENT_TYPE
from fleet_common.metrics.settings import Address

_log = logging.getLogger(__name__)

_AT_ONCE: Final = 64
_LONGEST_S: Final = 10.0
_ANSWER_S: Final = 1.0
"""Seconds after which an answer that a client does not take may end, to make room for another connection."""

_BACKLOG: Final = 512
_SWEEP_S: Final = 0.1
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "[::1]", "::1"})


@dataclass(frozen=True, slots=True)
class Health:
    """Whether something is well, and what of it is not.

    Attributes:
        checks: By name a sentence for each that fails, an empty one for those that hold.
    """

    checks: Mapping[str, str]

    @property
    def well(self) -> bool:
        return not any(self.checks.values())


@dataclass(frozen=True, slots=True)
class Pages:
    """What is served. All are called on the endpoint's threads, several at a time.

    Attributes:
        metrics: Returns Prometheus's text.
        alive: Whether the program works at all; one that does not had better be started anew.
        ready: Whether it can be sent work.
    """

    metrics: Callable[[], bytes]
    alive: Callable[[], Health]
    ready: Callable[[], Health]


class MetricsServer:
    """Serves pages until it is stopped.

    Args:
        address: Where to.
        pages: What.
        token: Bearer token to ask for; None asks for none.
        longest_s: After which a connection is ended, whatever it is doing.

    Raises:
        MetricsError: The address cannot be listened on.
    """

    def __init__(
        self, address: Address, pages: Pages, *, token: bytes | None = None, longest_s: float = _LONGEST_S
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
        """Where it is, without a path."""
        host, port = self._server.server_address[:2]
        name = str(host)
        return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End; answers under way are cut off. Idempotent."""
        if self._thread.ident is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    """Few connections at once, none for long."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = _BACKLOG

    def __init__(self, address: Address, handler: type[BaseHTTPRequestHandler], longest_s: float) -> None:
        self.address_family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        self._connections: Connections[socket.socket] = Connections(_AT_ONCE, clock=time.monotonic, answer_s=_ANSWER_S)
        self._counting = threading.Lock()
        self._longest_s = longest_s
        super().__init__((address.host, address.port), handler)

    def server_bind(self) -> None:
        """Take the port; without looking up the machine's name, which may take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ANN401 - as its base has it
        with self._counting:
            ends = self._connections.add(request, str(client_address[0]))
        if ends is not None:
            _cut(ends)
        return ends is not request

    def service_actions(self) -> None:
        """End the connections that have taken too long."""
        with self._counting:
            overdue = self._connections.overdue(wait_s=self._longest_s, answer_s=self._longest_s)
        for each in overdue:
            _cut(each)

    def answers(self, request: socket.socket) -> None:
        """Note that a request has come."""
        with self._counting:
            self._connections.note(request, waits=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as its base has it
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._counting:
                self._connections.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002 - as its base has it
        """Say no more than that: a client that goes away is no fault of ours."""
        _log.debug("A request for metrics could not be answered.", exc_info=True)


def _cut(request: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended meanwhile
        request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    """One request a connection."""

    pages: ClassVar[Pages]
    token: ClassVar[bytes | None]
    local: ClassVar[bool]
    timeout = 5.0  # seconds without a byte

    def do_GET(self) -> None:
        assert isinstance(self.server, _Server)
        self.server.answers(self.connection)
        if self.local and _name(self.headers.get("Host", "")) not in _LOOPBACK:
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, "This endpoint answers under a loopback name alone.\n")
            return
        try:
            self._serve(self.path.partition("?")[0], trusted=self._trusted())
        except OSError:
            raise  # the client's connection
        except Exception:  # noqa: BLE001 - logged with its traceback
            _log.exception("What was asked of the metrics' endpoint could not be made.")
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "It could not be made; the program's log says why.\n")

    def _serve(self, path: str, *, trusted: bool) -> None:
        if path == "/healthz":
            self._tell(self.pages.alive(), trusted=trusted)
        elif path == "/readyz":
            self._tell(self.pages.ready(), trusted=trusted)
        elif path != "/metrics":
            self._answer(HTTPStatus.NOT_FOUND, "There are /metrics, /healthz and /readyz.\n")
        elif not trusted:
            self._answer(HTTPStatus.UNAUTHORIZED, "A bearer token is required.\n")
        else:
            self._answer(HTTPStatus.OK, self.pages.metrics(), kind=CONTENT_TYPE)

    do_HEAD = do_GET  # noqa: N815 - as its base calls it

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401 - as its base has it
        """Log nothing: a scrape every few seconds is no news, and what a client sends has no place in the log."""

    def version_string(self) -> str:
        """Return no version: who asks here need not know."""
        return "dssd-fleet"

    def _trusted(self) -> bool:
        if self.token is None:
            return True
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        # In constant time: how long the comparison takes must not tell how much of a guess was right.
        same = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self.token)
        return kind.lower() == "bearer" and same

    def _tell(self, health: Health, *, trusted: bool) -> None:
        """Tell everybody whether it is well, and who has the token what is not."""
        told: dict[str, object] = {"status": "ok" if health.well else "unavailable"}
        if trusted:
            told["checks"] = {name: sentence or "ok" for name, sentence in health.checks.items()}
        status = HTTPStatus.OK if health.well else HTTPStatus.SERVICE_UNAVAILABLE
        self._answer(status, json.dumps(told) + "\n", kind="application/json")

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


def _name(host: str) -> str:
    """Return a Host header's name without the port."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdigit() and name else host.lower()

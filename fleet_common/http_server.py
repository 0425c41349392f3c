"""HTTP server for ASGI applications: uvicorn on its own thread, with bounded connections.

uvicorn gives a connection any time to send its first request, and refuses all requests once it has too many
connections. Here we accept connections ourselves, so that silent and slow ones are closed before others are refused.
"""

import asyncio
import errno
import ipaddress
import math
import socket
import threading
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, Final

import h11
import uvicorn
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Scope
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from fleet_common.limits import Connections, cut
from schemas.errors import FleetError

_MOST: Final = 500
_REQUEST_S: Final = 20.0
"""Seconds within which a whole request must arrive, including the TLS handshake."""

_UNREAD_S: Final = 1.0
"""Seconds after which a connection whose client does not read its answer may be closed, to make room for another."""

_SWEEP_S: Final = 1.0
_PAUSE_S: Final = 0.1


_BACKLOG: Final = 512


class HttpServerError(FleetError):
    """An address cannot be listened on, or a certificate cannot be used. The message is one sentence for the user."""


def listen(host: str, port: int, *, setting: str) -> socket.socket:
    """Listen on an address; raise HttpServerError, which names the setting of the address, if it cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise unusable(f"{host}:{port}", error, setting=setting) from error
    # Accepted connections inherit it. asyncio sets it only on sockets that name their protocol, unlike this one: an
    # answer's second packet would wait for the client's delayed acknowledgement, 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def unusable(address: object, error: OSError, *, setting: str) -> HttpServerError:
    if error.errno == errno.EADDRINUSE:
        what = "is in use: stop what listens there"
    else:
        what = f"cannot be used ({error.strerror or error})"
    return HttpServerError(f"The address {address} {what}, or set `{setting}` to another.")


LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "[::1]", "::1"})
"""Names of this machine in a URL."""


def is_named(scope: Scope, names: Collection[str]) -> bool:
    """A request names us by its Host header: by one of `names`, or by the address at which it arrives.

    Any web page can make a browser send requests here, also on loopback, under a name of its own that it lets resolve
    to our address. It cannot let a name resolve to a host that is an address already.
    """
    hosts = Headers(scope=scope).getlist("host")
    if len(hosts) != 1:
        return False
    host = hosts[0].lower()
    name, colon, port = host.rpartition(":")
    name = name if colon and name and port.isascii() and port.isdigit() else host
    arrived, _ = scope.get("server") or (None, None)
    return name in names or host in names or (_is_address(name) and name.strip("[]") == arrived)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def bearer_token(scope: Scope) -> bytes:
    """Return the bearer token of a request; empty without one."""
    kind, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
    return token.strip().encode("latin-1", "replace") if kind.lower() == "bearer" else b""


class HttpServer:
    """Serves an application from `start` until it is stopped. Connections are accepted once the socket listens.

    `sock` is closed at the end; `grace_s` is the time for running answers then. With a finite `answer_s` a connection
    is closed if an answer takes longer, and earlier if that makes room for another. Without a `certificate` (PEM file
    with chain and key) the server uses HTTP; raise HttpServerError, which names its `setting`, if it cannot be used.
    """

    def __init__(
        self,
        app: ASGIApp,
        sock: socket.socket,
        *,
        name: str,
        grace_s: int,
        keep_alive_s: int = 5,
        certificate: Path | None = None,
        setting: str = "",
        most: int = _MOST,
        request_s: float = _REQUEST_S,
        answer_s: float = math.inf,
    ) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # applications decide which proxies to trust
            timeout_keep_alive=keep_alive_s,
            timeout_graceful_shutdown=grace_s,
            ssl_certfile=certificate,
        )
        try:
            config.load()
        except (OSError, ValueError) as error:
            sock.close()
            raise HttpServerError(
                f"The certificate {certificate} cannot be used ({error}): put certificate, chain and key into that "
                f"file, and correct `{setting}`."
            ) from error
        bound = sock.getsockname()
        if isinstance(bound, str):
            self.address = f"unix:{bound}"
        else:
            host = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
            self.address = f"{'http' if certificate is None else 'https'}://{host}:{bound[1]}"
        self._sock = sock
        self._server = _Server(config, sock, most=most, request_s=request_s, answer_s=answer_s)
        self._thread = threading.Thread(target=self._server.run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait(self) -> None:
        while self._thread.is_alive():
            self._thread.join(1.0)  # in steps, so that Ctrl-C works

    def stop(self) -> None:
        """Finish running answers within the grace time, and stop. Idempotent."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join()
        self._sock.close()


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, sock: socket.socket, *, most: int, request_s: float, answer_s: float
    ) -> None:
        super().__init__(config)
        self._sock = sock
        self._request_s, self._answer_s = request_s, answer_s
        self._connections: Connections[socket.socket] = Connections(
            most, clock=time.monotonic, answer_s=_UNREAD_S if answer_s < math.inf else math.inf
        )
        self._working: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets or [])
        self._begin(self._accept())
        self._begin(self._sweep())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._working:
            task.cancel()
        await super().shutdown(sockets=sockets or [])
        for protocol in list(self.server_state.connections):
            protocol.transport.abort()
        await asyncio.sleep(0.0)  # in which they are closed
        for connection in list(self._connections):  # those without a protocol yet
            connection.close()

    def _begin(self, work: Any) -> asyncio.Task[None]:  # noqa: ANN401 - a coroutine
        task = asyncio.get_running_loop().create_task(work)
        self._working.add(task)
        task.add_done_callback(self._working.discard)
        return task

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        self._sock.settimeout(0.0)
        while True:
            try:
                connection, address = await loop.sock_accept(self._sock)
            except OSError:  # the client has gone, or there are no file descriptors left
                await asyncio.sleep(_PAUSE_S)
                continue
            ends = self._connections.add(connection, str(address[0]) if address else "")  # none of a Unix socket
            if ends is not None:
                cut(ends)
            if ends is not connection:
                # A task that is cancelled before it has begun runs none of its code.
                self._begin(self._connect(connection)).add_done_callback(partial(_close_cancelled, connection))
            else:
                connection.close()

    async def _connect(self, connection: socket.socket) -> None:
        secure = self.config.ssl

        def protocol() -> _Protocol:
            return _Protocol(self.config, self.server_state, self.lifespan.state, connection, self._connections)

        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                protocol, connection, ssl=secure, ssl_handshake_timeout=self._request_s if secure else None
            )
        except OSError:  # of TLS too
            self._connections.discard(connection)
            connection.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(_SWEEP_S, self._request_s / 2))
            for connection in self._connections.overdue(wait_s=self._request_s, answer_s=self._answer_s):
                cut(connection)


def _close_cancelled(connection: socket.socket, task: asyncio.Task[None]) -> None:
    if task.cancelled():
        connection.close()


class _Protocol(H11Protocol):
    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        connection: socket.socket,
        connections: Connections[socket.socket],
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._connection = connection
        self._all = connections

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._all.discard(self._connection)

    def handle_events(self) -> None:
        super().handle_events()
        self._note()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._note()

    def _note(self) -> None:
        self._all.note(self._connection, waits=self.conn.their_state in {h11.IDLE, h11.SEND_BODY})

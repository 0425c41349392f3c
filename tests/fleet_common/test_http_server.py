import asyncio
import gc
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from fleet_common.http_server import HttpServer
from tests.support.tls_fleet import of_server
from tests.support.waiting import PATIENCE_S


class Site:
    def __init__(self) -> None:
        self.streams = 0
        self.go_on = threading.Event()
        self.blocked = threading.Event()
        self.app = Starlette(
            routes=[
                Route("/", self._hello),
                Route("/echo", self._echo, methods=["POST"]),
                Route("/stream", self._stream),
                Route("/block", self._block),
            ]
        )

    async def _hello(self, _request: Request) -> PlainTextResponse:
        return PlainTextResponse("hello")

    async def _echo(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse((await request.body()).decode())

    async def _block(self, _request: Request) -> PlainTextResponse:
        self.blocked.set()
        self.go_on.wait()
        time.sleep(0.3)  # noqa: ASYNC251 - until the server has been asked to stop
        return PlainTextResponse("")

    async def _stream(self, _request: Request) -> StreamingResponse:
        async def pieces() -> Any:
            self.streams += 1
            yield "begin "
            await asyncio.to_thread(self.go_on.wait)
            yield "end"

        return StreamingResponse(pieces())


@contextmanager
def serving(site: Site, **given: Any) -> Iterator[int]:
    sock = socket.create_server(("127.0.0.1", 0))
    server = HttpServer(site.app, sock, name="test", grace_s=1, **({"most": 8} | given))
    server.start()
    try:
        yield sock.getsockname()[1]
    finally:
        site.go_on.set()
        server.stop()


def silent(port: int, number: int, *, first: bytes = b"") -> list[socket.socket]:
    made = [socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) for _ in range(number)]
    for each in made:
        each.sendall(first)
    return made


def begun(port: int, request: bytes) -> socket.socket:
    """Return a connection whose answer has begun; on a busy machine the first requests may come too late."""
    while True:
        [client] = silent(port, 1, first=request)
        if client.recv(12):
            return client
        client.close()


def ask(port: int, method: str = "GET", path: str = "/", body: bytes | None = None, **given: Any) -> str:
    kind = http.client.HTTPSConnection if given else http.client.HTTPConnection
    connection = kind("127.0.0.1", port, timeout=PATIENCE_S, **given)
    try:
        connection.request(method, path, body=body)
        answer = connection.getresponse()
        assert answer.status == 200
        return answer.read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize(
    "first",
    [b"", b"GET / HTTP/1.1\r\nHost: x\r\n", b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nx"],
    ids=["nothing", "half a head", "half a body"],
)
def test_clients_that_say_nothing_or_half_keep_nobody_out(first: bytes) -> None:
    with serving(Site()) as port:
        clients = silent(port, 40, first=first)
        for _ in range(3):
            assert ask(port) == "hello"
            assert ask(port, "POST", "/echo", b"x" * 100_000) == "x" * 100_000
            clients += silent(port, 20, first=first)
        for each in clients:
            each.close()


def test_a_request_has_to_come_in_time() -> None:
    with serving(Site(), request_s=0.2) as port:
        for first in (b"", b"GET / HTTP/1.1\r\n", b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx"):
            [client] = silent(port, 1, first=first)
            assert client.recv(1) == b""
            client.close()


def test_clients_that_begin_no_tls_keep_nobody_out(tmp_path: Path) -> None:
    certificate, authority = of_server(tmp_path)
    trusts = ssl.create_default_context(cafile=str(authority))
    with serving(Site(), certificate=certificate, request_s=PATIENCE_S) as port:
        clients = silent(port, 40)
        assert ask(port, context=trusts) == "hello"
        for each in clients:
            each.close()
    with serving(Site(), certificate=certificate, request_s=0.2) as port:
        [client] = silent(port, 1)
        assert client.recv(1) == b"", "its time is over"
        client.close()


def test_an_answer_under_way_is_not_ended_by_others() -> None:
    site = Site()
    with serving(site, request_s=0.2) as port:
        stream = begun(port, b"GET /stream HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        for each in silent(port, 40):
            assert each.recv(1) == b""
            each.close()
        site.go_on.set()
        received = b""
        while piece := stream.recv(4096):
            received += piece
        assert b"end" in received
        stream.close()


def test_a_connection_that_is_kept_serves_again_after_its_answer() -> None:
    with serving(Site(), most=1) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        for _ in range(3):
            connection.request("GET", "/")
            assert connection.getresponse().read() == b"hello"
        # It waits for its next request now, so another may take its slot.
        assert ask(port) == "hello"
        connection.close()


def test_it_ends_with_connections_open_and_handshakes_under_way(tmp_path: Path) -> None:
    certificate, authority = of_server(tmp_path)
    with serving(Site(), certificate=certificate) as port:
        clients = silent(port, 3)
        ask(port, context=ssl.create_default_context(cafile=str(authority)))
    for each in clients:
        each.close()


def test_connections_that_come_while_the_server_stops_are_closed() -> None:
    site = Site()
    with serving(site, most=2) as port:
        blocking = silent(port, 1, first=b"GET /block HTTP/1.1\r\nHost: x\r\n\r\n")
        assert site.blocked.wait(PATIENCE_S)
        clients = silent(port, 40)  # which it accepts in the step in which it stops
    for each in [*blocking, *clients]:
        each.close()
    gc.collect()  # an open socket would be an error

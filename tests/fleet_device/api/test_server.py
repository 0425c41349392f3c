import socket
import statistics
import time

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from fleet_device.api.app import ApiServer, listen
from fleet_device.errors import ConfigurationError


def test_it_serves_on_loopback_until_stopped() -> None:
    async def hello(_request: object) -> PlainTextResponse:
        return PlainTextResponse("hello")

    server = ApiServer(Starlette(routes=[Route("/", hello)]), listen(0))
    server.start()
    assert server.address.startswith("http://127.0.0.1:")
    assert httpx.get(server.address).text == "hello"
    server.stop()
    server.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.address)


def test_a_port_in_use_is_said_in_a_sentence() -> None:
    with listen(0) as taken, pytest.raises(ConfigurationError, match=r"is in use: stop what listens there"):
        listen(taken.getsockname()[1])


def test_answers_leave_at_once_on_a_connection_that_is_kept() -> None:
    # Head and body are two packets: without TCP_NODELAY the body waits for the client's delayed acknowledgement, 40 ms.
    async def hello(_request: object) -> PlainTextResponse:
        return PlainTextResponse("hello")

    server = ApiServer(Starlette(routes=[Route("/", hello)]), listen(0))
    server.start()
    took_s: list[float] = []
    with httpx.Client(base_url=server.address) as client:
        for _ in range(15):
            started = time.perf_counter()
            assert client.get("/").text == "hello"
            took_s.append(time.perf_counter() - started)
    server.stop()
    print(f"median of a request on a kept connection: {statistics.median(took_s) * 1e3:.1f} ms")
    assert statistics.median(took_s) < 0.035


def test_connections_inherit_the_option_that_keeps_answers_from_waiting() -> None:
    with listen(0) as listener, socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

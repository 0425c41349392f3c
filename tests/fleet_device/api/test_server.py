import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from fleet_device.api.server import ApiServer, listen
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

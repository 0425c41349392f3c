import asyncio
import json
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from fleet_common.http_server import HttpServerError
from fleet_common.metrics import ListenAddress
from fleet_common.settings import SettingsError, load_settings
from fleet_device.api.listening import FREE_PORT, ApiServer, listen, listen_as, release
from fleet_device.checks.doctor import running_device
from fleet_device.settings import DeviceSettings
from tests.fleet_device.api.conftest import Make
from tests.fleet_device.checks.test_doctor import HEALTH
from tests.support.memory_device import settings
from tests.support.tls_fleet import of_server


@contextmanager
def serving(app: Starlette, sock: socket.socket, **given: Any) -> Iterator[ApiServer]:
    server = ApiServer(app, sock, **given)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_connections_inherit_the_option_that_keeps_answers_from_waiting() -> None:
    with listen() as listener, socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_unix_socket_is_served_under_any_name_and_removed_at_the_end(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    app, _ = make(api_listen=str(path))
    with serving(app, listen(path)) as server:
        assert (server.address, mode(path)) == (f"unix:{path}", 0o600)
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://fleet") as client:
            body = {"model": "fleet", "messages": [{"role": "user", "content": "t1 t2"}]}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
            streamed = client.post("/v1/chat/completions", json=body | {"stream": True}).text
        assert streamed.endswith("data: [DONE]\n\n")
    assert not path.exists()


def test_a_socket_with_keys_is_for_every_user(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    listener = listen_as(settings(api_listen=str(path), applications=tmp_path / "applications.json"))
    assert mode(path) == 0o666
    release(listener)
    assert not path.exists()


def test_the_socket_of_a_program_that_was_killed_is_replaced_and_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    listen(path).close()  # which leaves the file, as a program that is killed does
    with listen(path), pytest.raises(HttpServerError):
        listen(path)
    path.unlink()
    path.write_text("kept")
    with pytest.raises(HttpServerError):
        listen(path)
    assert path.read_text() == "kept"
    for wrong in (tmp_path / "none" / "api.sock", tmp_path / ("x" * 200)):
        with pytest.raises(HttpServerError, match="api_listen"):
            listen(wrong)


@pytest.mark.parametrize(
    ("listens", "address"),
    [
        ("", None),
        ("127.0.0.1:8321", ListenAddress("127.0.0.1", 8321)),
        ("[::1]:8321", ListenAddress("::1", 8321)),
        ("/run/fleet/api.sock", Path("/run/fleet/api.sock")),
    ],
)
def test_an_address_is_a_port_or_a_path(listens: str, address: object) -> None:
    assert settings(api_listen=listens).api_address == address


@pytest.mark.parametrize("listens", ["0.0.0.0:8321", "192.0.2.1:8321", "[::]:8321"])
def test_beyond_loopback_there_must_be_keys(listens: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="fleet device app add") as caught:
        load_settings(DeviceSettings, config=None, flags={"api_listen": listens})
    assert "\n" not in str(caught.value)
    given = {"api_listen": listens, "applications": tmp_path / "applications.json"}
    assert load_settings(DeviceSettings, config=None, flags=given).api_address == ListenAddress.read(listens)


def test_an_address_at_which_a_request_arrives_needs_no_setting(make: Make) -> None:
    app, _ = make()
    with (
        serving(app, listen(ListenAddress("127.0.0.2", 0))) as server,
        httpx.Client(base_url=server.address) as client,
    ):
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers={"Host": "127.0.0.3"}).status_code == 421


def test_another_machine_learns_without_a_key_only_whether_the_device_works(make: Make) -> None:
    app, backend = make()
    backend.health = lambda: json.loads(HEALTH)  # type: ignore[method-assign]

    async def health(client: str) -> httpx.Response:
        transport = httpx.ASGITransport(app=app, client=(client, 5))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return await http.get("/healthz")

    assert asyncio.run(health("127.0.0.1")).json() == json.loads(HEALTH)
    assert asyncio.run(health("192.0.2.9")).json() == {"status": "waiting", "reason": None}


def test_with_a_certificate_the_port_is_https(make: Make, tmp_path: Path) -> None:
    certificate, authority = of_server(tmp_path)
    trusting = ssl.create_default_context(cafile=str(authority))
    with serving(make()[0], listen(), certificate=certificate) as server:
        assert server.address.startswith("https://127.0.0.1:")
        assert httpx.get(f"{server.address}/v1/models", verify=trusting).status_code == 200
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.address}/v1/models")
    certificate.write_bytes(authority.read_bytes())
    with pytest.raises(HttpServerError, match="api_certificate"):
        ApiServer(make()[0], listen(), certificate=certificate)


@pytest.mark.parametrize("way", ["socket", "https", "all addresses"])
def test_a_running_device_is_found_wherever_it_listens(way: str, make: Make, tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    app, backend = make(api_listen=str(path) if way == "socket" else "")
    backend.health = lambda: json.loads(HEALTH)  # type: ignore[method-assign]
    certificate = of_server(tmp_path)[0] if way == "https" else None
    sock = listen(path if way == "socket" else FREE_PORT)
    host = "0.0.0.0" if way == "all addresses" else "127.0.0.1"
    where = str(path) if way == "socket" else f"{host}:{sock.getsockname()[1]}"
    own = settings(api_listen=where, api_certificate=certificate, applications=tmp_path / "applications.json")
    with serving(app, sock, certificate=certificate):
        found = running_device(own)
        assert found is not None
        assert found.reason == "No edge."
    assert running_device(own) is None


@pytest.mark.parametrize("listens", ["8321", "gateway:8321", "run/api.sock", "127.0.0.1:99999"])
def test_what_is_no_address_is_refused(listens: str) -> None:
    with pytest.raises(SettingsError, match="api_listen"):
        load_settings(DeviceSettings, config=None, flags={"api_listen": listens})

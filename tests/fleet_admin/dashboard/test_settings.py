import http.client
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from fleet_admin.dashboard.app import DashboardServer
from fleet_admin.dashboard.services import Services
from fleet_admin.dashboard.settings import DashboardSettings
from fleet_common.http_server import HttpServerError
from tests.support.tls_fleet import of_server


@pytest.mark.parametrize(
    "given",
    [
        {"listen": "0.0.0.0:8400"},
        {"listen": "[::]:8400"},
        {"listen": "10.0.0.1:8400", "names": "fleet.example"},
        {"listen": "10.0.0.1:8400", "https_certificate": "c.pem"},
        {"listen": "fleet.example:8400"},
        {"listen": "127.0.0.1"},
        {"listen": "127.0.0.1:70000"},
        {"proxies": "proxy.example"},
        {"proxy_account": "X-User"},
    ],
)
def test_what_would_not_be_safe_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        DashboardSettings(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"listen": "127.0.0.1:0"},
        {"listen": "[::1]:8400"},
        {"listen": "localhost:8400"},
        {"listen": "0.0.0.0:8400", "https_certificate": "c.pem", "names": "fleet.example"},
        {"listen": "10.0.0.1:8400", "proxies": "10.0.0.2, 10.1.0.0/16", "names": "fleet.example"},
    ],
)
def test_what_is_safe_is_taken(given: dict[str, str]) -> None:
    DashboardSettings(**given)


def test_over_tls_the_cookie_never_leaves_it(make_services: Callable[..., Services], tmp_path: Path) -> None:
    certificate, authority = of_server(tmp_path)
    services = make_services(listen="127.0.0.1:0", https_certificate=certificate)
    server = DashboardServer(services.settings, services=services)
    try:
        assert server.address.startswith("https://127.0.0.1:")
        port = int(server.address.rpartition(":")[2].strip("/"))
        trusts = ssl.create_default_context(cafile=str(authority))
        connection = http.client.HTTPSConnection("127.0.0.1", port, context=trusts)
        connection.request("GET", "/login")
        answer = connection.getresponse()
        answer.read()
        connection.close()
        assert answer.status == 200
        assert answer.headers["strict-transport-security"] == "max-age=31536000"
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith("__Host-fleet=")
        assert "; Secure" in cookie
    finally:
        server.stop()


def test_a_used_port_and_a_bad_certificate_are_reported(served: str, services: Services, tmp_path: Path) -> None:
    taken = services.settings.model_copy(update={"listen": served.removeprefix("http://")})
    with pytest.raises(HttpServerError):
        DashboardServer(taken, services=services)
    broken = tmp_path / "broken.pem"
    broken.write_text("none")
    settings = services.settings.model_copy(update={"https_certificate": broken})
    with pytest.raises(HttpServerError):
        DashboardServer(settings, services=services)

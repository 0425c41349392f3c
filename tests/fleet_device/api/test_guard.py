import base64
from collections.abc import Iterator

import pytest
from starlette.applications import Starlette

from fleet_device.api.app import create_app
from tests.fleet_device.api.client import ask, error
from tests.support.memory_device import ScriptedAgent, ScriptedBackend, TalkingDrafter, settings


@pytest.fixture
def backend() -> Iterator[ScriptedBackend]:
    backend = ScriptedBackend(ScriptedAgent(), TalkingDrafter())
    yield backend
    backend.close()


@pytest.fixture
def app(backend: ScriptedBackend) -> Starlette:
    return create_app(backend, settings(api_token="sesame"))


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8321", "127.0.0.1.evil.example", "10.0.0.7", "", "[::2]"]
)
def test_a_page_whose_name_resolves_to_loopback_is_not_served(app: Starlette, host: str) -> None:
    for path in ("/healthz", "/v1/models"):
        response = ask(app, "GET", path, headers={"Host": host, "Authorization": "Bearer sesame"})
        assert (response.status_code, error(response)["code"]) == (421, "wrong_host")


@pytest.mark.parametrize("host", ["127.0.0.1:8321", "localhost", "LOCALHOST:1", "[::1]:8321", "[::1]"])
def test_loopback_names_are_served(app: Starlette, host: str) -> None:
    assert ask(app, "GET", "/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("given", [None, "Bearer wrong", "sesame", "Basic sesame", "Bearer s\u00e9same", "Bearer "])
def test_without_the_token_nothing_but_health_is_served(app: Starlette, given: str | None) -> None:
    headers = {} if given is None else {"Authorization": given}
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    response = ask(app, "GET", "/v1/models", headers=raw)  # type: ignore[arg-type] - bytes, for the é
    assert (response.status_code, error(response)["code"]) == (401, "invalid_api_key")
    assert "sesame" not in response.text
    assert ask(app, "GET", "/healthz", headers=headers if given != "Bearer s\u00e9same" else {}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/status"])
def test_a_browser_is_asked_for_the_token_as_a_password_where_it_only_reads(app: Starlette, path: str) -> None:
    def status(word: str, path: str = path, method: str = "GET") -> int:
        basic = base64.b64encode(f"anybody:{word}".encode()).decode()
        return ask(app, method, path, headers={"Authorization": f"Basic {basic}"}).status_code

    assert ask(app, "GET", path).headers["www-authenticate"].startswith("Basic ")
    assert (status("sesame"), status("sesame", method="HEAD")) == (200, 200)
    assert (status("wrong"), status("sesame:"), status("")) == (401, 401, 401)
    assert (status("sesame", method="POST"), status("sesame", path="/v1/models")) == (401, 401)
    for malformed in ("Basic", "Basic \u00e9", "Basic a===", "Basic " + base64.b64encode(b"sesame").decode()):
        raw = {"Authorization": malformed.encode("latin-1")}
        assert ask(app, "GET", path, headers=raw).status_code == 401  # type: ignore[arg-type] - bytes, for the é


def test_with_the_token_everything_is_served(app: Starlette) -> None:
    assert ask(app, "GET", "/v1/models", headers={"Authorization": "bearer sesame"}).status_code == 200


def test_a_device_without_a_token_asks_for_none(backend: ScriptedBackend) -> None:
    assert ask(create_app(backend, settings()), "GET", "/v1/models").status_code == 200


def test_no_answer_lets_a_page_of_another_origin_read_it(app: Starlette) -> None:
    for method in ("GET", "OPTIONS"):
        response = ask(app, method, "/healthz", headers={"Origin": "https://evil.example"})
        assert not [name for name in response.headers if name.startswith("access-control-")]

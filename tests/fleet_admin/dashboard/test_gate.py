from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from fleet_admin.dashboard.app import create_app
from fleet_admin.dashboard.gate import CONTENT_SECURITY_POLICY
from fleet_admin.dashboard.services import Services
from fleet_admin.dashboard.settings import AccountRole
from tests.fleet_admin.dashboard.conftest import ACTOR, BASE, PASSWORD, Browser


def test_errors_have_menu_and_headers(operator: Browser, services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(type(services.log), "_reading", fail)
    answer = operator.get("/edges")
    assert answer.status_code == 500
    assert answer.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert 'aria-label="Pages"' in answer.text
    assert "a defect" not in answer.text


def test_every_answer_forbids_what_is_not_ours(operator: Browser) -> None:
    for path in ("/", "/login", "/nothing", "/static/dashboard.js", "/healthz"):
        headers = operator.get(path).headers
        assert "script-src 'self'" in headers["content-security-policy"], path
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "strict-transport-security" not in headers


CHANGE = {"old": PASSWORD, "new": "another good password", "again": "another good password"}


def test_a_form_without_its_token_changes_nothing(operator: Browser, services: Services) -> None:
    for fields in ({}, {"csrf": ""}, {"csrf": "0" * 64}):
        answer = operator.client.post("/account/password", data={**CHANGE, **fields}, headers={"origin": BASE})
        assert answer.status_code == 403
    assert services.accounts.check("olga", PASSWORD)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "", "http://127.0.0.1.evil.example", "https://127.0.0.1"]
)
def test_a_form_of_another_page_changes_nothing(operator: Browser, services: Services, origin: str) -> None:
    data = {**CHANGE, "csrf": operator.csrf("/account")}
    headers = {"origin": origin} if origin else {}
    assert operator.client.post("/account/password", data=data, headers=headers).status_code == 403
    assert services.accounts.check("olga", PASSWORD)


def test_a_foreign_token_does_nothing(operator: Browser, browsers: Callable[[], Browser], services: Services) -> None:
    other = browsers()
    other.log_in("victor")
    data = {**CHANGE, "csrf": other.csrf("/account")}
    assert operator.client.post("/account/password", data=data, headers={"origin": BASE}).status_code == 403
    assert services.accounts.check("olga", PASSWORD)


def test_what_is_not_a_form_is_refused(operator: Browser) -> None:
    headers = {"origin": BASE, "content-type": "text/plain"}
    assert operator.client.post("/account/password", content=b"old=x", headers=headers).status_code == 415


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil.example:8400"])
def test_a_page_whose_name_resolves_to_us_learns_nothing(operator: Browser, host: str) -> None:
    answer = operator.client.get("/", headers={"host": host})
    assert answer.status_code == 421
    assert "gateway-1" not in answer.text


def test_bodies_and_queries_are_bounded(operator: Browser) -> None:
    big = operator.client.post("/login", data={"account": "x" * 300_000}, headers={"origin": BASE})
    assert big.status_code == 413
    assert operator.get("/devices?filter=" + "x" * 9_000).status_code == 414
    assert operator.get("/devices?filter=" + "x" * 501).status_code == 400
    assert operator.get("/devices?filter=device~%00").status_code == 400
    many = "&".join(f"a{number}=1" for number in range(1_500))
    assert operator.get(f"/devices?{many}").status_code in {200, 414}


@pytest.mark.parametrize(
    "path",
    [
        "/static/../settings.py",
        "/static/..%2f..%2fsettings.py",
        "/static/%2e%2e/%2e%2e/pyproject.toml",
        "/static//etc/passwd",
        "/static/vendor/htmx.min.js",
        "/static/dashboard.css.js",
    ],
)
def test_no_path_leads_out_of_the_assets(operator: Browser, path: str) -> None:
    answer = operator.get(path)
    assert answer.status_code == 404
    assert "root:" not in answer.text


def _behind(services: Services, *, address: str) -> TestClient:
    app = create_app(services)
    return TestClient(app, base_url=BASE, follow_redirects=False, client=(address, 1))


def test_a_proxy_that_is_trusted_says_who_asks(make_services: Callable[..., Services]) -> None:
    services = make_services(proxies="10.1.0.0/16", proxy_account="X-Forwarded-User", names="fleet.example")
    said = {"X-Forwarded-User": "victor", "X-Forwarded-Proto": "https", "Host": "fleet.example"}
    proxied = _behind(services, address="10.1.2.3").get("/account", headers=said)
    assert proxied.status_code == 200
    assert "victor" in proxied.text
    assert "strict-transport-security" in proxied.headers
    assert proxied.headers["set-cookie"].startswith("__Host-fleet=")
    assert "Secure" in proxied.headers["set-cookie"]
    assert _behind(services, address="10.2.0.1").get("/account", headers=said).status_code == 303
    # An account that is not known has no role unless the settings give it one.
    assert (
        _behind(services, address="10.1.2.3").get("/account", headers={**said, "X-Forwarded-User": "x"}).status_code
        == 303
    )
    services.accounts.add("x", role=AccountRole.VIEWER, password=None, actor=ACTOR)
    assert (
        _behind(services, address="10.1.2.3").get("/account", headers={**said, "X-Forwarded-User": "x"}).status_code
        == 200
    )


def test_nobody_can_pretend_to_be_elsewhere(make_services: Callable[..., Services]) -> None:
    """Otherwise each attempt under an invented address would be free."""
    services = make_services(proxies="10.1.0.0/16", names="fleet.example")
    for number in range(30):
        client = _behind(services, address="10.1.2.3")
        browser = Browser(client)
        client.headers["x-forwarded-for"] = f"1.2.3.{number}, 203.0.113.9"
        assert browser.log_in(f"name-{number}", "some wrong password").status_code == 403
    client.headers["x-forwarded-for"] = "9.9.9.9, 203.0.113.9"
    assert browser.log_in("name-30", "some wrong password").status_code == 429

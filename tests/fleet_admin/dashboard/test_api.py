from collections.abc import Callable
from datetime import timedelta
from typing import Any

import jsonschema
import pytest
from starlette.testclient import TestClient

from fleet_admin.dashboard.api import PREFIX
from fleet_admin.dashboard.app import create_app
from fleet_admin.dashboard.endpoints import ENDPOINTS
from fleet_admin.dashboard.services import Services
from fleet_admin.dashboard.settings import AccountRole
from tests.fleet_admin.dashboard.conftest import ACTOR, BASE, Browser, Clock

READ = [each for each in ENDPOINTS if each.method == "GET"]
WRITTEN = [each for each in ENDPOINTS if each.method != "GET"]
NAMES = {"device": "gateway-1", "edge": "edge-1", "session": f"{1:016x}", "alert": "0"}


@pytest.fixture
def client(services: Services) -> TestClient:
    return TestClient(create_app(services), base_url=BASE, raise_server_exceptions=False)


@pytest.fixture
def bearer(services: Services) -> Callable[..., dict[str, str]]:
    def make(role: AccountRole, account: str = "olga", **more: Any) -> dict[str, str]:
        key = services.keys.add("program", account=account, role=role, **more, actor=ACTOR)
        return {"authorization": f"Bearer {key}"}

    return make


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda each: f"{each.method} {each.path}")
def test_without_a_key_there_is_no_data(client: TestClient, endpoint: Any) -> None:
    path = PREFIX + endpoint.path.format(**NAMES)
    for headers in (
        {},
        {"authorization": "Bearer fleet_x"},
        {"authorization": "Basic b2xnYTp4"},
        {"authorization": ""},
    ):
        answer = client.request(endpoint.method, path, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["status"] == 401
        assert "gateway" not in answer.text


@pytest.mark.usefixtures("steering")
@pytest.mark.parametrize("endpoint", READ, ids=lambda each: each.path)
def test_answers_match_the_document(client: TestClient, bearer: Callable[..., dict[str, str]], endpoint: Any) -> None:
    headers = bearer(AccountRole.VIEWER)
    document = client.get(f"{PREFIX}/openapi.json", headers=headers).json()
    answer = client.get(PREFIX + endpoint.path.format(**NAMES), headers=headers)
    assert answer.status_code == 200
    said = document["paths"][PREFIX + endpoint.path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.validate(answer.json(), {**said, "components": document["components"]})


@pytest.mark.usefixtures("steering")
def test_settings_are_those_that_the_broker_retains(client: TestClient, bearer: Callable[..., dict[str, str]]) -> None:
    found = client.get(f"{PREFIX}/devices/gateway-1/settings", headers=bearer(AccountRole.VIEWER)).json()
    assert (found["state"], found["wanted"], found["values"]) == ("in force", {"top_k": 7}, {"top_k": 7, "ahead": True})


@pytest.mark.parametrize("endpoint", WRITTEN, ids=lambda each: f"{each.method} {each.path}")
def test_a_viewer_changes_nothing(
    client: TestClient, bearer: Callable[..., dict[str, str]], services: Services, endpoint: Any
) -> None:
    path = PREFIX + endpoint.path.format(**NAMES)
    for headers in (bearer(AccountRole.VIEWER), bearer(AccountRole.OPERATOR, "victor")):
        assert client.request(endpoint.method, path, headers=headers, json={}).status_code == 403
    assert services.log.quarantines() == []


def test_an_operator_shuts_a_device_out_and_lets_it_in(
    client: TestClient, bearer: Callable[..., dict[str, str]], services: Services
) -> None:
    headers = bearer(AccountRole.OPERATOR)
    path = f"{PREFIX}/devices/gateway-1/quarantine"
    answer = client.post(path, headers=headers, json={"duration": "2h", "reason": "It floods."})
    assert answer.status_code == 200
    assert [each.reason for each in services.log.quarantines()] == ["It floods."]
    assert client.delete(path, headers=headers).status_code == 200
    assert services.log.quarantines() == []


def test_a_cookie_changes_nothing_by_way_of_the_api(operator: Browser, services: Services) -> None:
    """Another site's page can make a browser submit a form, but not send a header with a key."""
    path = f"{PREFIX}/devices/gateway-1/quarantine"
    assert operator.post(path).status_code == 415
    assert operator.client.post(path, json={}, headers={"origin": BASE}).status_code == 415
    assert operator.client.delete(path, headers={"origin": BASE}).status_code == 415
    assert services.log.quarantines() == []
    assert operator.get(f"{PREFIX}/devices").status_code == 200


def test_a_key_that_has_run_out_or_was_removed_is_not_taken(
    client: TestClient, bearer: Callable[..., dict[str, str]], services: Services, clock: Clock
) -> None:
    headers = bearer(AccountRole.VIEWER, lasts=timedelta(days=1))
    assert client.get(f"{PREFIX}/edges", headers=headers).status_code == 200
    clock.now += timedelta(days=1)
    assert client.get(f"{PREFIX}/edges", headers=headers).status_code == 401
    other = bearer(AccountRole.VIEWER)
    assert client.get(f"{PREFIX}/edges", headers=other).status_code == 200
    services.accounts.remove("olga", actor=ACTOR)
    assert client.get(f"{PREFIX}/edges", headers=other).status_code == 401


def test_a_key_opens_no_pages(client: TestClient, bearer: Callable[..., dict[str, str]]) -> None:
    answer = client.get("/devices", headers=bearer(AccountRole.OPERATOR), follow_redirects=False)
    assert answer.status_code == 303


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("limit=0", "limit"),
        ("limit=100000000000000000000", "limit"),
        ("colour=red", "colour"),
        ("since=yesterday", "since"),
        ("limit=1&limit=2", "several times"),
        ("device=%00", "NUL"),
        ("device=%ff", "cannot be read"),
        ("since=99999999999d", "since"),
    ],
)
def test_what_cannot_be_understood_is_said(
    client: TestClient, bearer: Callable[..., dict[str, str]], query: str, said: str
) -> None:
    answer = client.get(f"{PREFIX}/sessions?{query}", headers=bearer(AccountRole.VIEWER))
    assert answer.status_code == 400
    assert said in answer.json()["error"]["sentence"]


@pytest.mark.parametrize(
    "text", ["' OR 1=1 --", "'; DROP TABLE devices; --", '" UNION SELECT password FROM accounts --', "%", "_", "\\"]
)
def test_no_text_becomes_a_statement(
    client: TestClient, bearer: Callable[..., dict[str, str]], services: Services, text: str
) -> None:
    headers, known = bearer(AccountRole.OPERATOR), len(services.log.devices())
    assert client.get(f"{PREFIX}/sessions", params={"device": text}, headers=headers).json() == []
    assert client.get(f"{PREFIX}/events", params={"kind": text}, headers=headers).json() == []
    assert client.get(f"{PREFIX}/devices/{text}", headers=headers).status_code in {404, 400}
    assert client.get(f"{PREFIX}/sessions/{text}", headers=headers).status_code in {404, 400}
    answer = client.post(f"{PREFIX}/devices/gateway-1/quarantine", headers=headers, json={"reason": text})
    assert answer.json()["reason"] == text
    assert len(services.log.devices()) == known

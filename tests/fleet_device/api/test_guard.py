import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from fleet_device.applications import Application, ApplicationsFile, new_key
from tests.fleet_device.api.client import ask, error
from tests.fleet_device.api.conftest import Make
from tests.support.device_status import device_status
from tests.support.keys_file import keys_file
from tests.support.memory_device import ScriptedAgent, ScriptedBackend
from tests.support.waiting import PATIENCE_S, until


@pytest.fixture
def app(make: Make, tmp_path: Path) -> Starlette:
    return make(applications=keys_file(tmp_path))[0]


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


def test_the_status_is_guarded_too(app: Starlette) -> None:
    assert ask(app, "GET", "/status").headers["www-authenticate"] == "Bearer"
    response = ask(app, "GET", "/status", headers={"Authorization": "Bearer sesame"})
    assert (response.json(), response.headers["cache-control"]) == (device_status(), "no-store")


def test_no_answer_lets_a_page_of_another_origin_read_it(app: Starlette) -> None:
    for method in ("GET", "OPTIONS"):
        response = ask(app, method, "/healthz", headers={"Origin": "https://evil.example"})
        assert not [name for name in response.headers if name.startswith("access-control-")]


class Place:
    def __init__(self, folder: Path, make: Make) -> None:
        self.make = make
        self.file = ApplicationsFile(folder / "applications.json")
        self.now = 0.0
        self.backends: list[ScriptedBackend] = []

    def add(self, name: str, **quotas: int) -> str:
        key, digest = new_key()
        with self.file.changing() as applications:
            applications.append(Application(name=name, sha256=digest, **quotas))
        return key

    def app(self, agent: ScriptedAgent | None = None, **given: Any) -> Starlette:
        app, backend = self.make(agent, waiting=8, clock=lambda: self.now, applications=self.file.path, **given)
        self.backends.append(backend)
        return app


@pytest.fixture
def place(tmp_path: Path, make: Make) -> Place:
    return Place(tmp_path, make)


def chat(app: Starlette, key: str | None, **fields: Any) -> httpx.Response:
    body = {"model": "fleet", "messages": [{"role": "user", "content": "t1 t2"}], **fields}
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return ask(app, "POST", "/v1/chat/completions", body=body, headers=headers)


def test_each_application_is_let_in_by_its_key_and_nobody_else_is(place: Place) -> None:
    one, other = place.add("one"), place.add("other")
    app = place.app()
    assert [chat(app, key).status_code for key in (one, other)] == [200, 200]
    assert place.backends[0].agent.apps == ["one", "other"]
    for wrong in (None, "", "wrong", one[:-1], one + "x"):
        response = chat(app, wrong)
        assert (response.status_code, error(response)["code"]) == (401, "invalid_api_key")
        assert "fleet device app add" in error(response)["message"]


def test_a_key_is_not_in_the_file_and_only_its_owner_reads_that(place: Place) -> None:
    key = place.add("one")
    assert key not in place.file.path.read_text()
    assert key.removeprefix("fleet-") not in place.file.path.read_text()
    assert place.file.path.stat().st_mode & 0o077 == 0


def test_a_device_that_runs_notices_who_comes_and_who_goes(place: Place) -> None:
    app = place.app()
    assert chat(app, "anything").status_code == 401
    key = place.add("one")
    assert chat(app, key).status_code == 200
    with place.file.changing() as applications:
        applications.clear()
    assert chat(app, key).status_code == 401


def test_a_file_that_is_none_lets_nobody_in_and_is_named(place: Place) -> None:
    place.file.path.write_text("{]")
    response = chat(place.app(), "key")
    assert response.status_code == 503
    assert "applications.json is no file of applications" in error(response)["message"]


@pytest.mark.parametrize(("quota", "period_s"), [("tokens_per_min", 60.0), ("tokens_per_day", 86_400.0)])
def test_an_application_over_its_tokens_waits_and_the_others_do_not(place: Place, quota: str, period_s: float) -> None:
    key, other = place.add("one", **{quota: 9}), place.add("other")
    app = place.app()
    assert [chat(app, key).status_code for _ in range(2)] == [200, 200]  # six tokens each
    response = chat(app, key)
    assert (response.status_code, error(response)["type"]) == (429, "rate_limit_error")
    assert error(response)["code"] == "rate_limit_exceeded"
    assert "'one' has used its 9 tokens per" in error(response)["message"]
    wait_s = int(response.headers["retry-after"])
    assert 4 * period_s / 9 <= wait_s <= 4 * period_s / 9 + 1
    assert chat(app, other).status_code == 200
    place.now += wait_s - 2.0 - period_s / 9
    assert chat(app, key).status_code == 429
    place.now += 2.0 + period_s / 9
    assert chat(app, key).status_code == 200


def test_an_application_has_no_more_requests_at_once_than_it_may(place: Place) -> None:
    key = place.add("one", requests_at_once=2)
    agent = ScriptedAgent(gate=threading.Semaphore(0))
    app = place.app(agent)
    answers: list[int] = []
    waits = [threading.Thread(target=lambda: answers.append(chat(app, key).status_code)) for _ in range(2)]
    for thread in waits:
        thread.start()
    backend = place.backends[0]
    until(lambda: backend.queue.running + backend.queue.waiting == 2)
    response = chat(app, key)
    assert response.status_code == 429
    assert "'one' has 2 requests at once of at most 2" in error(response)["message"]
    assert error(chat(app, key, n=3))["param"] == "n"
    agent.gate.release(100)
    for thread in waits:
        thread.join(PATIENCE_S)
    assert answers == [200, 200]
    assert chat(app, key).status_code == 200


def test_a_text_that_fails_or_is_refused_gives_its_place_back(place: Place) -> None:
    key = place.add("one", requests_at_once=1)
    agent = ScriptedAgent(error=ZeroDivisionError("broken"))
    app = place.app(agent)
    assert [chat(app, key).status_code for _ in range(3)] == [500] * 3
    assert [chat(app, key, n=99).status_code for _ in range(2)] == [400] * 2
    agent.error = None
    assert chat(app, key).status_code == 200

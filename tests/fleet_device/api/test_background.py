import asyncio
import hashlib
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from fleet_device.api.records import KEEP_S
from fleet_device.applications import Application, ApplicationsFile
from fleet_device.errors import SessionFailed
from schemas.reasons import EndReason
from tests.fleet_device.api.client import Sent, ask, ask_and_leave, chat, complete, error
from tests.fleet_device.api.conftest import Make
from tests.support.memory_device import ScriptedAgent
from tests.support.waiting import until

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def numbered(response: httpx.Response) -> dict[int, str]:
    """Return the events of a stream by their numbers, without comments."""
    found = {}
    for part in response.text.split("\n\n"):
        if part.startswith("id: "):
            number, _, rest = part.removeprefix("id: ").partition("\n")
            found[int(number)] = rest.partition("data: ")[2]
    return found


def text_of(events: dict[int, str]) -> str:
    bodies = [json.loads(each) for each in events.values() if each != "[DONE]"]
    return "".join(choice.get("text", "") for body in bodies for choice in body["choices"])


def place_of(response: httpx.Response) -> str:
    return response.headers["content-location"]


def respond(app: Starlette, **fields: Any) -> httpx.Response:
    return ask(app, "POST", "/v1/responses", body={"model": "fleet", "input": "t1 t2", "background": True, **fields})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.mark.parametrize("send", [chat, complete])
def test_a_client_gets_the_events_behind_its_last_one(app: Starlette, send: Any) -> None:
    first = send(app, stream=True, background=True)
    events = numbered(first)
    assert list(events) == list(range(len(events)))
    assert events[len(events) - 1] == "[DONE]"
    place = place_of(first)
    assert json.loads(events[0])["id"] == place.rpartition("/")[2]
    again = ask(app, "GET", place, headers={"Last-Event-ID": "1"})
    assert again.headers["content-type"].startswith("text/event-stream")
    assert numbered(again) == {number: each for number, each in events.items() if number > 1}
    assert numbered(ask(app, "GET", f"{place}?starting_after=1")) == numbered(again)
    assert numbered(ask(app, "GET", place)) == events
    over = ask(app, "GET", place, headers={"Last-Event-ID": str(len(events) - 1)})
    assert (over.status_code, over.content) == (204, b"")
    assert error(ask(app, "GET", place, headers={"Last-Event-ID": "x"}))["param"] == "starting_after"


def test_a_request_without_background_has_no_ids(app: Starlette) -> None:
    response = complete(app, stream=True)
    assert numbered(response) == {}
    assert "content-location" not in response.headers


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "t1"}]}, "background"),
        ("/v1/completions", {"prompt": "t1"}, "background"),
        ("/v1/completions", {"prompt": "t1", "stream": True, "n": 2}, "background"),
        ("/v1/responses", {"input": "t1", "background": False, "store": True}, "store"),
    ],
)
def test_what_cannot_run_in_the_background_is_refused(
    app: Starlette, path: str, fields: dict[str, Any], param: str
) -> None:
    response = ask(app, "POST", path, body={"model": "fleet", "background": True, **fields})
    assert (response.status_code, error(response)["param"]) == (400, param)


def test_a_client_that_goes_ends_no_request_in_the_background(make: Make) -> None:
    agent = ScriptedAgent(gate=threading.Semaphore(1))
    app, backend = make(agent)

    async def some(sent: Sent) -> None:
        while not any(b"id: " in message.get("body", b"") for message in sent):  # noqa: ASYNC110
            await asyncio.sleep(0)

    sent = ask_and_leave(app, {"prompt": "t1", "stream": True, "background": True}, some)
    headers = dict(sent[0]["headers"])
    assert agent.gate is not None
    agent.gate.release()
    until(lambda: backend.queue.done == 1)
    assert agent.ended == [EndReason.STOP]
    assert text_of(numbered(ask(app, "GET", headers[b"content-location"].decode()))) == "t1 t2 t3 "


# Responses


def test_a_response_in_the_background_is_asked_for(make: Make) -> None:
    agent = ScriptedAgent(gate=threading.Semaphore(0))
    app, backend = make(agent)
    begun = respond(app, store=True).json()
    assert (begun["status"] in ("queued", "in_progress"), begun["background"], begun["store"]) == (True, True, True)
    place = f"/v1/responses/{begun['id']}"
    assert agent.gate is not None
    agent.gate.release()
    until(lambda: len(agent.asked) == 1)
    assert ask(app, "GET", place).json()["status"] == "in_progress"
    agent.gate.release()
    until(lambda: backend.queue.done == 1)
    ended = ask(app, "GET", place).json()
    assert (ended["status"], ended["output"][0]["content"][0]["text"]) == ("completed", "t1 t2 t3 ")
    events = numbered(ask(app, "GET", f"{place}?stream=true&starting_after=1"))
    bodies = {number: json.loads(each) for number, each in events.items()}
    assert min(bodies) == 2
    assert all(body["sequence_number"] == number for number, body in bodies.items())
    assert bodies[max(bodies)]["response"] == ended


def test_a_response_that_fails_says_so(make: Make) -> None:
    app, backend = make(ScriptedAgent(error=SessionFailed("Lost.")))
    begun = respond(app).json()
    until(lambda: backend.queue.done == 1)
    ended = ask(app, "GET", f"/v1/responses/{begun['id']}").json()
    assert (ended["status"], ended["error"]) == ("failed", {"code": "session_failed", "message": "Lost."})


def test_a_response_can_be_cancelled_and_deleted(make: Make, folder: Path) -> None:
    agent = ScriptedAgent(gate=threading.Semaphore(1))
    app, backend = make(agent)
    place = f"/v1/responses/{respond(app).json()['id']}"
    until(lambda: len(agent.asked) == 1)
    assert ask(app, "POST", f"{place}/cancel").json()["status"] == "cancelled"
    until(lambda: backend.queue.done == 1)
    assert agent.ended == [EndReason.CANCELLED]
    assert ask(app, "POST", f"{place}/cancel").json()["status"] == "cancelled"
    assert ask(app, "GET", place).json()["status"] == "cancelled"
    assert list(folder.glob("*/*.jsonl"))
    assert ask(app, "DELETE", place).json()["deleted"] is True
    assert not list(folder.glob("*/*.jsonl"))
    assert error(ask(app, "GET", place))["code"] == "not_found"


@pytest.mark.parametrize("path", ["/v1/responses/compact", "/v1/chat/completions/chatcmpl-1"])
def test_a_path_that_only_others_serve_is_not_found(make: Make, path: str) -> None:
    app, _ = make()
    assert ask(app, "POST", path, body={}).status_code == 404


def test_what_is_deleted_ends(make: Make) -> None:
    agent = ScriptedAgent(gate=threading.Semaphore(1))
    app, backend = make(agent)
    place = f"/v1/responses/{respond(app).json()['id']}"
    until(lambda: len(agent.asked) == 1)
    assert ask(app, "DELETE", place).status_code == 200
    until(lambda: backend.queue.done == 1)
    assert agent.ended == [EndReason.CANCELLED]


def test_a_request_is_erased_in_time(make: Make) -> None:
    now = [100.0]
    app, backend = make(clock=lambda: now[0])
    place = f"/v1/responses/{respond(app).json()['id']}"
    until(lambda: backend.queue.done == 1)
    assert ask(app, "GET", place).status_code == 200
    now[0] += KEEP_S
    response = ask(app, "GET", place)
    assert (response.status_code, error(response)["code"]) == (404, "not_found")


def test_an_application_reads_only_its_own(make: Make, tmp_path: Path) -> None:
    mine, other = "sesame", "poppy"
    with ApplicationsFile(tmp_path / "keys.json").changing() as applications:
        applications += [
            Application(name=key, sha256=hashlib.sha256(key.encode()).hexdigest()) for key in (mine, other)
        ]
    app, _ = make(applications=tmp_path / "keys.json")

    def call(method: str, path: str, key: str, body: object = None) -> httpx.Response:
        return ask(app, method, path, body=body, headers={"Authorization": f"Bearer {key}"})

    body = {"model": "fleet", "input": "t1", "background": True}
    place = f"/v1/responses/{call('POST', '/v1/responses', mine, body).json()['id']}"
    assert call("GET", place, mine).status_code == 200
    for method, path in (("GET", place), ("POST", f"{place}/cancel"), ("DELETE", place)):
        assert call(method, path, other).status_code == 404
    assert call("DELETE", place, mine).status_code == 200


# Another process


def test_another_process_goes_on_with_the_same_events(make: Make, folder: Path, tmp_path: Path) -> None:
    agent = ScriptedAgent(gate=threading.Semaphore(1))
    app, _ = make(agent)
    body = {"model": "fleet", "input": "t1 t2", "background": True, "metadata": {"a": "b"}}
    begun = ask(app, "POST", "/v1/responses", body=body).json()
    [file] = folder.glob("*/*.jsonl")
    until(lambda: b'"ids"' in file.read_bytes())
    later = tmp_path / "later"
    shutil.copytree(folder, later)  # as a killed process leaves it
    next_agent = ScriptedAgent(batches=((3,),))
    again, backend = make(next_agent, state_dir=later)
    until(lambda: backend.queue.done == 1)
    assert agent.gate is not None
    agent.gate.release()
    place = f"/v1/responses/{begun['id']}"
    until(lambda: ask(app, "GET", place).json()["status"] == "completed")
    whole, resumed = (numbered(ask(each, "GET", f"{place}?stream=true")) for each in (app, again))
    *_, first_end = whole
    *_, last_end = resumed
    assert first_end == last_end
    assert {**whole, first_end: ""} == {**resumed, last_end: ""}  # the last has figures, such as the plan
    outputs = [json.loads(each[first_end])["response"]["output"] for each in (whole, resumed)]
    assert outputs[0] == outputs[1]
    assert next_agent.asked[0]["policy"] == agent.asked[0]["policy"]


def test_a_call_keeps_its_id_in_another_process(make: Make, folder: Path, tmp_path: Path) -> None:
    agent = ScriptedAgent()
    app, backend = make(agent)
    first = chat(app, stream=True, background=True, tools=[TOOL], tool_choice="required")
    until(lambda: backend.queue.done == 1)
    shutil.copytree(folder, later := tmp_path / "later")
    again, _ = make(state_dir=later)
    assert numbered(ask(again, "GET", place_of(first))) == numbered(first)


def test_what_cannot_go_on_has_failed(make: Make, folder: Path, tmp_path: Path) -> None:
    app, _ = make(ScriptedAgent(gate=threading.Semaphore(1)))
    begun = respond(app).json()
    [file] = folder.glob("*/*.jsonl")
    until(lambda: b'"ids"' in file.read_bytes())
    shutil.copytree(folder, later := tmp_path / "later")
    again, backend = make(state_dir=later, temperature=0.1)
    until(lambda: backend.queue.done == 1)
    ended = ask(again, "GET", f"/v1/responses/{begun['id']}").json()
    assert (ended["status"], ended["error"]["code"]) == ("failed", "session_failed")

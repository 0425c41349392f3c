import asyncio
import re
import threading
from collections.abc import Callable

import httpx
import pytest

from fleet_device.api.replies import HEARTBEAT_S
from fleet_device.errors import EdgeUnavailable
from tests.fleet_device.api.client import ask, chat, chunks, complete, error
from tests.fleet_device.api.conftest import Make
from tests.support.memory_device import ScriptedAgent
from tests.support.waiting import PATIENCE_S, until


class Beats:
    """A stream's clock: some heartbeats pass at once, then something happens, and time stops."""

    def __init__(self, number: int, then: Callable[[], object], *, agent: ScriptedAgent | None = None) -> None:
        self.left = number
        self.then = then
        self.agent = agent
        self.asked: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.asked.append(seconds)
        if self.agent is not None:
            await asyncio.to_thread(self.agent.started.wait, 10.0)
        self.left -= 1
        if self.left >= 0:
            return
        if self.left == -1:
            self.then()
        await asyncio.Event().wait()


def gated(**given: object) -> ScriptedAgent:
    return ScriptedAgent(gate=threading.Semaphore(0), **given)  # type: ignore[arg-type]


def open_gate(agent: ScriptedAgent) -> None:
    agent.gate.release(100)


def comments(response: httpx.Response) -> list[str]:
    return [part[2:] for part in response.text.split("\n\n") if part.startswith(": ")]


def data(response: httpx.Response) -> str:
    kept = "\n\n".join(part for part in response.text.split("\n\n") if not part.startswith(": "))
    return re.sub(r'"id":"[a-z0-9-]+"', "", kept)


def last_error(response: httpx.Response) -> str:
    """Return the last event of a stream: a complete error with no `[DONE]` after it."""
    *_, last, empty = response.text.split("\n\n")
    assert empty == ""
    assert last.startswith('data: {"error":{')
    return last


@pytest.mark.parametrize("ask_for", [chat, complete])
def test_a_waiting_stream_sends_comments_first(make: Make, ask_for: Callable[..., httpx.Response]) -> None:
    plain, _ = make(ScriptedAgent())
    agent = gated()
    beats = Beats(4, lambda: open_gate(agent), agent=agent)
    app, _ = make(agent, pause=beats)
    response = ask_for(app, stream=True)
    assert response.status_code == 200
    assert comments(response) == ["waiting"] * 4
    assert set(beats.asked) == {HEARTBEAT_S}
    assert data(response) == data(ask_for(plain, stream=True))


@pytest.mark.parametrize("ask_for", [chat, complete])
def test_a_stream_has_the_origin_of_each_token_on_request(make: Make, ask_for: Callable[..., httpx.Response]) -> None:
    app, _ = make(ScriptedAgent(batches=((1, 2, 3), (1,)), alone=(1,)))
    sent = chunks(ask_for(app, stream=True, stream_options={"include_origins": True}))
    parts = [chunk["fleet"]["tokens"] for chunk in sent if "tokens" in chunk.get("fleet", {})]
    assert [[(part["text"], part["origin"]) for part in each] for each in parts] == [
        [("t1 ", "drafted"), ("t2 ", "drafted"), ("t3 ", "bonus")],
        [("t1 ", "unverified")],
    ]
    assert [chunk["fleet"]["verified"] for chunk in sent if chunk.get("fleet", {}).get("tokens") == parts[1]] == [False]
    plain = chunks(ask_for(app, stream=True))
    assert not any("tokens" in chunk.get("fleet", {}) for chunk in plain)


def test_a_stream_says_why_it_waits_once_and_in_one_line(make: Make) -> None:
    agent = gated(late="Edge 'edge-1' has not\n\ndata: answered.")
    app, _ = make(agent, pause=Beats(0, lambda: open_gate(agent)))
    response = complete(app, stream=True)
    assert comments(response) == ["Edge 'edge-1' has not data: answered."]
    assert data(response).endswith("data: [DONE]\n\n")


def test_a_whole_answer_comes_whole_however_late(make: Make) -> None:
    agent = gated(late="Edge 'edge-1' has not answered.")
    app, _ = make(agent)
    open_gate(agent)
    assert complete(app).json()["choices"][0]["text"] == "t1 t2 t3 "


def test_a_stream_whose_turn_has_not_come_says_so_after_ten_seconds(make: Make) -> None:
    agent = gated()
    app, backend = make(agent, pause=Beats(4, lambda: open_gate(agent)))
    first = threading.Thread(target=complete, args=(app,))
    first.start()
    assert agent.started.wait(PATIENCE_S)
    response = complete(app, stream=True)
    first.join()
    assert comments(response) == [
        "waiting",
        "Other requests run first; this one waits for its turn.",
        "waiting",
        "waiting",
    ]
    assert backend.queue.done == 2


@pytest.mark.parametrize(("beats", "status"), [(0, 503), (1, 200)])
def test_a_failure_is_a_status_or_later_an_event(make: Make, beats: int, status: int) -> None:
    agent = gated(batches=[()], error=EdgeUnavailable("No edge."))  # a batch without tokens is a place to wait at
    app, _ = make(agent, pause=Beats(beats, lambda: open_gate(agent)))
    response = complete(app, stream=True)
    assert response.status_code == status
    assert "edge_unavailable" in (response.text if status != 200 else last_error(response))


# Devices that die, while their process lives.


def test_a_thread_of_texts_that_ends_answers_those_who_wait_and_all_who_come(make: Make) -> None:
    agent = gated(error=SystemExit("unthinkable"))
    app, backend = make(agent)
    answers: list[httpx.Response] = []
    clients = [threading.Thread(target=lambda: answers.append(complete(app))) for _ in range(2)]
    for client in clients:
        client.start()
    until(lambda: backend.queue.running and backend.queue.waiting == 1)
    open_gate(agent)
    for client in clients:
        client.join()
    answers.append(complete(app))
    assert [response.status_code for response in answers] == [503] * 3
    assert all("restart it" in error(response)["message"] for response in answers)
    assert backend.queue.broken


def test_a_thread_of_texts_that_ends_in_a_stream_ends_it_with_an_error(make: Make) -> None:
    app, _ = make(ScriptedAgent(error=SystemExit("unthinkable")))
    assert "restart it" in last_error(complete(app, stream=True))


def test_a_queue_that_is_given_up_ends_streams_with_an_error(make: Make) -> None:
    agent = ScriptedAgent(gate=threading.Semaphore(1))
    app, backend = make(agent, pause=Beats(1, lambda: threading.Thread(target=backend.queue.abandon).start()))
    assert "shutting down" in last_error(complete(app, stream=True))


def test_a_mistake_of_our_own_in_a_stream_is_an_event_too(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    app, _ = make(ScriptedAgent())
    monkeypatch.setattr("fleet_device.api.replies.session_summary", lambda _text: 1 / 0)
    assert "internal_error" in last_error(complete(app, stream=True))


def test_a_mistake_of_our_own_before_any_text_has_openai_s_shape(make: Make) -> None:
    app, backend = make(ScriptedAgent())
    backend.targets = lambda: 1 // 0  # type: ignore[method-assign,assignment,return-value]
    response = ask(app, "POST", "/v1/completions", body={"prompt": "t1"}, raising=False)
    assert response.status_code == 500
    assert error(response)["code"] == "internal_error"

"""The API without a network: requests straight into the ASGI application."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import httpx
from starlette.types import ASGIApp

from fleet_device.api.requests import ChatRequest
from fleet_device.requests.structured import ChatMessage
from tests.support.waiting import PATIENCE_S

BASE = "http://127.0.0.1:8321"
USER = [{"role": "user", "content": "t1 t2"}]


def ask(
    app: ASGIApp,
    method: str,
    path: str,
    *,
    body: object = None,
    content: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    raising: bool = True,
) -> httpx.Response:
    """Send one request; return the whole response, or raise the application's exception."""

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=raising)
        async with httpx.AsyncClient(transport=transport, base_url=BASE, timeout=PATIENCE_S) as client:
            return await client.request(method, path, json=body, content=content, headers=headers)

    return asyncio.run(asyncio.wait_for(run(), PATIENCE_S))


def chat(app: ASGIApp, **fields: Any) -> httpx.Response:
    return ask(app, "POST", "/v1/chat/completions", body={"model": "fleet", "messages": USER, **fields})


def complete(app: ASGIApp, **fields: Any) -> httpx.Response:
    return ask(app, "POST", "/v1/completions", body={"prompt": "t1 t2", **fields})


def respond(app: ASGIApp, **fields: Any) -> httpx.Response:
    return ask(app, "POST", "/v1/responses", body={"model": "fleet", "input": "t1 t2", **fields})


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the events of a stream, which must end as OpenAI's do."""
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def error(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"].endswith(".")
    found: dict[str, Any] = body["error"]
    return found


Sent = list[dict[str, Any]]


def ask_and_leave(app: ASGIApp, body: object, when: Callable[[Sent], Awaitable[None]]) -> Sent:
    """Send a completion request and hang up after `when`, which sees the bytes so far; return all of them."""
    raw = json.dumps(body).encode()
    sent: Sent = []
    given = False

    async def receive() -> dict[str, Any]:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": raw, "more_body": False}
        await when(sent)
        return {"type": "http.disconnect"}

    return _exchange(app, receive, sent)


def exchange(app: ASGIApp, parts: list[dict[str, Any]]) -> Sent:
    """Send a completion request in parts; return what was sent back."""
    sent: Sent = []

    async def receive() -> dict[str, Any]:
        return parts.pop(0)

    return _exchange(app, receive, sent)


def _exchange(app: ASGIApp, receive: Callable[[], Awaitable[dict[str, Any]]], sent: Sent) -> Sent:
    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"host", b"localhost:8321"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8321),
    }
    asyncio.run(asyncio.wait_for(app(scope, receive, send), PATIENCE_S))
    return sent


def described(asked: ChatRequest) -> list[ChatMessage]:
    """Return the messages of a request for a template without a place for tools."""
    messages = [each.plain().in_words() for each in asked.messages]
    return messages if asked.offer is None else asked.offer.chat(messages)

import hashlib
import hmac
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from fleet_edge.session_log.alerts.delivery import DeliveryFailed, Webhook, message_of
from fleet_edge.session_log.alerts.settings import check_url
from fleet_edge.session_log.views import AlertView
from schemas.control import Alert, decode_json
from tests.support.waiting import PATIENCE_S

AT = datetime(2026, 5, 1, 12, tzinfo=UTC)
ALERT = AlertView(
    id="5e551001",
    rule="kv-full",
    subject="edge-1",
    device=None,
    severity="warning",
    sentence="Sessions hold 95% of the memory.",
    value=0.95,
    threshold=0.9,
    since_at=AT,
    last_at=AT,
    cleared_at=None,
    delivered=None,
)
SECRET = b"0123456789abcdef0123456789abcdef"


class Received:
    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: list[int] = []
        self.location = ""


@contextmanager
def server(received: Received) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.requests.append((self.path, dict(self.headers), body))
            self.send_response(received.answers.pop(0) if received.answers else 204)
            if received.location:
                self.send_header("Location", received.location)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield httpd.server_address[1]
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


@contextmanager
def hostile(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, suppress(OSError):
                talk(client)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(PATIENCE_S)


def test_an_alert_is_posted_as_json_with_a_signature_that_whoever_has_the_secret_can_check() -> None:
    received = Received()
    with server(received) as port:
        Webhook(f"http://127.0.0.1:{port}/fleet?x=1", fleet="north", secret=SECRET, clock=lambda: 1_777_777_777.9).send(
            [ALERT]
        )
    ((path, headers, body),) = received.requests
    assert path == "/fleet?x=1"
    message = json.loads(body)
    assert (message["rule"], message["state"], message["severity"]) == ("kv-full", "open", "warning")
    assert message["sentence"] == ALERT.sentence
    assert [decode_json(Alert, json.dumps(each).encode()) for each in message["alerts"]] == [
        message_of(ALERT, fleet="north")
    ]
    assert message["alerts"][0]["since"] == "2026-05-01T12:00:00Z"
    assert headers["X-Fleet-Timestamp"] == "1777777777"
    expected = hmac.new(SECRET, b"1777777777." + body, hashlib.sha256).hexdigest()
    assert headers["X-Fleet-Signature"] == f"sha256={expected}"
    assert SECRET.decode() not in str(headers)


def test_alerts_of_one_rule_are_one_message_with_one_sentence() -> None:
    received = Received()
    critical = replace(ALERT, id="2", subject="edge-2", severity="critical")
    with server(received) as port:
        hook = Webhook(f"http://127.0.0.1:{port}/")
        hook.send([ALERT, critical])
        hook.send([ALERT, critical])
        hook.send([critical])
        hook.send([replace(critical, severity="warning")])
    messages = [json.loads(body) for _, _, body in received.requests]
    assert messages[0]["severity"] == "critical"
    assert "2 edges" in messages[0]["sentence"]
    assert [each["subject"] for each in messages[0]["alerts"]] == ["edge-1", "edge-2"]
    one, again, other, graver = (headers["X-Fleet-Delivery"] for _, headers, _ in received.requests)
    assert one == again
    assert len({one, other, graver}) == 3


def test_without_a_secret_nothing_is_signed() -> None:
    received = Received()
    with server(received) as port:
        Webhook(f"http://127.0.0.1:{port}/").send([ALERT])
    assert "X-Fleet-Signature" not in received.requests[0][1]


@pytest.mark.parametrize("status", [301, 307, 400, 401, 500])
def test_what_is_not_taken_failed(status: int) -> None:
    received = Received()
    received.answers = [status]
    with server(received) as port, pytest.raises(DeliveryFailed, match=f"{status}"):
        Webhook(f"http://127.0.0.1:{port}/").send([ALERT])


def test_a_redirect_leads_nowhere() -> None:
    elsewhere, received = Received(), Received()
    with server(elsewhere) as other, server(received) as port:
        received.answers, received.location = [307], f"http://127.0.0.1:{other}/"
        with pytest.raises(DeliveryFailed):
            Webhook(f"http://127.0.0.1:{port}/", secret=SECRET).send([ALERT])
    assert not elsewhere.requests


def _endless_headers(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        client.sendall(b"X: " + b"y" * 60_000 + b"\r\n")


def _endless_body(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        client.sendall(b"y" * 60_000)


def _drip(client: socket.socket) -> None:
    client.settimeout(0.05)
    while True:
        client.sendall(b"H")
        try:
            if not client.recv(60_000):
                return
        except TimeoutError:
            continue


def _silence(client: socket.socket) -> None:
    while client.recv(60_000):
        pass


@pytest.mark.parametrize(
    "talk", [_endless_headers, _drip, _silence, lambda client: client.sendall(b"\x00\xff\r\n\r\n")]
)
def test_a_server_that_means_harm_ends_in_a_sentence(talk: Callable[[socket.socket], None]) -> None:
    with hostile(talk) as port, pytest.raises(DeliveryFailed):
        Webhook(f"http://127.0.0.1:{port}/", longest_s=0.5).send([ALERT])


def test_an_endless_body_is_not_read() -> None:
    with hostile(_endless_body) as port:
        Webhook(f"http://127.0.0.1:{port}/", longest_s=PATIENCE_S).send([ALERT])


def test_a_certificate_of_nobody_is_not_trusted() -> None:
    with hostile(lambda client: client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")) as port, pytest.raises(DeliveryFailed):
        Webhook(f"https://127.0.0.1:{port}/").send([ALERT])


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example/",
        "http://127.0.0.1.hooks.example/",
        "ftp://hooks.example/",
        "hooks.example",
        "https://",
        "https://user:secret@hooks.example/",
        "https://hooks.example/a b",
        "https://hooks.example/\r\nX: y",
        "https://hooks.example:port/",
        "file:///etc/passwd",
        "https://[::1",
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"must|no place"):
        check_url(url)


@pytest.mark.parametrize(
    "url", ["https://hooks.example/x?y=z", "http://localhost:8/", "http://[::1]:8/", "http://127.0.0.1/"]
)
def test_a_url_that_can(url: str) -> None:
    check_url(url)

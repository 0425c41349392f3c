import gzip
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.responses import Response

from fleet_edge.verifiers.contract import Item, TargetAway, VerifierError
from tests.fleet_edge.verifiers.remote.serving import asking, server
from tests.support.inference_server import Fault
from tests.support.waiting import PATIENCE_S, until

PAGE = b"<!DOCTYPE html>\n<html><head><title>Welcome to nginx!</title></head><body><h1>It works</h1></body></html>"


def http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


@contextmanager
def saying(answer: bytes, *, again: bytes = b"") -> Iterator[str]:
    """Listen, send `answer` to every client, then `again` for as long as it is read; yield the address."""
    ended = threading.Event()

    def serve(listening: socket.socket) -> None:
        while not ended.is_set():
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.recv(1 << 16)
                    connection.sendall(answer)
                    while again and not ended.is_set():
                        connection.sendall(again)
                except OSError:
                    pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            ended.set()
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


ENDLESS = b"HTTP/1.1 200 OK\r\nContent-Length: 10737418240\r\n\r\n"
NOTHING_FITS = "check the address and the port"


@pytest.mark.parametrize(
    ("answer", "options", "sentence"),
    [
        (http(PAGE), {}, f"sends a web page at /version; {NOTHING_FITS}"),
        (http(PAGE, "404 Not Found"), {}, "/version"),
        (http(PAGE, "502 Bad Gateway"), {}, "502"),
        (http(b"hello"), {}, f"sends what is no JSON at /version; {NOTHING_FITS}"),
        (http(b""), {}, "vLLM"),
        (http(b"[" * 100_000), {}, "JSON"),
        (http(b'{"version": "\xff\xfe"}'), {}, "JSON"),
        (http(b'{"version": ' + b"9" * 5000 + b"}"), {}, "JSON"),
        (http(b"", "302 Found", "Location: http://127.0.0.1:1/"), {}, "302"),
        (http(b"", "401 Unauthorized"), {}, "key"),
        (http(gzip.compress(bytes(1 << 26)), "200 OK", "Content-Encoding: gzip"), {}, "compressed"),
        (ENDLESS, {"again": b"x" * (1 << 16)}, "sends a longer response"),
        (
            b"HTTP/1.1 200 OK\r\n",
            {"again": b"X-Filler: x\r\n" * 1000},
            "connection early|speak HTTP",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", {}, "closed the connection early"),
        (
            b"SSH-2.0-OpenSSH_9.2\r\nInvalid identification.\r\n\r\n",
            {},
            "HTTP",
        ),
        (b"\x15\x03\x03\x00\x02\x02\x46", {}, "HTTP"),
        (b"", {}, "without"),
    ],
    ids=[
        *("page", "page-404", "page-502", "text", "empty", "deep", "bytes", "digits", "elsewhere", "key", "bomb"),
        *("endless", "headers", "half", "ssh", "tls", "silent"),
    ],
)
def test_what_is_no_inference_server_is_named(answer: bytes, options: dict[str, Any], sentence: str) -> None:
    with (
        saying(answer, **options) as url,
        pytest.raises(VerifierError, match=sentence) as caught,
        asking(url, request_s=PATIENCE_S),
    ):
        pass
    told = str(caught.value)
    assert url in told
    assert "\n" not in told
    assert "<" not in told
    assert told.endswith(".")
    assert len(told) < 400


def test_one_that_takes_connections_and_says_nothing_is_given_up() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        pytest.raises(VerifierError, match=r"0\.3"),
        asking(f"http://127.0.0.1:{listening.getsockname()[1]}", request_s=0.3),
    ):
        pass


def raw(change: Callable[[str], str]) -> Callable[[dict[str, Any]], Response]:
    """Change the JSON of an answer as text, so that it can be invalid JSON."""
    return lambda answer: Response(change(json.dumps(answer)), media_type="application/json")


def number(word: str) -> Callable[[str], str]:
    """Replace the first log-probability."""

    def change(text: str) -> str:
        place = next(re.finditer(r"-[0-9.]+", text))
        return text[: place.start()] + word + text[place.end() :]

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (number("NaN"), "finite"),
        (number("-Infinity"), "finite"),
        (number("1" + "0" * 400), "finite"),
        (number("1e39"), "no finite number|no log-probabilities"),
        (number("true"), "log-probability"),
        (number("null"), "log-probability"),
        (lambda text: text[: len(text) // 2], "JSON"),
        (lambda _text: "null", "object"),
        (lambda text: text + " " * (1 << 22), "longer response"),
    ],
    ids=["nan", "infinity", "digits", "overflow", "true", "null", "half", "nothing", "long"],
)
def test_a_wrong_answer_is_not_taken(change: Callable[[str], str], sentence: str) -> None:
    with server() as one, asking(one) as verifier:
        verifier.open(1)
        verifier.score([Item(1, [1, 2, 3], 2)])
        one.fault = Fault(change=raw(change))
        with pytest.raises(TargetAway, match=sentence) as caught:
            verifier.score([Item(1, [4, 5], 2)])
        told = str(caught.value)
        assert one.url in told
        assert "\n" not in told
        assert verifier.computed(1) == 3
        one.fault = Fault()
        until(lambda: verifier.away() == "")
        assert verifier.score([Item(1, [4, 5], 2)]).shape[0] == 2

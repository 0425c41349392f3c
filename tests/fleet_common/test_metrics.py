import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from fleet_common.http_server import HttpServerError
from fleet_common.metrics import (
    Health,
    Histogram,
    ListenAddress,
    Metric,
    MetricKind,
    MetricsError,
    MetricsPages,
    MetricsSettings,
    exposition,
    read_token,
)
from fleet_common.metrics_server import MetricsServer
from tests.support.waiting import PATIENCE_S, until


def test_a_histogram_counts_up_to_each_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    histogram.observe(2.0, 3)
    assert histogram.counts == [2, 4, 1]
    assert histogram.total == 18.0
    assert list(histogram.buckets()) == [("1", 2), ("2", 6), ("+Inf", 7)]


def test_a_quantile_is_a_bound_of_what_came_since() -> None:
    histogram = Histogram((1.0, 2.0, 4.0))
    assert histogram.quantile(0.95) is None
    histogram.observe(0.5, 100)
    before = list(histogram.counts)
    histogram.observe(1.5, 94)
    histogram.observe(3.0, 6)
    assert histogram.quantile(0.95, since=before) == 4.0
    assert histogram.quantile(0.94, since=before) == 2.0
    assert histogram.quantile(0.5) == 1.0
    histogram.observe(9.0, 10_000)
    assert histogram.quantile(0.95) == float("inf")


def test_the_text_is_what_prometheus_reads() -> None:
    histogram = Histogram((0.1,))
    histogram.observe(0.05)
    hostile = 'a"b\\c\nd'
    families = [
        Metric("dssd_faults_total", MetricKind.COUNTER, "Faults.", ("code",)).by({"quota": 2, hostile: 1}),
        Metric("dssd_sessions", MetricKind.GAUGE, "Open sessions.").of(3),
        Metric("dssd_step_seconds", MetricKind.HISTOGRAM, "Steps.").spread(histogram),
        Metric("dssd_info", MetricKind.GAUGE, "It.", ("a", "b")).of(1.0, "x", "y"),
    ]
    read = {each.name: each for each in text_string_to_metric_families(exposition(families).decode())}
    assert {name: each.type for name, each in read.items()} == {
        "dssd_faults": "counter",
        "dssd_sessions": "gauge",
        "dssd_step_seconds": "histogram",
        "dssd_info": "gauge",
    }
    assert {sample.labels["code"]: sample.value for sample in read["dssd_faults"].samples} == {"quota": 2, hostile: 1}
    assert {(s.name, s.labels.get("le")): s.value for s in read["dssd_step_seconds"].samples} == {
        ("dssd_step_seconds_bucket", "0.1"): 1,
        ("dssd_step_seconds_bucket", "+Inf"): 1,
        ("dssd_step_seconds_count", None): 1,
        ("dssd_step_seconds_sum", None): 0.05,
    }
    assert read["dssd_info"].samples[0].labels == {"a": "x", "b": "y"}


TOKEN = b"0123456789abcdef0123456789abcdef"
WELL = Health({"loop": ""})
ILL = Health({"loop": "", "broker": "The broker cannot be reached."})


REQUEST = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"


def one_metric() -> bytes:
    return b"dssd_x 1\n"


@contextmanager
def serving(
    metrics: Callable[[], bytes] = one_metric, *, ready: Health = WELL, token: bytes | None = None, **given: float
) -> Iterator[int]:
    """Serve at a free port until the end, and stop twice."""
    pages = MetricsPages(metrics=metrics, alive=lambda: WELL, ready=lambda: ready)
    server = MetricsServer(ListenAddress("127.0.0.1", 0), pages, token=token, **given)
    server.start()
    try:
        yield int(server.address.rpartition(":")[2])
    finally:
        server.stop()
        server.stop()


def ask(port: int, path: str, *, method: str = "GET", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_the_three_pages_and_no_others() -> None:
    with serving() as port:
        assert ask(port, "/metrics") == (200, "dssd_x 1\n")
        assert ask(port, "/metrics?x=1") == (200, "dssd_x 1\n")
        assert ask(port, "/metrics", method="HEAD") == (200, "")
        assert ask(port, "/healthz")[0] == 200
        assert ask(port, "/../etc/passwd")[0] == 404
        assert ask(port, "/metrics", method="POST")[0] == 405


def test_who_is_not_ready_says_why() -> None:
    with serving(ready=ILL) as port:
        status, body = ask(port, "/readyz")
    assert status == 503
    assert json.loads(body) == {
        "status": "unavailable",
        "checks": {"loop": "ok", "broker": "The broker cannot be reached."},
    }


def test_without_the_token_there_are_no_metrics_and_no_reasons() -> None:
    good = f"Bearer {TOKEN.decode()}"
    with serving(token=TOKEN, ready=ILL) as port:
        for wrong in ({}, {"Authorization": "Bearer x"}, {"Authorization": good + "0"}, {"Authorization": good[7:]}):
            assert ask(port, "/metrics", **wrong) == (401, "A bearer token is required.\n")
        assert ask(port, "/metrics", Authorization="Bearer \xff") == (401, "A bearer token is required.\n")
        assert json.loads(ask(port, "/readyz")[1]) == {"status": "unavailable"}
        assert ask(port, "/metrics", Authorization=good)[0] == 200
        assert "checks" in json.loads(ask(port, "/readyz", Authorization=good)[1])


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_page_in_a_browser_that_names_another_host_gets_nothing(host: str) -> None:
    with serving() as port:
        assert ask(port, "/metrics", Host=host)[0] == 421
        assert ask(port, "/metrics", Host="localhost:80")[0] == 200


def test_answers_that_nobody_takes_keep_nobody_out() -> None:
    """Each answer is larger than the socket buffers."""
    much = b"x" * 10_000_000
    with serving(lambda: much) as port, ExitStack() as takers:
        for _ in range(80):
            taker = takers.enter_context(socket.create_connection(("127.0.0.1", port)))
            taker.sendall(REQUEST)
        until(lambda: _asked(port))


def _asked(port: int) -> bool:
    try:
        return ask(port, "/healthz")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def test_an_exception_ends_one_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> bytes:
        raise ValueError

    with serving(fail) as port:
        assert ask(port, "/metrics")[0] == 500
        assert ask(port, "/healthz")[0] == 200
    assert "ValueError" in caplog.text


def test_a_port_in_use_is_one_sentence() -> None:
    with serving() as port, pytest.raises(HttpServerError, match=r"metrics\.listen"):
        MetricsServer(ListenAddress("127.0.0.1", port), MetricsPages(lambda: b"", lambda: WELL, lambda: WELL))


def test_the_server_ends_while_somebody_waits() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> bytes:
        begun.set()
        go_on.wait(PATIENCE_S)
        return b""

    with ExitStack() as stack:
        with serving(wait) as port:
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            client.sendall(REQUEST)
            assert begun.wait(PATIENCE_S)
        go_on.set()


@pytest.mark.parametrize("text", ["9464", ":9464", "127.0.0.1", "127.0.0.1:", "a b:1", "host.example:1", "[::1]:70000"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        MetricsSettings(listen=text)


@pytest.mark.parametrize("text", ["0.0.0.0:9464", "192.0.2.1:9464", "[::]:9464"])
def test_beyond_loopback_there_must_be_a_token(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"metrics\.token_file"):
        MetricsSettings(listen=text)
    assert MetricsSettings(listen=text, token_file=tmp_path / "token").address == ListenAddress.read(text)


def test_a_token_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with pytest.raises(MetricsError):
        read_token(path)
    path.write_bytes(TOKEN + b"\n")
    assert read_token(path) == TOKEN
    for wrong in (b"", b"short\n", b"two words of a long token\n", b"x" * 5000, b"\xff" * 32):
        path.write_bytes(wrong)
        with pytest.raises(MetricsError) as caught:
            read_token(path)
        assert "two words" not in str(caught.value)

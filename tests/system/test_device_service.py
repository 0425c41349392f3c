import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from fleet_common.logs import Event
from tests.support.prepared_models import prepared
from tests.support.waiting import PATIENCE_S, until, wait_for_event
from tests.support.whole import FLEET, Whole

pytestmark = [pytest.mark.broker, pytest.mark.models]

LONG = 48  # tokens: enough for something to happen meanwhile


def command(whole: Whole, name: str, *arguments: str) -> list[str]:
    draft = prepared("Q4_0.gguf")
    place = ["--fleet", FLEET, "--device", name, "--port", str(whole.port), "--model", str(draft), "--threads", "1"]
    return [sys.executable, "-m", "fleet_cli.main", "device", *arguments, *place]


@contextmanager
def running(arguments: list[str], **environment: str) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def status(url: str) -> str:
    try:
        return str(httpx.get(f"{url}/healthz").json()["status"])
    except httpx.TransportError:
        return "absent"


def test_an_application_streams_a_text_and_sigterm_lets_it_end(whole: Whole, free_port: int) -> None:
    url = f"http://127.0.0.1:{free_port}"
    ask = {"prompt": "Once upon a time", "max_tokens": LONG, "ignore_eos": True, "mode": "coupled", "seed": 7}
    served = command(whole, "served", "run", "--api-listen", f"127.0.0.1:{free_port}")
    with running(served, FLEET_DEVICE_DRAIN_S="60") as process:
        until(lambda: status(url) == "waiting")
        early = httpx.post(f"{url}/v1/completions", json=ask, timeout=PATIENCE_S)  # an edge may be starting too
        assert (early.status_code, early.json()["error"]["code"]) == (503, "edge_unavailable")
        with whole.edge():
            until(lambda: status(url) == "ok")
            plain = httpx.post(f"{url}/v1/completions", json=ask, timeout=PATIENCE_S).json()
            text = ""
            with httpx.stream(
                "POST", f"{url}/v1/completions", json={**ask, "stream": True}, timeout=PATIENCE_S
            ) as reply:
                lines = (line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: "))
                text += json.loads(next(lines))["choices"][0]["text"]
                process.send_signal(signal.SIGTERM)
                *chunks, done = lines
            assert process.wait(PATIENCE_S) == 0
            text += "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)
    assert done == "[DONE]"
    assert json.loads(chunks[-1])["choices"][0]["finish_reason"] == plain["choices"][0]["finish_reason"] == "length"
    # In coupled mode the same seed gives the same output.
    assert text == plain["choices"][0]["text"]


def test_an_interrupted_text_closes_its_session_and_exits_with_130(whole: Whole) -> None:
    with whole.edge() as edge:
        arguments = command(whole, "interrupted", "generate", "--events", "--max-new-tokens", "900", "--raw")
        with running([*arguments, "--", "Once upon a time"]) as process:
            assert process.stdout is not None
            assert wait_for_event(process.stdout, Event.START) is not None
            assert wait_for_event(process.stdout, Event.TOKENS) is not None
            process.send_signal(signal.SIGINT)
            *_, last = process.stdout
            assert process.wait(PATIENCE_S) == 130
        assert json.loads(last)["finish"] == "cancelled"
        until(lambda: len(edge.orchestrator.sessions) == 0)

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from broker_config.broker import Broker
from fleet_device.drafters.llama_cpp import LlamaCppDrafter
from fleet_device.requests.generate import GenerateRequest, Generation, RequestContext
from schemas.policy import Mode, SamplingPolicy
from tests.support.brokers import StartBroker
from tests.support.prepared_models import prepared
from tests.support.unit import Unit
from tests.support.waiting import PATIENCE_S, until
from tests.support.whole import FLEET, Whole
from tests.system.test_device_service import command, running, status
from tests.system.test_law_of_the_models import prompt_ids

pytestmark = [pytest.mark.broker, pytest.mark.models]

LENGTH = 80
POLICY = SamplingPolicy(mode=Mode.COUPLED, seed=31, min_tokens=LENGTH)
DISTURB_AT = 15  # tokens
LONG_S = 600.0  # of a drain that no test waits for
EDGES = ("edge-1", "edge-2")
SEGMENTS = "SELECT edge, reason, tokens, rounds FROM segments WHERE session = '{}' ORDER BY segment"
OPEN = "SELECT edge FROM segments WHERE reason IS NULL"


@dataclass(frozen=True)
class Edge:
    process: "subprocess.Popen[str]"
    unit: Unit

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        assert self.process.wait(PATIENCE_S) == (0 if number is signal.SIGTERM else -number)


@contextmanager
def edges_of(whole: Whole) -> Iterator[dict[str, Edge]]:
    """Run two edges over one session log."""
    edges = {}
    with ExitStack() as stack:
        for name in EDGES:
            arguments = [
                sys.executable, "-m", "fleet_cli.main", "edge", "run", "--fleet", FLEET, "--edge", name,
                "--port", str(whole.port), "--target", str(prepared("target-Q8_0.gguf")), "--engine", "blocks",
                "--threads", "1", "--db", whole.db, "--spool", str(whole.folder / name),
            ]  # fmt: skip
            unit = stack.enter_context(Unit(whole.folder / f"{name}.unit"))
            process = stack.enter_context(running(arguments, FLEET_EDGE_DRAIN_S="0.5", **unit.environment))
            edges[name] = Edge(process, unit)
        yield edges


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, id="term"),
        pytest.param(signal.SIGKILL, id="kill", marks=pytest.mark.exhaustive),
    ],
)
def test_another_edge_goes_on_with_the_session_of_one_that_ends(
    number: signal.Signals,
    start_mosquitto: StartBroker,
    tmp_path: Path,
    drafters: Callable[[str], LlamaCppDrafter],
) -> None:
    whole, drafter = Whole(start_mosquitto(Broker(edges=EDGES)).port, tmp_path), drafters("Q4_0")
    ended: list[str] = []

    def write(ids: Sequence[int], disturb: Callable[[int], None] = lambda _length: None) -> Generation:
        written: list[int] = []

        def count(tokens: Sequence[int]) -> None:
            written.extend(tokens)
            disturb(len(written))

        request = GenerateRequest(ids, policy=POLICY, max_new_tokens=LENGTH)
        return device.agent.generate(request, RequestContext(on_tokens=count))

    def end_the_serving_edge(length: int) -> None:
        if length >= DISTURB_AT and not ended:
            until(lambda: len(whole.rows(OPEN)) == 1)
            ended.append(str(whole.rows(OPEN)[0]["edge"]))
            edges[ended[0]].end(number)

    with edges_of(whole) as edges, whole.device(drafter) as device:
        until(lambda: len(device.edges.online()) == len(EDGES))
        ids = prompt_ids(drafter)[0]
        wanted = write(ids).tokens
        done = write(ids, end_the_serving_edge)
        (left,) = {*EDGES} - {*ended}
        edges[left].end()  # so that its log is complete
    assert done.tokens == wanted
    (session,) = whole.rows(f"SELECT reason, tokens FROM sessions WHERE session = '{done.session.hex()}'")
    assert (session["reason"], session["tokens"]) == (done.reason.value, len(wanted))
    first, *_, last = whole.rows(SEGMENTS.format(done.session.hex()))
    assert (first["edge"], last["edge"], last["reason"]) == (ended[0], left, done.reason.value)
    if number is signal.SIGTERM:
        assert (first["reason"], done.resumes) == ("handed-over", 1)
        assert first["tokens"] + last["tokens"] == len(wanted)
        assert first["rounds"] + last["rounds"] == done.counters.rounds
        assert whole.rows("SELECT code FROM events WHERE severity != 'info'") == []
        unit = edges[ended[0]].unit
        assert unit.heard.count("STOPPING=1") == 1
        assert unit.heartbeats_since_stopping() >= 1  # it drained on


@pytest.mark.parametrize(
    ("drain_s", "second"),
    [
        pytest.param(0.5, None, id="late"),
        pytest.param(LONG_S, signal.SIGTERM, id="term"),
        pytest.param(LONG_S, signal.SIGINT, id="int", marks=pytest.mark.exhaustive),
    ],
)
def test_a_text_that_is_not_done_in_time_is_given_up_in_so_many_words(
    drain_s: float, second: signal.Signals | None, whole: Whole, tmp_path: Path, free_port: int
) -> None:
    url = f"http://127.0.0.1:{free_port}"
    ask = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True}
    waiting: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: waiting.append(httpx.post(f"{url}/v1/completions", json=ask, timeout=PATIENCE_S))
    )
    with (
        Unit(tmp_path / "device.unit") as unit,
        running(
            command(whole, "late-1", "run", "--api-listen", f"127.0.0.1:{free_port}"),
            FLEET_DEVICE_DRAIN_S=str(drain_s),
            FLEET_DEVICE_REQUESTS_AT_ONCE="1",  # or the second would not wait
            **unit.environment,
        ) as process,
        whole.edge(),
    ):
        until(lambda: status(url) == "ok")
        with httpx.stream("POST", f"{url}/v1/completions", json={**ask, "stream": True}, timeout=PATIENCE_S) as reply:
            lines = (line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: "))
            assert json.loads(next(lines))["choices"]
            asking.start()
            until(lambda: httpx.get(f"{url}/healthz").json()["sessions"]["waiting"] == 1)
            process.send_signal(signal.SIGTERM)
            if second is not None:
                until(lambda: unit.stopping and status(url) == "draining")
                assert process.poll() is None
                process.send_signal(second)
            *_, last = lines
        asking.join(PATIENCE_S)
        assert process.wait(PATIENCE_S) == 0
    error = json.loads(last)["error"]
    assert error["code"] == "cancelled"
    assert "shutting down" in error["message"]
    assert (waiting[0].status_code, waiting[0].json()["error"]["code"]) == (503, "cancelled")
    *_, last_session = whole.rows("SELECT reason FROM sessions ORDER BY rowid")
    assert last_session["reason"] == "cancelled"
    assert unit.heard.count("STOPPING=1") == 1
    assert unit.heartbeats_since_stopping() >= 1

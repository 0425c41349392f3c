import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from broker_config.broker import Broker
from fleet_device.drafters.llama_cpp import LlamaCppDrafter
from fleet_device.requests.generate import Cancellation, GenerateRequest, Generation, RequestContext
from fleet_device.service import DeviceService
from schemas.policy import Mode, SamplingPolicy
from tests.support.brokers import StartBroker
from tests.support.long_texts import first_long
from tests.support.unit import Unit
from tests.support.waiting import until
from tests.support.whole import FLEET, Whole
from tests.system.test_device_service import EXIT_S, PATIENCE_S, command, free_port, long_seed, running, status
from tests.system.test_law_of_the_models import prompt_ids

pytestmark = [pytest.mark.broker, pytest.mark.models]

Load = Callable[[str], LlamaCppDrafter]

POLICY = SamplingPolicy(mode=Mode.COUPLED, seed=31)
LENGTH = 80
EVERY = 15  # tokens
LONG_S = 600.0  # of a drain that no test waits for


EDGES = ("edge-1", "edge-2")
SEGMENTS = "SELECT edge, reason, tokens, rounds FROM segments WHERE session = '{}' ORDER BY segment"
OPEN = "SELECT edge FROM segments WHERE reason IS NULL"


@dataclass(frozen=True)
class Edge:
    process: "subprocess.Popen[str]"
    unit: Unit

    def end(self, second: signal.Signals | None = None) -> None:
        """Send SIGTERM, once or, while it drains, again; the edge must exit without a kill."""
        self.process.send_signal(signal.SIGTERM)
        if second is not None:
            until(lambda: self.unit.stopping)
            assert self.process.poll() is None
            self.process.send_signal(second)
        assert self.process.wait(EXIT_S) == 0


@dataclass
class Site:
    """Two edges over one session log, and a broker."""

    whole: Whole
    edges: dict[str, Edge] = field(default_factory=dict)

    @contextmanager
    def running(self, target: Path, dtype: str, *, drain_s: float) -> Iterator[None]:
        with ExitStack() as stack:
            for name in EDGES:
                arguments = [
                    sys.executable, "-m", "fleet_cli.main", "edge", "run", "--fleet", FLEET, "--edge", name,
                    "--port", str(self.whole.port), "--target", str(target), "--engine", "torch", "--dtype", dtype,
                    "--threads", "1",
                    "--db", self.whole.db, "--spool", str(self.whole.folder / name),
                ]  # fmt: skip
                unit = stack.enter_context(Unit(self.whole.folder / f"{name}.unit"))
                setting = {"FLEET_EDGE_DRAIN_S": str(drain_s)}
                process = stack.enter_context(running(arguments, **setting, **unit.environment))
                self.edges[name] = Edge(process, unit)
            yield

    @contextmanager
    def device(self, drafter: LlamaCppDrafter) -> Iterator[DeviceService]:
        with self.whole.device(drafter, verdict_s=5.0) as device:
            until(lambda: len(device.edges.online()) == len(EDGES), patience_s=PATIENCE_S)
            yield device

    def serving(self) -> str:
        until(lambda: len(self.whole.rows(OPEN)) == 1)
        return str(self.whole.rows(OPEN)[0]["edge"])


@pytest.fixture
def site(start_mosquitto: StartBroker, tmp_path: Path) -> Site:
    return Site(Whole(start_mosquitto(Broker(edges=EDGES)).port, tmp_path))


def write(
    device: DeviceService,
    ids: Sequence[int],
    disturb: Callable[[int], None] = lambda _times: None,
    cancellation: Cancellation | None = None,
) -> Generation:
    written: list[int] = []

    def count(tokens: Sequence[int]) -> None:
        before, now = (len(written) // EVERY, (len(written) + len(tokens)) // EVERY)
        written.extend(tokens)
        if before < now:
            disturb(now)

    return device.agent.generate(
        GenerateRequest(ids, policy=POLICY, max_new_tokens=LENGTH),
        RequestContext(on_tokens=count, cancellation=cancellation or Cancellation()),
    )


def test_an_edge_that_is_told_to_end_hands_its_session_over_to_another(
    site: Site, drafters: Load, target_folder: Path, dtype: str
) -> None:
    drafter = drafters("Q4_0")
    ended: list[str] = []

    def end_the_serving_edge(times: int) -> None:
        if times == 1:
            ended.append(site.serving())
            site.edges[ended[0]].end()

    with site.running(target_folder, dtype, drain_s=0.5), site.device(drafter) as device:
        ids, undisturbed = first_long(lambda ids: write(device, ids), prompt_ids(drafter), tokens=3 * EVERY)
        wanted = undisturbed.tokens
        done = write(device, ids, end_the_serving_edge)
        (left,) = {*EDGES} - {*ended}
        site.edges[left].end()  # so that its log is complete
    assert done.tokens == wanted
    assert done.resumes == 1
    handed_over, taken_over = site.whole.rows(SEGMENTS.format(done.session.hex()))
    assert (handed_over["edge"], handed_over["reason"]) == (ended[0], "handed-over")
    assert (taken_over["edge"], taken_over["reason"]) == (left, done.reason.value)
    assert handed_over["tokens"] + taken_over["tokens"] == len(wanted)
    assert handed_over["rounds"] + taken_over["rounds"] == done.counters.rounds
    (session,) = site.whole.rows(f"SELECT reason, tokens FROM sessions WHERE session = '{done.session.hex()}'")
    assert (session["reason"], session["tokens"]) == (done.reason.value, len(wanted))
    assert site.whole.rows("SELECT code FROM events WHERE severity != 'info'") == []
    unit = site.edges[ended[0]].unit
    assert unit.heard.count("STOPPING=1") == 1
    assert unit.heartbeats_since_stopping() >= 1  # it drained on


def test_a_second_signal_ends_an_edge_at_once(site: Site, drafters: Load, target_folder: Path, dtype: str) -> None:
    drafter = drafters("Q4_0")
    cancellation = Cancellation()

    def end_one_after_the_other(times: int) -> None:
        if times == 1:
            site.edges[site.serving()].end(signal.SIGTERM)
        elif times == 2:
            site.edges[site.serving()].end(signal.SIGINT)
            cancellation.cancel()

    with site.running(target_folder, dtype, drain_s=LONG_S), site.device(drafter) as device:
        ids, _ = first_long(lambda ids: write(device, ids), prompt_ids(drafter), tokens=3 * EVERY)
        done = write(device, ids, end_one_after_the_other, cancellation)
        assert device.edges.online() == ()
    segments = site.whole.rows(SEGMENTS.format(done.session.hex()))
    assert [row["reason"] for row in segments] == ["handed-over"] * 2


ASK = {"prompt": "Once upon a time", "mode": "coupled"}


def test_a_text_that_a_device_has_taken_is_answered_whole(whole: Whole) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    replies: list[httpx.Response] = []
    seed = 0

    def ask() -> None:
        replies.append(
            httpx.post(f"{url}/v1/completions", json={**ASK, "seed": seed, "max_tokens": 24}, timeout=PATIENCE_S)
        )

    with (
        running(command(whole, "whole-1", "run", "--api-port", str(port)), FLEET_DEVICE_DRAIN_S="60") as process,
        whole.edge() as edge,
    ):
        until(lambda: status(url) == "ok", patience_s=PATIENCE_S)
        seed = long_seed(url, ASK)
        ask()
        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: len(edge.orchestrator.sessions) == 1, patience_s=PATIENCE_S)
        process.send_signal(signal.SIGTERM)
        assert process.wait(EXIT_S) == 0
        asking.join(EXIT_S)
    undisturbed, disturbed = replies
    assert disturbed.status_code == httpx.codes.OK
    assert disturbed.json()["choices"] == undisturbed.json()["choices"]


@pytest.mark.parametrize(
    ("drain_s", "second"), [(0.5, None), (LONG_S, signal.SIGTERM), (LONG_S, signal.SIGINT)], ids=["late", "term", "int"]
)
def test_a_text_that_is_not_done_in_time_is_given_up_in_so_many_words(
    drain_s: float, second: signal.Signals | None, whole: Whole, tmp_path: Path
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    ask: dict[str, Any] = {**ASK, "max_tokens": 900}
    waiting: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: waiting.append(httpx.post(f"{url}/v1/completions", json=ask, timeout=PATIENCE_S))
    )
    with (
        Unit(tmp_path / "device.unit") as unit,
        running(
            command(whole, "late-1", "run", "--api-port", str(port)),
            FLEET_DEVICE_DRAIN_S=str(drain_s),
            FLEET_DEVICE_TEXTS_AT_ONCE="1",  # or the second would not wait
            **unit.environment,
        ) as process,
        whole.edge(),
    ):
        until(lambda: status(url) == "ok", patience_s=PATIENCE_S)
        ask["seed"] = long_seed(url, ASK)
        with httpx.stream("POST", f"{url}/v1/completions", json={**ask, "stream": True}, timeout=PATIENCE_S) as reply:
            lines = (line.removeprefix("data: ") for line in reply.iter_lines() if line)
            assert json.loads(next(lines))["choices"]
            asking.start()
            until(lambda: httpx.get(f"{url}/healthz").json()["sessions"]["waiting"] == 1)
            process.send_signal(signal.SIGTERM)
            if second is not None:
                until(lambda: unit.stopping and status(url) == "draining")
                assert process.poll() is None
                process.send_signal(second)
            *_, last = lines
        asking.join(EXIT_S)
        assert process.wait(EXIT_S) == 0
    error = json.loads(last)["error"]
    assert error["code"] == "cancelled"
    assert "shutting down" in error["message"]
    assert (waiting[0].status_code, waiting[0].json()["error"]["code"]) == (503, "cancelled")
    *_, last_session = whole.rows("SELECT reason FROM sessions ORDER BY rowid")
    assert last_session["reason"] == "cancelled"
    assert unit.heard.count("STOPPING=1") == 1
    assert unit.heartbeats_since_stopping() >= 1

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, Self

import httpx
import pytest

from benchmarks.processes import Program
from broker_config.broker import Broker
from broker_config.processes import MosquittoProcess
from dssd.distribution import Dist
from fleet_common.mqtt.settings import BrokerSettings
from fleet_device.api.app import listen
from fleet_device.drafters.without_model import ScriptedDrafter
from fleet_device.gateway import Gateway
from fleet_device.service import DeviceService
from fleet_device.settings import DeviceSettings, OfflinePolicy
from schemas.policy import SamplingPolicy
from tests.support.brokers import StartBroker
from tests.support.scripted_language import draft_language
from tests.support.waiting import until

pytestmark = pytest.mark.broker

FLEET: Final = "home"
PATIENCE_S: Final = 90.0
BEFORE: Final = 30  # tokens that are drafted before the edge is stopped
ASKED: Final[dict[str, Any]] = {
    "prompt": "t1 t2 t3",
    "max_tokens": 60,
    "mode": "coupled",
    "temperature": 0.8,
    "seed": 5,
    "stream": True,
}


class GatedDrafter(ScriptedDrafter):
    """A drafter that pauses after some tokens, so that a test chooses what happens meanwhile."""

    def __init__(self) -> None:
        script = draft_language()
        super().__init__(script, script.words)
        self.reached, self.gate = threading.Event(), threading.Event()
        self._drafted = 0

    def next(self, policy: SamplingPolicy) -> Dist:
        self._drafted += 1
        if self._drafted > BEFORE:
            self.reached.set()
            assert self.gate.wait(PATIENCE_S)
        return super().next(policy)


class Stream:
    """A device with its local API, and an application that streams a completion."""

    def __init__(self, port: int, name: str) -> None:
        self.drafter = GatedDrafter()
        self.text = ""
        self.comments: list[str] = []
        self.finish: str | None = None
        self.done, self.error = False, ""
        settings = DeviceSettings(
            fleet=FLEET,
            device=name,
            broker=BrokerSettings(port=port),
            verdict_s=1.0,
            draft_length=4,
            api_port=0,
            offline=OfflinePolicy.WAIT,
        )
        self._gateway = Gateway(DeviceService(settings, self.drafter))
        self._gateway.serve(listen(0))
        self._gateway.start()
        self._reader = threading.Thread(target=self._read, name=f"read-{name}")

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.drafter.gate.set()
        self._gateway.stop()
        self._reader.join(PATIENCE_S)

    def end(self) -> None:
        self._reader.join(PATIENCE_S)
        assert not self._reader.is_alive()
        assert self.done, self.error

    def _read(self) -> None:
        until(lambda: self._gateway.absence() is None, patience_s=PATIENCE_S)
        url = f"{self._gateway.address}/v1/completions"
        with httpx.stream("POST", url, json=ASKED, timeout=PATIENCE_S) as reply:
            reply.raise_for_status()
            for line in reply.iter_lines():
                if line.startswith(":"):
                    self.comments.append(line)
                elif line == "data: [DONE]":
                    self.done = True
                elif line.startswith("data: "):
                    self._take(json.loads(line.removeprefix("data: ")))

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.error = chunk["error"]["message"]
            return
        (choice,) = chunk["choices"]
        self.text += choice["text"]
        self.finish = choice["finish_reason"] or self.finish


@contextmanager
def edge_of(folder: Path, port: int, name: str) -> Iterator[Program]:
    config = folder / f"{name}.toml"
    settings = {"fleet": FLEET, "edge": name, "db": f"sqlite:///{folder / name}.sqlite3", "spool": str(folder / name)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    config.write_text("\n".join([*lines, "[broker]", f"port = {port}"]), encoding="utf-8")
    cores = os.sched_getaffinity(0)
    program = Program("tests.support.scripted_edge_process", [str(config)], cores=cores, log=folder / f"{name}.log")
    try:
        program.wait_for('"online"', timeout_s=PATIENCE_S)
        yield program
    finally:
        program.send_signal(signal.SIGCONT)
        program.end()


@contextmanager
def streams_of(port: int) -> Iterator[list[Stream]]:
    """Run two devices up to where their drafters pause; some tokens are committed then."""
    with ExitStack() as stack:
        streams = [stack.enter_context(Stream(port, f"device-{number}")) for number in (1, 2)]
        for stream in streams:
            assert stream.drafter.reached.wait(PATIENCE_S)
            until(lambda stream=stream: bool(stream.text), patience_s=PATIENCE_S)  # type: ignore[misc]
        yield streams


@pytest.fixture
def broker(start_mosquitto: StartBroker) -> MosquittoProcess:
    return start_mosquitto(Broker(edges=("edge-0", "edge-1", "edge-2")))


@pytest.fixture
def text(broker: MosquittoProcess, tmp_path: Path) -> str:
    with edge_of(tmp_path, broker.port, "edge-0"), Stream(broker.port, "device-0") as stream:
        stream.drafter.gate.set()
        stream.end()
    assert stream.finish == "length"
    return stream.text


def test_streams_say_why_they_wait_for_a_hung_edge_and_go_on_when_it_does(
    broker: MosquittoProcess, tmp_path: Path, text: str
) -> None:
    with edge_of(tmp_path, broker.port, "edge-1") as edge, streams_of(broker.port) as streams:
        edge.send_signal(signal.SIGSTOP)
        for stream in streams:
            stream.drafter.gate.set()
        for stream in streams:
            until(lambda stream=stream: any("edge-1" in line for line in stream.comments), patience_s=PATIENCE_S)  # type: ignore[misc]
            assert ": waiting" in stream.comments
            assert len(stream.text) < len(text)
        edge.send_signal(signal.SIGCONT)
        for stream in streams:
            stream.end()
            assert (stream.text, stream.finish) == (text, "length")


def test_another_edge_takes_over_what_a_hung_edge_leaves(broker: MosquittoProcess, tmp_path: Path, text: str) -> None:
    port = broker.port
    with edge_of(tmp_path, port, "edge-1") as hung, streams_of(port) as streams:
        hung.send_signal(signal.SIGSTOP)
        with edge_of(tmp_path, port, "edge-2"):
            for stream in streams:
                stream.drafter.gate.set()
            for stream in streams:
                stream.end()
                assert (stream.text, stream.finish) == (text, "length")
            hung.send_signal(signal.SIGCONT)

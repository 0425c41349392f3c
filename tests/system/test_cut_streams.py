import itertools
import json
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from broker_config.processes import MosquittoProcess
from fleet_device.settings import DeviceSettings
from schemas.policy import Mode
from tests.support.processes import BrokerClient, Program, quota_variables, scripted_edge
from tests.support.scripted_language import LANGUAGE, is_possible, reference_text
from tests.support.waiting import PATIENCE_S, until
from tests.support.whole import FLEET

pytestmark = [pytest.mark.broker]

PROMPT = [1, 2, 3]
LENGTH = 400
CUTS = ["client", "device", "edge"] * 3 + ["device"]


class Fleet:
    """An edge and a device, as processes that are killed and started again."""

    def __init__(self, port: int, broker: int, folder: Path, stack: ExitStack) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._broker, self._port, self._folder, self._stack = broker, port, folder, stack
        self._programs = {"edge": self._edge(), "device": self._device()}
        until(lambda: httpx.get(f"{self.url}/healthz", timeout=PATIENCE_S).status_code == 200)

    def kill(self, name: str) -> None:
        self._programs[name].kill()

    def start(self, name: str) -> None:
        self._programs[name] = {"edge": self._edge, "device": self._device}[name]()

    def _edge(self) -> Program:
        identity = BrokerClient("edge-1", "127.0.0.1", self._broker)
        words, quotas = ["--step-ms", "20"], quota_variables()
        edge = scripted_edge(identity, fleet=FLEET, folder=self._folder, words=words, environment=quotas)
        return self._stack.enter_context(edge)

    def _device(self) -> Program:
        arguments = [str(self._broker), str(self._port), str(self._folder / "state")]
        program = Program("tests.support.scripted_device_process", arguments, log=self._folder / "device.log")
        self._stack.enter_context(program)
        program.wait_for("online", timeout_s=PATIENCE_S)
        return program


class CutStream:
    """A client of a device whose stream is cut; `events` are those that it has, by their numbers."""

    def __init__(self, url: str, mode: Mode, temperature: float) -> None:
        self.policy = DeviceSettings(temperature=temperature, seed=7, mode=mode).policy()
        self.events: list[str] = []
        self._url, self._place = url, ""
        self._body = {
            "prompt": PROMPT, "max_tokens": LENGTH, "mode": mode, "temperature": temperature, "seed": 7,
            "stream": True, "background": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }  # fmt: skip

    @contextmanager
    def read(self, events: int | None = None) -> Iterator[None]:
        """Read a number of events, or all, and cut the stream when the context ends."""
        if self._place:
            last = {"Last-Event-ID": str(len(self.events) - 1)}
            reply = httpx.stream("GET", f"{self._url}{self._place}", headers=last, timeout=PATIENCE_S)
        else:
            reply = httpx.stream("POST", f"{self._url}/v1/completions", json=self._body, timeout=PATIENCE_S)
        with reply as stream:
            assert stream.status_code == 200
            self._place = stream.headers.get("content-location", self._place)
            for number, event in itertools.islice(numbered(stream.iter_lines()), events):
                assert number == len(self.events)
                self.events.append(event)
            yield

    def check(self) -> None:
        again = httpx.get(f"{self._url}{self._place}", timeout=PATIENCE_S).text.splitlines()
        assert [event for _, event in numbered(iter(again))] == self.events
        *events, done = self.events
        assert done == "[DONE]"
        chunks = [json.loads(event) for event in events]
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[-1] == LENGTH
        text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
        tokens = [LANGUAGE.words.index(word) for word in text.split()]
        assert len(tokens) == LENGTH
        assert is_possible(PROMPT, self.policy, tokens)
        if self.policy.mode is Mode.COUPLED or not self.policy.temperature:
            assert tokens == reference_text(PROMPT, self.policy.model_copy(update={"mode": Mode.COUPLED}), LENGTH)


def numbered(lines: Iterator[str]) -> Iterator[tuple[int, str]]:
    number = -1
    for line in lines:
        if line.startswith("id: "):
            number = int(line.removeprefix("id: "))
        elif line.startswith("data: "):
            yield number, line.removeprefix("data: ")


def test_streams_that_are_cut_ten_times_are_whole_texts(
    own_mosquitto: MosquittoProcess, tmp_path: Path, free_port: int
) -> None:
    chance = random.Random(46)
    with ExitStack() as stack:
        fleet = Fleet(free_port, own_mosquitto.port, tmp_path, stack)
        kinds = [(Mode.COUPLED, 0.7), (Mode.RESIDUAL, 0.7), (Mode.RESIDUAL, 0.0)]
        streams = [CutStream(fleet.url, mode, temperature) for mode, temperature in kinds]
        for cut in CUTS:
            with ExitStack() as reading:
                for stream in streams:
                    reading.enter_context(stream.read(chance.randrange(1, 9)))
                if cut != "client":
                    fleet.kill(cut)
            if cut != "client":
                fleet.start(cut)
        for stream in streams:
            assert "[DONE]" not in stream.events
            with stream.read():
                pass
            stream.check()

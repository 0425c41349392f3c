import itertools
import json
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from broker_config.processes import MosquittoProcess
from fleet_device.settings import DeviceSettings
from schemas.policy import Mode
from tests.support.memory_device import TalkingCodec
from tests.support.processes import BrokerClient, Program, quota_variables, scripted_edge
from tests.support.scripted_language import LANGUAGE, is_possible, reference_text
from tests.support.waiting import PATIENCE_S, until
from tests.support.whole import FLEET

pytestmark = [pytest.mark.broker]

PROMPT = [1, 2, 3]
LENGTH = 400
CUTS = ["client", "device", "edge"] * 3 + ["device"]
CODEC = TalkingCodec(LANGUAGE.words)


class Cuts:
    """A client of a device whose stream is cut; `events` are those that it has, by their numbers."""

    def __init__(self, port: int, broker: int, folder: Path, stack: ExitStack) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.events: list[str] = []
        self.place = ""
        self._broker, self._port, self._folder, self._stack = broker, port, folder, stack
        self.programs = {"edge": self._edge(), "device": self._device()}
        self.wait_for_edge()

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

    def wait_for_edge(self) -> None:
        until(lambda: httpx.get(f"{self.url}/healthz", timeout=PATIENCE_S).status_code == 200)

    def read(self, body: dict[str, Any], events: int | None, cut: str) -> None:
        """Read a number of events, None for all, and cut the stream."""
        if self.place:
            last = {"Last-Event-ID": str(len(self.events) - 1)}
            reply = httpx.stream("GET", f"{self.url}{self.place}", headers=last, timeout=PATIENCE_S)
        else:
            reply = httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=PATIENCE_S)
        with reply as stream:
            assert stream.status_code == 200
            self.place = stream.headers.get("content-location", self.place)
            for number, event in itertools.islice(numbered(stream.iter_lines()), events):
                assert number == len(self.events)
                self.events.append(event)
            if cut in self.programs:
                self.programs[cut].kill()
        if cut in self.programs:
            self.programs[cut] = {"edge": self._edge, "device": self._device}[cut]()


def numbered(lines: Iterator[str]) -> Iterator[tuple[int, str]]:
    number = -1
    for line in lines:
        if line.startswith("id: "):
            number = int(line.removeprefix("id: "))
        elif line.startswith("data: "):
            yield number, line.removeprefix("data: ")


@pytest.mark.parametrize(("mode", "temperature"), [("coupled", 0.7), ("residual", 0.7), ("residual", 0.0)])
def test_a_stream_that_is_cut_ten_times_is_one_text(
    own_mosquitto: MosquittoProcess, tmp_path: Path, free_port: int, mode: str, temperature: float
) -> None:
    chance = random.Random(46)
    body = {
        "prompt": PROMPT, "max_tokens": LENGTH, "mode": mode, "temperature": temperature, "seed": 7, "stream": True,
        "background": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    with ExitStack() as stack:
        cuts = Cuts(free_port, own_mosquitto.port, tmp_path, stack)
        for cut in CUTS:
            cuts.read(body, chance.randrange(1, 9), cut)
        assert "[DONE]" not in cuts.events
        cuts.read(body, None, "")
        again = httpx.get(f"{cuts.url}{cuts.place}", timeout=PATIENCE_S).text.splitlines()
    assert [event for _, event in numbered(iter(again))] == cuts.events
    *events, done = cuts.events
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == LENGTH
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    tokens = [LANGUAGE.words.index(word) for word in text.split()]
    assert len(tokens) == LENGTH
    policy = DeviceSettings(temperature=temperature, seed=7, mode=Mode(mode)).policy()
    assert is_possible(PROMPT, policy, tokens)
    if mode == "coupled" or not temperature:
        assert tokens == reference_text(PROMPT, policy.model_copy(update={"mode": Mode.COUPLED}), LENGTH)

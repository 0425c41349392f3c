"""Planted causes of slowness, and what `fleet admin` concludes.

The costs are added to the clock of both ends, so that they stand out on a busy machine too, and no test waits for them.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fleet_common.mqtt.link import Message, matches
from fleet_common.mqtt.settings import LinkSettings
from fleet_device.drafters.without_model import LogitsScript, ScriptedDrafter
from fleet_device.requests.generate import GenerateRequest
from fleet_device.service import DeviceService
from fleet_edge.service import EdgeService
from fleet_edge.verifiers.contract import Item
from sampling.distribution import Dist
from schemas.policy import SamplingPolicy
from schemas.topics import Topic, build, wildcard
from tests.support.command import Run, as_json
from tests.support.edge_thread import NO_QUOTAS
from tests.support.links import Clock, Inbox
from tests.support.markov import MarkovScript
from tests.support.memory_broker import MemoryBroker
from tests.support.memory_link import MemoryLink
from tests.support.scripted_language import LANGUAGE, draft_language
from tests.support.scripted_verifier import ScriptedVerifier
from tests.support.tuning import tune
from tests.support.waiting import PATIENCE_S, until
from tests.support.whole import FLEET, Whole

WAITING = {"draft_length": 4, "ahead": False, "edge_only": False, "answer_s": 7200.0}
UNRELATED = MarkovScript(size=LANGUAGE.size, seed=77, sharpness=3.0)


class TimedVerifier(ScriptedVerifier):
    step_s, token_s = 0.1, 0.0

    def __init__(self, clock: Clock) -> None:
        super().__init__(LANGUAGE, LANGUAGE.words)
        self._clock = clock
        self.may_compute = threading.Event()
        self.may_compute.set()

    def score(self, items: Sequence[Item]) -> NDArray[np.float32]:
        assert self.may_compute.wait(PATIENCE_S)
        self._clock.advance(self.step_s + self.token_s * sum(len(item.tokens) for item in items))
        return super().score(items)


class Planted(Whole):
    """The whole system over a broker in memory, with a clock that can be set forward."""

    def __init__(self, broker: MemoryBroker, folder: Path) -> None:
        self.clock, self.broker = Clock(), broker
        self.timed = TimedVerifier(self.clock)
        parts = {"clock": self.clock, "now": self._now, "make_link": self._link}
        super().__init__(1, folder, self.timed, {"quotas": NO_QUOTAS}, parts)

    @contextmanager
    def edge(self) -> Iterator[EdgeService]:
        with super().edge() as service:
            tune(service.orchestrator, {"gather_share": 0.0})  # it would wait for drafts in real time
            yield service

    def far(self, seconds: float) -> Whole:
        """Return the same system for a device that verdicts take this long to reach."""
        whole = Whole(self.port, self.folder, self.verifier, self.options, dict(self.parts))
        whole.parts["make_link"] = lambda link: _FarLink(self.broker, link, self.clock, seconds)
        return whole

    def drafter(self, script: LogitsScript | None = None, *, token_s: float = 0.0) -> ScriptedDrafter:
        return _TimedDrafter(self.clock, script or draft_language(), token_s)

    def listen(self, device: str, inbox: Inbox) -> None:
        """Hear what the edge sends to a device about its sessions."""
        link = MemoryLink(self.broker, "ears")
        link.subscribe(build(Topic.SESSION, fleet=FLEET, device=device), inbox)
        link.start(timeout_s=PATIENCE_S)

    def _now(self) -> datetime:
        """Return a time in the last hour, which is what the commands read."""
        return datetime.now(UTC) + timedelta(minutes=-30, seconds=self.clock.ahead)

    def _link(self, link: LinkSettings) -> MemoryLink:
        return MemoryLink(self.broker, link.client_id, will=link.will)


class _FarLink(MemoryLink):
    def __init__(self, broker: MemoryBroker, link: LinkSettings, clock: Clock, seconds: float) -> None:
        super().__init__(broker, link.client_id, will=link.will)
        self._clock, self._seconds = clock, seconds

    def _receive(self, message: Message) -> None:
        if matches(wildcard(Topic.VERDICT, fleet=FLEET), message.topic):
            self._clock.advance(self._seconds)
        super()._receive(message)


class _TimedDrafter(ScriptedDrafter):
    def __init__(self, clock: Clock, script: LogitsScript, token_s: float) -> None:
        super().__init__(script, LANGUAGE.words)
        self._clock, self._token_s = clock, token_s

    def next(self, policy: SamplingPolicy) -> Dist:
        self._clock.advance(self._token_s)
        return super().next(policy)


def generate(device: DeviceService, tokens: int = 48) -> None:
    device.generate(GenerateRequest((1, 2, 3), policy=SamplingPolicy(seed=1), max_new_tokens=tokens))


@pytest.fixture
def whole(tmp_path: Path) -> Iterator[Planted]:
    broker = MemoryBroker()
    with broker.running():
        yield Planted(broker, tmp_path)


def conclusions(fleet: Run, whole: Planted, kind: str, name: str) -> list[dict[str, Any]]:
    shown = as_json(fleet("admin", kind, name, "--db", whole.db, "--json"))
    found: list[dict[str, Any]] = shown["diagnosis"]["conclusions"]
    return found


def first(fleet: Run, whole: Planted, kind: str, name: str) -> str:
    found = conclusions(fleet, whole, kind, name)
    assert found, "no conclusion"
    return str(found[0]["cause"])


def serve_sound_devices(whole: Planted) -> None:
    for name in ("sound-1", "sound-2"):
        with whole.device(whole.drafter(), name, **WAITING) as device:
            generate(device)


def test_a_slow_link(whole: Planted, fleet: Run) -> None:
    with whole.edge():
        serve_sound_devices(whole)
        with whole.far(3.0).device(whole.drafter(), "far", **WAITING) as device:
            generate(device)
    assert first(fleet, whole, "device", "far") == "link"


def test_a_device_that_drafts_slowly(whole: Planted, fleet: Run) -> None:
    with whole.edge():
        serve_sound_devices(whole)
        with whole.device(whole.drafter(token_s=0.5), "slow", **WAITING) as device:
            generate(device)
    assert first(fleet, whole, "device", "slow") == "slow-drafting"


def test_a_device_whose_processor_is_throttled(whole: Planted, fleet: Run, tmp_path: Path) -> None:
    firmware = tmp_path / "devices/platform/soc/soc:firmware/get_throttled"
    firmware.parent.mkdir(parents=True)
    firmware.write_text("4")
    with whole.edge():
        serve_sound_devices(whole)
        with whole.device(whole.drafter(), "hot") as device:
            device.heat.root = tmp_path
            device.heat.read()
            generate(device)
    named = {name: [each["cause"] for each in conclusions(fleet, whole, "device", name)] for name in ("hot", "sound-1")}
    assert ["throttled" in causes for causes in named.values()] == [True, False]


def test_drafts_that_are_rejected(whole: Planted, fleet: Run) -> None:
    whole.timed.step_s = 0.2
    with whole.edge():
        serve_sound_devices(whole)
        with whole.device(whole.drafter(UNRELATED), "wrong-model", **WAITING) as device:
            generate(device, tokens=80)
    assert first(fleet, whole, "device", "wrong-model") == "rejected-drafts"


def test_an_edge_with_slow_steps(whole: Planted, fleet: Run) -> None:
    whole.timed.step_s = 3.0
    with whole.edge(), whole.device(whole.drafter(), **WAITING) as device:
        generate(device, tokens=24)
    assert first(fleet, whole, "device", "device-1") == "slow-steps"
    assert first(fleet, whole, "edge", "edge-1") == "slow-steps"


def test_an_edge_that_is_full(whole: Planted, fleet: Run) -> None:
    heard = Inbox()
    whole.listen("late", heard)
    with (
        whole.edge() as edge,
        whole.device(whole.drafter(), "early", **WAITING) as early,
        whole.device(whole.drafter(), "late", **WAITING) as late,
        ThreadPoolExecutor(2) as pool,
    ):
        edge.orchestrator.sessions.most = 1
        whole.timed.may_compute.clear()
        running = [pool.submit(generate, early, 40)]
        until(lambda: len(edge.orchestrator.sessions) == 1)
        running.append(pool.submit(generate, late, 16))
        until(lambda: len(heard) > 0)  # it is refused
        whole.clock.advance(10.0)
        whole.timed.may_compute.set()
        for each in running:
            each.result()
    assert first(fleet, whole, "device", "late") == "full"


def test_a_device_that_takes_most_of_an_edge(whole: Planted, fleet: Run) -> None:
    whole.timed.token_s = 0.02
    with (
        whole.edge(),
        whole.device(whole.drafter(), "greedy", edge_only=True) as greedy,
        whole.device(whole.drafter(), "modest-1", **WAITING) as modest,
        whole.device(whole.drafter(), "modest-2", **WAITING) as other,
        ThreadPoolExecutor(8) as pool,
    ):
        texts = [pool.submit(generate, each) for each in (*[greedy] * 6, modest, other)]
        for each in texts:
            each.result()
    found = conclusions(fleet, whole, "edge", "edge-1")
    assert found[0]["cause"] == "one-device"
    assert "greedy" in found[0]["sentence"]

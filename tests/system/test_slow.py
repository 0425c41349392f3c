"""Planted causes of slowness, and what `fleet admin` concludes."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from broker_config.processes import MosquittoProcess
from dssd.distribution import Dist
from fleet_device.drafters.without_model import LogitsScript, ScriptedDrafter
from fleet_device.requests.generate import GenerateRequest
from fleet_device.service import DeviceService
from fleet_edge.verifiers.contract import Item
from schemas.policy import SamplingPolicy
from tests.support.command import Run, as_json
from tests.support.edge_thread import NO_QUOTAS
from tests.support.markov import MarkovScript
from tests.support.relay import Relay
from tests.support.scripted_language import LANGUAGE, draft_language
from tests.support.scripted_verifier import ScriptedVerifier
from tests.support.waiting import until
from tests.support.whole import Whole

pytestmark = pytest.mark.broker

WAITING = {"draft_length": 4, "ahead": False, "edge_only": False}
UNRELATED = MarkovScript(size=LANGUAGE.size, seed=77, sharpness=3.0)


class TimedVerifier(ScriptedVerifier):
    step_s, token_s = 0.01, 0.0

    def score(self, items: Sequence[Item]) -> NDArray[np.float32]:
        time.sleep(self.step_s + self.token_s * sum(len(item.tokens) for item in items))
        return super().score(items)


class TimedDrafter(ScriptedDrafter):
    token_s = 0.0

    def next(self, policy: SamplingPolicy) -> Dist:
        time.sleep(self.token_s)
        return super().next(policy)


def drafter(script: LogitsScript | None = None, *, token_s: float = 0.0) -> TimedDrafter:
    found = TimedDrafter(script or draft_language(), LANGUAGE.words)
    found.token_s = token_s
    return found


def generate(device: DeviceService, tokens: int = 48) -> None:
    device.generate(GenerateRequest((1, 2, 3), policy=SamplingPolicy(seed=1), max_new_tokens=tokens))


@pytest.fixture
def verifier() -> TimedVerifier:
    return TimedVerifier(LANGUAGE, LANGUAGE.words)


@pytest.fixture
def whole(mosquitto: MosquittoProcess, tmp_path: Path, verifier: TimedVerifier) -> Whole:
    return Whole(mosquitto.port, tmp_path, verifier, {"quotas": NO_QUOTAS})


def conclusions(fleet: Run, whole: Whole, kind: str, name: str) -> list[dict[str, Any]]:
    shown = as_json(fleet("admin", kind, name, "--db", whole.db, "--json"))
    found: list[dict[str, Any]] = shown["diagnosis"]["conclusions"]
    return found


def first(fleet: Run, whole: Whole, kind: str, name: str) -> str:
    found = conclusions(fleet, whole, kind, name)
    assert found, "no conclusion"
    return str(found[0]["cause"])


def serve_sound_devices(whole: Whole) -> None:
    for name in ("sound-1", "sound-2"):
        with whole.device(drafter(), name, **WAITING) as device:
            generate(device)


def test_a_slow_link(whole: Whole, fleet: Run) -> None:
    with whole.edge(), Relay(whole.port, round_trip_s=0.1) as relay:
        serve_sound_devices(whole)
        with whole.device(drafter(), "far", broker={"port": relay.port}, **WAITING) as device:
            generate(device)
    assert first(fleet, whole, "device", "far") == "link"


def test_a_device_that_drafts_slowly(whole: Whole, fleet: Run) -> None:
    with whole.edge():
        serve_sound_devices(whole)
        with whole.device(drafter(token_s=0.03), "slow", **WAITING) as device:
            generate(device)
    assert first(fleet, whole, "device", "slow") == "slow-drafting"


def test_a_device_whose_processor_is_throttled(whole: Whole, fleet: Run, tmp_path: Path) -> None:
    firmware = tmp_path / "devices/platform/soc/soc:firmware/get_throttled"
    firmware.parent.mkdir(parents=True)
    firmware.write_text("4")
    with whole.edge():
        serve_sound_devices(whole)
        with whole.device(drafter(), "hot") as device:
            device.heat.root = tmp_path
            device.heat.read()
            generate(device)
    named = {name: [each["cause"] for each in conclusions(fleet, whole, "device", name)] for name in ("hot", "sound-1")}
    assert ["throttled" in causes for causes in named.values()] == [True, False]


def test_drafts_that_are_rejected(whole: Whole, verifier: TimedVerifier, fleet: Run) -> None:
    verifier.step_s = 0.02
    with whole.edge():
        serve_sound_devices(whole)
        with whole.device(drafter(UNRELATED), "wrong-model", **WAITING) as device:
            generate(device, tokens=80)
    assert first(fleet, whole, "device", "wrong-model") == "rejected-drafts"


def test_an_edge_with_slow_steps(whole: Whole, verifier: TimedVerifier, fleet: Run) -> None:
    verifier.step_s = 0.3
    with whole.edge(), whole.device(drafter(), **WAITING) as device:
        generate(device, tokens=24)
    assert first(fleet, whole, "device", "device-1") == "slow-steps"
    assert first(fleet, whole, "edge", "edge-1") == "slow-steps"


def test_an_edge_that_is_full(whole: Whole, verifier: TimedVerifier, fleet: Run) -> None:
    verifier.step_s = 0.05
    with (
        whole.edge() as edge,
        whole.device(drafter(), "early", **WAITING) as early,
        whole.device(drafter(), "late", **WAITING) as late,
        ThreadPoolExecutor(1) as pool,
    ):
        sessions = edge.orchestrator.sessions
        sessions.most = 1
        running = pool.submit(generate, early, 120)
        until(lambda: len(sessions) == 1)
        generate(late, tokens=16)
        running.result()
    assert first(fleet, whole, "device", "late") == "full"


def test_a_device_that_takes_most_of_an_edge(whole: Whole, verifier: TimedVerifier, fleet: Run) -> None:
    verifier.token_s = 0.002
    with (
        whole.edge(),
        whole.device(drafter(), "greedy", edge_only=True) as greedy,
        whole.device(drafter(), "modest-1", **WAITING) as modest,
        whole.device(drafter(), "modest-2", **WAITING) as other,
        ThreadPoolExecutor(8) as pool,
    ):
        texts = [pool.submit(generate, each) for each in (*[greedy] * 6, modest, other)]
        for each in texts:
            each.result()
    found = conclusions(fleet, whole, "edge", "edge-1")
    assert found[0]["cause"] == "one-device"
    assert "greedy" in found[0]["sentence"]

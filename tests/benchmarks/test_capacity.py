import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.capacity.service_level import Client, TimeWindow
from benchmarks.capacity.serving import CellTiming, Devices, Measured, serve, texts_of
from benchmarks.capacity.suite import THROUGH_BROKER, Row, in_process
from benchmarks.processes import Cores
from benchmarks.raw_llama import RawPrompt, StepOutput
from benchmarks.recordings import write_noted
from broker_config.broker import Broker
from broker_config.processes import MosquittoProcess
from fleet_device.requests.generate import GenerateRequest
from sampling.distribution import Dist
from sampling.downlink import FormName
from schemas.policy import Mode, SamplingPolicy
from tests.support.processes import toy_edge_process
from tests.support.recorded_drafter import RecordedText
from tests.support.toy_pair import END_TOKENS, PROMPT, ToyPair, policy
from tests.support.toy_transformer import ToyTransformer
from tests.support.waiting import PATIENCE_S

POLICY = SamplingPolicy(mode=Mode.COUPLED, temperature=0.8, top_k=5, top_p=1.0, seed=3)


def asked(path: Path) -> dict[str, object]:
    return {
        "target": str(path),
        "devices": 3,
        "threads": 1,
        "timing": {"seconds": 0.5, "settle_s": 0.0, "patience_s": PATIENCE_S},
        "prompts": [{"tokens": [1, 2, 3], "policy": POLICY.model_dump(mode="json"), "most": 5}],
    }


def cores() -> Cores:
    return Cores.choose(os.sched_getaffinity(0))


@pytest.mark.slow
def test_what_needs_no_network_runs_in_a_process_on_the_edges_cores(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    toy = ToyTransformer(size=6, seed=51, sharpness=1.8)
    path = toy.write_gguf(tmp_path / "toy.gguf", end_token=END_TOKENS[0])
    before = os.sched_getaffinity(0)
    answer = in_process(asked(path), cores())
    assert os.sched_getaffinity(0) == before
    clients = [Client.from_json(each) for each in answer["clients"]]
    window = TimeWindow(answer["begin"], answer["end"])
    assert len(clients) == 3
    assert all(client.tokens(window) > 0 for client in clients)
    assert all(1 <= text.tokens <= 5 for client in clients for text in client.texts if text.ended_at)


FLEET = "capacity"
TEXTS = 12
TOKENS = 24
DEVICES = 3


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Return the port of a broker with a toy edge that sends dense distributions, as the published system does."""
    form = ["--form", FormName.DENSE.value]
    with MosquittoProcess(Broker(fleet=FLEET)) as broker, toy_edge_process(broker.port, FLEET, *form):
        yield broker.port


def recorded(port: int, mode: Mode, length: int) -> list[RecordedText]:
    requests = [GenerateRequest(PROMPT, policy(mode, seed), TOKENS) for seed in range(TEXTS)]
    return write_noted(port, FLEET, ToyPair.standard().drafter(), requests, length=length)


def measure(port: int, system: str, texts: list[RecordedText]) -> Measured:
    pair = ToyPair.standard()
    drafter = pair.drafter()
    pacings = [THROUGH_BROKER[system].pacing() for _ in range(DEVICES)]
    with Devices(port, FLEET, drafter.codec, drafter.vocabulary, devices=DEVICES, token_s=0.0) as devices:
        devices.pace(pacings)
        # Each device ends a few texts before the window begins, however slow the machine is.
        timing = CellTiming(seconds=1.0, settle_s=0.0, patience_s=PATIENCE_S, tokens=3 * TOKENS)
        return devices.measure(
            [texts_of(number, texts) for number in range(DEVICES)], timing, mode=THROUGH_BROKER[system].mode
        )


@pytest.mark.broker
def test_drafts_recorded_in_residual_mode_are_replayed_and_judged_as_they_were(port: int) -> None:
    found = measure(port, "dssd-dense", recorded(port, Mode.RESIDUAL, 4))
    assert not found.failed
    assert len(found.as_recorded) > DEVICES
    assert all(found.as_recorded)


@pytest.mark.broker
def test_other_drafts_in_residual_mode_do_not_come_out_as_recorded(port: int) -> None:
    # The last test has power: other draft distributions give another output.
    even = Dist(np.arange(6), np.full(6, 1 / 6))
    texts = [replace(text, dists=(even,) * len(text.dists)) for text in recorded(port, Mode.RESIDUAL, 4)]
    assert not all(measure(port, "dssd-dense", texts).as_recorded)


@pytest.mark.broker
def test_a_fleet_is_measured_and_told(port: int) -> None:
    found = measure(port, "ours-auto", recorded(port, Mode.COUPLED, 1))
    assert not found.failed
    assert all(found.as_recorded)
    row = Row("ours-auto", "Q4_0", 1, DEVICES, 20.0)
    row.count(found.clients, found.window)
    up, down = found.bytes_per_token()
    assert row.window_s == pytest.approx(1.0)
    assert row.tokens_per_s > 0.0
    assert min(up, down) > 0.0
    assert row.json()["load_bound"] is False


GREEDY = SamplingPolicy(mode=Mode.COUPLED, temperature=1.0, top_k=1, top_p=1.0, seed=0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Steady:
    """An engine whose step takes 0.1 s and adds a token to each request."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._left: dict[int, int] = {}

    def begin(self, slot: int, prompt: RawPrompt) -> None:
        assert slot not in self._left
        self._left[slot] = prompt.most

    def step(self) -> Mapping[int, StepOutput]:
        self._clock.now += 0.1
        found = {slot: StepOutput((7,), left == 1) for slot, left in self._left.items()}
        self._left = {slot: left - 1 for slot, left in self._left.items() if left > 1}
        return found


def test_clients_ask_for_text_after_text_and_are_counted_from_when_all_have_had_a_token() -> None:
    clock = Clock()
    asked = [texts_of(number, [RawPrompt((1,), GREEDY, 5)]) for number in range(2)]
    clients, window = serve(Steady(clock), asked, CellTiming(3.0, 0.5, 60.0), clock=clock)
    assert window.begin == pytest.approx(100.0 + 0.1 + 0.5, abs=0.11)
    assert window.seconds == pytest.approx(3.0)
    assert [each.asked_at for each in clients[0].texts[:3]] == pytest.approx([100.0, 100.5, 101.0])
    assert [each.tokens for each in clients[0].texts[:-1]] == [5] * (len(clients[0].texts) - 1)
    assert clients[0].tokens(window) == 30


def test_raw_llama_cpp_writes_the_models_own_texts_in_all_slots_at_once(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from benchmarks.raw_llama import RawEngine  # noqa: PLC0415 - needs llama.cpp

    toy = ToyTransformer(size=6, seed=51, sharpness=1.8)
    engine = RawEngine(
        toy.write_gguf(tmp_path / "toy.gguf", end_token=END_TOKENS[0]), slots=3, cells=256, threads=1, flash=False
    )
    prompts = [(1, 2, 3), (4,), (5, 1) * 90]
    for slot, prompt in enumerate(prompts):
        engine.begin(slot, RawPrompt(prompt, GREEDY, 8))
    texts: list[list[int]] = [[], [], []]
    going = {0, 1, 2}
    while going:
        for slot, written in engine.step().items():
            texts[slot] += written.new
            going -= {slot} if written.ended else set()
    assert texts == [greedy(toy, prompt) for prompt in prompts]


def greedy(toy: ToyTransformer, prompt: tuple[int, ...]) -> list[int]:
    text: list[int] = []
    while len(text) < 8 and not (text and text[-1] in END_TOKENS):
        text.append(int(toy.logits((*prompt, *text)).argmax()))
    return text

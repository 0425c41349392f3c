import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.capacity.devices import Arrival, Arrivals, Devices, Follower, Measured, Timing
from benchmarks.capacity.serving import Prompt
from benchmarks.capacity.suite import THROUGH_BROKER, Row
from benchmarks.capacity.together import Together, said_along, write_all
from broker_config.broker import Broker
from broker_config.processes import MosquittoProcess
from dssd.distribution import Dist
from dssd.downlink import FormName
from fleet_common.logs import Event, wait_for_event
from fleet_edge.verifiers.scripted import ScriptedVerifier
from schemas.policy import Mode
from tests.support.recorded_drafter import RecordedText
from tests.support.toy_pair import END_TOKENS, PROMPT, ToyPair, policy

pytestmark = pytest.mark.broker

FLEET = "capacity"
TEXTS = 12
TOKENS = 24
DEVICES = 3


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Return the port of a broker with a toy edge that sends dense distributions, as the published system does."""
    with MosquittoProcess(Broker(fleet=FLEET)) as broker:
        command = [sys.executable, "-m", "tests.support.toy_edge", "--port", str(broker.port), "--fleet", FLEET]
        process = subprocess.Popen([*command, "--form", FormName.DENSE.value], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert wait_for_event(process.stdout, Event.ONLINE) is not None
        yield broker.port
        process.terminate()
        process.communicate(timeout=60)


def recorded(mode: Mode, length: int) -> list[RecordedText]:
    pair = ToyPair.standard()
    target = ScriptedVerifier(pair.target, pair.target.words, context=256, end_tokens=END_TOKENS)
    together = Together(target, ScriptedVerifier(pair.draft, pair.draft_words, context=256), length=length)
    slots = write_all(together, [Prompt(PROMPT, policy(mode, seed), TOKENS) for seed in range(TEXTS)])
    return [RecordedText("", PROMPT, slot.prompt.policy, tuple(slot.text), tuple(said_along(slot))) for slot in slots]


def measure(port: int, system: str, texts: list[RecordedText]) -> Measured:
    pair = ToyPair.standard()
    drafter = pair.drafter()
    pacings = [THROUGH_BROKER[system].pacing() for _ in range(DEVICES)]
    arrivals = [Arrival.of(n, texts, Arrivals.AT_ONCE, pause_s=0.0, seed=0) for n in range(DEVICES)]
    with Devices(
        port,
        FLEET,
        drafter.codec,
        drafter.vocabulary,
        token_s=0.0,
        draft="none",
        pacings=pacings,
        mode=THROUGH_BROKER[system].mode,
    ) as devices:
        return devices.measure(arrivals, Timing(seconds=1.5, settle_s=0.0, patience_s=10.0))


def test_drafts_recorded_in_residual_mode_are_replayed_and_judged_as_they_were(port: int) -> None:
    found = measure(port, "dssd-dense", recorded(Mode.RESIDUAL, 4))
    assert not found.failed
    assert len(found.as_recorded) > DEVICES
    assert all(found.as_recorded)


def test_other_drafts_in_residual_mode_do_not_come_out_as_recorded(port: int) -> None:
    # What the last test holds is worth something: a text whose drafts say something else is another text.
    even = Dist(np.arange(6), np.full(6, 1 / 6))
    texts = [replace(text, dists=(even,) * len(text.dists)) for text in recorded(Mode.RESIDUAL, 4)]
    assert not all(measure(port, "dssd-dense", texts).as_recorded)


def test_a_text_is_followed_to_where_it_takes_another_turn() -> None:
    follower = Follower((1, 2, 3, 4, 5))
    assert [follower.take(new) for new in ((1,), (2, 3), (4, 6))] == [True, True, False]
    assert not Follower((1,)).take((1, 2))
    assert Follower(()).take((9, 9))


def test_a_fleet_is_measured_and_told(port: int) -> None:
    found = measure(port, "ours-auto", recorded(Mode.COUPLED, 1))
    assert not found.failed
    assert all(found.as_recorded)
    row = Row("ours-auto", "Q4_0", 1, DEVICES, 20.0, 0.0, Arrivals.AT_ONCE)
    row.count(found.clients, found.window)
    up, down = found.bytes_per_token()
    assert row.window_s == pytest.approx(1.5)
    assert row.tokens_per_s > 0.0
    assert min(up, down) > 0.0
    assert row.json()["load_bound"] is False

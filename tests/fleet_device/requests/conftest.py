import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from fleet_device.requests.generate import generate_text
from fleet_device.requests.queue import RequestQueue
from tests.support.memory_device import ScriptedAgent, TalkingDrafter

Make = Callable[..., RequestQueue]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[RequestQueue] = []

    def start(agent: ScriptedAgent, **options: object) -> RequestQueue:
        write = partial(generate_text, agent, TalkingDrafter())
        made.append(RequestQueue(write, **options))  # type: ignore[arg-type]
        made[-1].start()
        return made[-1]

    yield start
    for texts in made:
        texts.abandon()
        texts.join()


def gated() -> ScriptedAgent:
    return ScriptedAgent(gate=threading.Semaphore(0))


def open_gate(agent: ScriptedAgent, batches: int = 1000) -> None:
    agent.gate.release(batches)

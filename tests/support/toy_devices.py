"""Devices over the toy draft, as threads; everything is real except the model."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import BrokerSettings
from fleet_device.client.agent import Agent
from fleet_device.pacing.contract import Pacing
from fleet_device.requests.generate import GenerateRequest
from schemas.policy import SamplingPolicy
from tests.support.sabotage import Sabotage, at_the_device
from tests.support.toy_pair import PROMPT, ToyPair


@dataclass(frozen=True, slots=True)
class Tally:
    counts: NDArray[np.int64]
    tested: int
    accepted: int


def run_sessions(
    *,
    port: int,
    fleet: str,
    pair: ToyPair,
    policy: Callable[[int], SamplingPolicy],
    pacing: Callable[[], Pacing],
    sessions: int,
    length: int,
    devices: int,
    prompt: Sequence[int] = PROMPT,
    first_seed: int,
    sabotage: Sabotage = Sabotage.NONE,
    on_progress: Callable[[int], None] = lambda _done: None,
) -> Tally:
    counts = np.zeros((pair.target.size,) * length, dtype=np.int64)
    lock, totals, seeds = threading.Lock(), [0, 0, 0], iter(range(first_seed, first_seed + sessions))

    def serve(number: int) -> None:
        name = f"device-{number}"
        drafter = pair.drafter()
        link = PahoLink(BrokerSettings(port=port).link(fleet, name, will=None))
        agent = Agent(link, fleet, name, drafter, pacing(), time.monotonic)
        agent.attach()
        link.start(timeout_s=10.0)
        try:
            while True:
                with lock:
                    seed = next(seeds, None)
                if seed is None:
                    return
                done = agent.generate(GenerateRequest(tuple(prompt), policy=policy(seed), max_new_tokens=length))
                with lock:
                    counts[done.tokens + (done.tokens[-1],) * (length - len(done.tokens))] += 1
                    totals[0] += done.counters.tested
                    totals[1] += done.counters.accepted
                    totals[2] += 1
                    on_progress(totals[2])
        finally:
            link.stop()

    with ExitStack() as stack, ThreadPoolExecutor(devices) as pool:
        at_the_device(sabotage, stack)
        for future in [pool.submit(serve, number) for number in range(devices)]:
            future.result()
    return Tally(counts, totals[0], totals[1])

"""Devices over the toy draft, as threads; everything is real except the model."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import BrokerSettings
from fleet_device.client.agent import Agent
from fleet_device.client.decision import RetryPolicy
from fleet_device.pacing.contract import Pacing
from fleet_device.requests.generate import GenerateRequest, RequestContext
from fleet_device.session.sequence import CommittedTokens, TokenOrigin
from fleet_device.settings import Outages
from schemas.policy import SamplingPolicy
from tests.support.sabotage import Sabotage, at_the_device
from tests.support.toy_pair import PROMPT, ToyPair
from tests.support.waiting import PATIENCE_S

PATIENT = RetryPolicy(open_s=PATIENCE_S, resume_s=PATIENCE_S, close_s=PATIENCE_S)
PATIENT_OUTAGES = Outages(after_s=PATIENCE_S, answer_s=PATIENCE_S)
"""Time limits of devices whose edge a busy machine may delay, and which does not say that it is online."""

OriginatedText = tuple[tuple[int, TokenOrigin], ...]
"""The tokens of an output and where they come from."""


@dataclass(slots=True)
class Tally:
    """Outputs by seed, seeds in the order of each device, and counters of all."""

    texts: dict[int, OriginatedText] = field(default_factory=dict)
    orders: list[list[int]] = field(default_factory=list)
    tested: int = 0
    accepted: int = 0
    resumes: int = 0


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
    tally = Tally(orders=[[] for _ in range(devices)])
    lock, seeds = threading.Lock(), iter(range(first_seed, first_seed + sessions))

    def serve(number: int) -> None:
        name = f"device-{number}"
        drafter = pair.drafter()
        link = PahoLink(BrokerSettings(port=port).link(fleet, name, will=None))
        agent = Agent(link, fleet, name, drafter, pacing(), time.monotonic, PATIENT)
        agent.attach()
        link.start(timeout_s=PATIENCE_S)
        try:
            while True:
                with lock:
                    seed = next(seeds, None)
                if seed is None:
                    return
                text: list[tuple[int, TokenOrigin]] = []

                def keep(tokens: CommittedTokens, text: list[tuple[int, TokenOrigin]] = text) -> None:
                    text += zip(tokens.ids, tokens.origins, strict=True)

                request = GenerateRequest(
                    tuple(prompt), policy=policy(seed), max_new_tokens=length, outages=PATIENT_OUTAGES
                )
                done = agent.generate(request, RequestContext(on_tokens=keep))
                assert tuple(token for token, _ in text) == done.tokens
                with lock:
                    tally.texts[seed] = tuple(text)
                    tally.orders[number].append(seed)
                    tally.tested += done.counters.tested
                    tally.accepted += done.counters.accepted
                    tally.resumes += done.resumes
                    on_progress(len(tally.texts))
        finally:
            link.stop()

    with ExitStack() as stack, ThreadPoolExecutor(devices) as pool:
        at_the_device(sabotage, stack)
        for future in [pool.submit(serve, number) for number in range(devices)]:
            future.result()
    return tally

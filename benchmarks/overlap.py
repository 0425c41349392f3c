"""Overlap benchmark: for which share of the time a busy edge's engine computes nothing, and what else is done then.

A real edge process over a real mosquitto, and N devices that have it write. Between the end of a step and the beginning
of the next its engine waits for the orchestrator. Only steps that hold all N texts count, with the next one after them.
The engine `sleep` takes its time without a processor, as a GPU does; llama.cpp and torch share the processor with all
else that is there: the broker and the devices too.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.shared.conditions import conditions
from benchmarks.shared.metered_edge import SLEEP
from benchmarks.shared.processes import Program
from broker_config.broker import Broker
from broker_config.processes.runner import MosquittoProcess
from fleet_device.client.agent import Agent
from fleet_device.drafters.contract import Drafter
from fleet_device.drafters.gguf import GgufModel
from fleet_device.drafters.scripted import ScriptedDrafter
from fleet_device.pacing.contract import STREAMED, FixedPacing
from fleet_link.paho_link import PahoLink
from fleet_link.settings import BrokerSettings
from fleet_runtime.events import Event
from schemas.policy import Mode, SamplingPolicy
from tests.support.replay_drafter import ReplayDrafter
from tests.support.scripted_language import LANGUAGE

__all__ = ["Idle", "idle", "main"]

FLEET: Final = "overlap"
_PROMPT: Final = tuple(range(1, 25))
_START_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Idle:
    """What the engine did while N texts were written.

    Attributes:
        devices: N.
        steps: That count.
        step_ms: Median of a step, in the engine.
        gap_ms: Median of the time from its end to the next step.
        idle_share: Of all that time, the part in which the engine computed nothing.
    """

    devices: int
    steps: int
    step_ms: float
    gap_ms: float
    idle_share: float


def idle(steps: Sequence[tuple[float, float, int]], devices: int) -> Idle:
    """Return what the engine did while as many texts were written.

    Args:
        steps: When each began and ended (seconds), and how many texts it was for; in order.
        devices: How many texts were written at once.
    """
    pairs = [(one, next_) for one, next_ in pairwise(steps) if one[2] == next_[2] == devices]
    if not pairs:
        return Idle(devices, 0, 0.0, 0.0, 0.0)
    busy = [one[1] - one[0] for one, _ in pairs]
    gaps = [next_[0] - one[1] for one, next_ in pairs]
    return Idle(devices, len(pairs), median(busy) * 1e3, median(gaps) * 1e3, sum(gaps) / (sum(gaps) + sum(busy)))


def main(argv: Sequence[str] | None = None) -> int:
    """Write with each number of devices, and print what the engine did meanwhile."""
    parser = argparse.ArgumentParser(prog="benchmarks overlap", description=__doc__)
    parser.add_argument("--engine", default=SLEEP, choices=[SLEEP, "llama.cpp", "torch"])
    parser.add_argument("--target", type=Path, default=Path("models/smollm2-135m/target-Q8_0.gguf"))
    parser.add_argument("--devices", type=int, nargs="+", default=[16, 64], metavar="N")
    parser.add_argument("--tokens", type=int, default=64, help="of each text (default: %(default)s)")
    parser.add_argument("--step-ms", type=float, default=20.0, help="of the engine sleep (default: %(default)s)")
    parser.add_argument("--session-ms", type=float, default=3.0, help="and for each text (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    drafter = _drafters(arguments)
    with MosquittoProcess(Broker(fleet=FLEET)) as broker, tempfile.TemporaryDirectory() as folder:
        edge = Program(
            "benchmarks.shared.metered_edge",
            [
                "--fleet", FLEET, "--port", str(broker.port), "--folder", folder, "--engine", arguments.engine,
                "--target", str(arguments.target), "--step-ms", str(arguments.step_ms),
                "--session-ms", str(arguments.session_ms),
            ],
            cores=os.sched_getaffinity(0),
            log=Path(folder) / "edge.log",
        )  # fmt: skip
        try:
            edge.wait_for(Event.ONLINE, timeout_s=_START_S)
            for devices in arguments.devices:
                _write(broker.port, drafter, devices, tokens=arguments.tokens)
        finally:
            lines = edge.end()
        steps = [tuple(step) for step in json.loads(lines[-1])["steps"]]
    rows = [idle(steps, devices) for devices in arguments.devices]
    print(f"{'devices':>7} {'steps':>6} {'step ms':>8} {'gap ms':>7} {'idle':>6}   engine {arguments.engine}")
    for row in rows:
        print(f"{row.devices:7} {row.steps:6} {row.step_ms:8.1f} {row.gap_ms:7.1f} {row.idle_share:6.1%}")
    if arguments.json:
        found = {**conditions(broker=True), "engine": arguments.engine, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def _drafters(arguments: argparse.Namespace) -> Callable[[], Drafter]:
    """Return what makes a device's drafter: it knows the target's vocabulary, and drafts nothing."""
    if arguments.engine == SLEEP:
        return lambda: ScriptedDrafter(LANGUAGE, LANGUAGE.words)
    target = arguments.target if arguments.target.suffix == ".gguf" else arguments.target.parent / "Q4_1.gguf"
    codec = GgufModel(target, vocabulary_only=True)
    return lambda: ReplayDrafter(codec, codec.vocabulary, ())


def _write(port: int, drafter: Callable[[], Drafter], devices: int, *, tokens: int) -> None:
    """Write a text for each of so many devices, all at once."""
    links, agents = [], []
    for number in range(devices):
        link = PahoLink(BrokerSettings(port=port).link(f"device-{number}", will=None))
        agent = Agent(link, FLEET, f"device-{number}", drafter(), FixedPacing(STREAMED, stream=True), time.monotonic)
        agent.attach()
        link.start(timeout_s=_START_S)
        links.append(link)
        agents.append(agent)

    def write(number: int) -> None:
        policy = SamplingPolicy(mode=Mode.COUPLED, temperature=0.7, top_k=50, top_p=0.95, seed=number)
        agents[number].generate((*_PROMPT, number + 1), policy=policy, max_new_tokens=tokens)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(devices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for link in links:
        link.stop()


if __name__ == "__main__":
    sys.exit(main())

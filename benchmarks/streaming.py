"""Streaming benchmark: what an edge writes by itself through the whole system, beside the raw engine on the same cores.

Raw: llama.cpp alone, in this process, decodes N texts side by side and samples with its own samplers; what a user would
run instead. Ours: a real edge process over the same file, a real mosquitto, and N devices that draft nothing and have
the edge write. Both begin with the same prompts, and the clock runs from the first token of the prompt to the last of
the texts. Rounds alternate, and the ratio is of their medians. The raw engine runs with flash attention and without;
the faster counts. Edge and raw engine have one half of the cores, broker and devices, which are elsewhere in a fleet,
the other; with `--together` all have all.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.capacity.raw_engine import RawEngine
from benchmarks.capacity.serving import Prompt
from benchmarks.shared.conditions import conditions
from benchmarks.shared.processes import Cores, on_cores
from broker_config.broker import Broker
from broker_config.processes.runner import MosquittoProcess
from fleet_cli.demo.prompts import PROMPTS
from fleet_device.client.agent import Agent
from fleet_device.drafters.gguf import GgufModel
from fleet_device.pacing.contract import STREAMED, FixedPacing
from fleet_device.texts.chat import ChatMessage, encode_chat
from fleet_link.paho_link import PahoLink
from fleet_link.settings import BrokerSettings
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import EndReason
from tests.support.edge_process import edge_process
from tests.support.replay_drafter import ReplayDrafter

__all__ = ["main"]

FLEET: Final = "streaming"
EDGE: Final = "edge-1"
_POLICY: Final = {"temperature": 0.7, "top_k": 50, "top_p": 0.95}
_CELLS: Final = 256  # llama.cpp makes streams of a multiple of so many
_START_S: Final = 10.0


def _write_raw(engine: RawEngine, prompts: Sequence[Sequence[int]], *, tokens: int) -> tuple[int, float]:
    """Write a text for each prompt with the raw engine; return the tokens written, and the seconds that it took."""
    started = time.perf_counter()
    for slot, prompt in enumerate(prompts):
        policy = SamplingPolicy(mode=Mode.RESIDUAL, seed=slot, **_POLICY)
        engine.begin(slot, Prompt(tuple(prompt), policy, tokens))
    written, open_texts = 0, len(prompts)
    while open_texts:
        for each in engine.step().values():
            written += len(each.new)
            open_texts -= each.ended
    return written, time.perf_counter() - started


class Devices:
    """Devices that draft nothing, connected."""

    def __init__(self, port: int, codec: GgufModel, number: int) -> None:
        self._links, self._agents = [], []
        for name in (f"device-{count}" for count in range(number)):
            link = PahoLink(BrokerSettings(port=port).link(name, will=None))
            drafter = ReplayDrafter(codec, codec.vocabulary, ())
            agent = Agent(link, FLEET, name, drafter, FixedPacing(STREAMED, stream=True), time.monotonic)
            agent.attach()
            link.start(timeout_s=_START_S)
            self._links.append(link)
            self._agents.append(agent)

    def write(self, prompts: Sequence[Sequence[int]], *, mode: Mode, tokens: int, first_seed: int) -> tuple[int, float]:
        """Write a text for each prompt, all at once; return the tokens written, and the seconds that it took."""
        texts: list[int] = []

        def write(number: int) -> None:
            policy = SamplingPolicy(mode=mode, seed=first_seed + number, **_POLICY)
            generation = self._agents[number].generate(prompts[number], policy=policy, max_new_tokens=tokens)
            if generation.reason in (EndReason.STOP, EndReason.LENGTH):
                texts.append(len(generation.tokens))

        threads = [threading.Thread(target=write, args=(number,)) for number in range(len(prompts))]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - started
        if len(texts) != len(prompts):
            raise RuntimeError(f"{len(prompts) - len(texts)} texts were not written")
        return sum(texts), seconds

    def close(self) -> None:
        """Disconnect."""
        for link in self._links:
            link.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """Run all loads and print the ratios."""
    parser = argparse.ArgumentParser(prog="benchmarks streaming", description=__doc__)
    parser.add_argument("--target", type=Path, default=Path("models/smollm2-135m/target-Q8_0.gguf"))
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 4, 16], metavar="N")
    parser.add_argument("--tokens", type=int, default=96, help="of each text, at most (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of either engine; by default as many as it has cores")
    parser.add_argument("--together", action="store_true", help="no cores of their own for edge and raw engine")
    parser.add_argument("--mode", type=Mode, choices=list(Mode), default=Mode.RESIDUAL, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    arguments.cores = Cores.choose(os.sched_getaffinity(0), apart=not arguments.together)
    arguments.threads = arguments.threads or len(arguments.cores.edge)
    with on_cores(arguments.cores.others):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    codec = GgufModel(arguments.target, vocabulary_only=True)
    rows = []
    print(f"{'devices':>7} {'raw tok/s':>10} {'ours tok/s':>10} {'ours/raw':>9}")
    with MosquittoProcess(Broker(fleet=FLEET)) as broker, tempfile.TemporaryDirectory() as folder:
        edge = [
            "--fleet", FLEET, "--edge", EDGE, "--port", str(broker.port), "--target", str(arguments.target),
            "--engine", "llama.cpp", "--threads", str(arguments.threads),
            "--db", f"sqlite:///{folder}/log.sqlite3", "--spool", f"{folder}/spool",
        ]  # fmt: skip
        with ExitStack() as stack:
            with on_cores(arguments.cores.edge):
                stack.enter_context(edge_process(edge))
            for number in arguments.devices:
                rows.append(_measure(arguments, broker.port, codec, number))
                row = rows[-1]
                print(f"{number:7} {row['raw_tokens_per_s']:10.1f} {row['tokens_per_s']:10.1f} {row['ratio']:9.2f}")
                sys.stdout.flush()
    codec.close()
    if arguments.json:
        found = {**conditions("llama-cpp-python", "paho-mqtt", broker=True), "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def _measure(arguments: argparse.Namespace, port: int, codec: GgufModel, number: int) -> dict[str, Any]:
    raw: dict[bool, list[float]] = {False: [], True: []}
    ours = []
    for count in range(arguments.rounds):
        # New prompts in each round: what an edge has computed for the last ones it does not compute again.
        prompts = [
            encode_chat(codec, [ChatMessage("user", f"{PROMPTS[n % len(PROMPTS)]} (Answer {count}.{n})")])
            for n in range(number)
        ]
        cells = -(-(max(map(len, prompts)) + arguments.tokens) // _CELLS) * _CELLS
        for flash, rates in raw.items():
            with on_cores(arguments.cores.edge):
                engine = RawEngine(arguments.target, slots=number, cells=cells, threads=arguments.threads, flash=flash)
                tokens, seconds = _write_raw(engine, prompts, tokens=arguments.tokens)
                engine.close()
            rates.append(tokens / seconds)
        devices = Devices(port, codec, number)
        tokens, seconds = devices.write(prompts, mode=arguments.mode, tokens=arguments.tokens, first_seed=1000 * count)
        devices.close()
        ours.append(tokens / seconds)
    alone = max(map(median, raw.values()))
    return {
        "devices": number,
        "mode": arguments.mode,
        "raw_tokens_per_s": alone,
        "tokens_per_s": median(ours),
        "ratio": median(ours) / alone,
    }

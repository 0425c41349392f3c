"""Edge-only decoding: tokens a second of an edge through the whole system, over those of llama.cpp alone.

Raw: llama.cpp in this process decodes N texts in one batch and samples with its own samplers: what a user would run
instead. Ours: a real edge process over the same file, a real mosquitto, and N devices that have the edge write. Both
begin with the same prompts, and the clock runs from the first token of the prompt to the last of the texts. Rounds
alternate, and the ratio is of their medians; of flash attention and none the faster counts. Edge and raw engine have
one half of the cores, broker and devices the other. Takes 4 minutes.
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import closing
from statistics import median
from typing import Any, Final

from benchmarks.harness import Bench, Report, connected, number_of, table, together
from benchmarks.processes import BenchError, on_cores
from benchmarks.raw_llama import Prompt, RawEngine
from fleet_admin.models.prompts import PROMPTS
from fleet_device.client.agent import Agent
from fleet_device.drafters.model_file import GgufModel
from fleet_device.requests.chat import ChatMessage, encode_chat
from fleet_device.requests.generate import GenerateRequest
from schemas.policy import Mode, SamplingPolicy
from schemas.reasons import EndReason
from tests.support.replay_drafter import ReplayDrafter

_POLICY: Final = {"temperature": 0.7, "top_k": 50, "top_p": 0.95}
_CELLS: Final = 256  # llama.cpp makes streams of a multiple of this


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--devices", type=number_of(int, 1), nargs="+", default=[1, 4, 16], metavar="N")
    parser.add_argument("--tokens", type=number_of(int, 1), default=96, help="of each text, at most")
    parser.add_argument("--rounds", type=number_of(int, 1), default=3, help="(default: %(default)s)")
    parser.add_argument("--mode", type=Mode, choices=list(Mode), default=Mode.RESIDUAL, help="(default: %(default)s)")


def run(bench: Bench) -> Report:
    target = bench.target()
    with (
        closing(GgufModel(target, vocabulary_only=True)) as codec,
        bench.broker() as broker,
        bench.edge(broker.port, target),
    ):
        rows = [_measure(bench, broker.port, codec, number) for number in bench.options.devices]
    table(rows, {"devices": "d", "raw_tokens_per_s": ".1f", "tokens_per_s": ".1f", "ratio": ".2f"})
    return Report(rows)


def _measure(bench: Bench, port: int, codec: GgufModel, number: int) -> dict[str, Any]:
    tokens, threads = bench.options.tokens, len(bench.cores.edge)
    raw: dict[bool, list[float]] = {False: [], True: []}
    ours = []
    for count in range(bench.options.rounds):
        # New prompts in each round, because the edge does not compute a known prefix again.
        prompts = [
            encode_chat(codec, [ChatMessage("user", f"{PROMPTS[n % len(PROMPTS)]} (Answer {count}.{n})")])
            for n in range(number)
        ]
        cells = -(-(max(map(len, prompts)) + tokens) // _CELLS) * _CELLS
        for flash, rates in raw.items():
            with on_cores(bench.cores.edge):
                engine = RawEngine(bench.target(), slots=number, cells=cells, threads=threads, flash=flash)
                rates.append(_raw_rate(engine, prompts, tokens))
                engine.close()
        drafters = [ReplayDrafter(codec, codec.vocabulary, ()) for _ in prompts]
        with connected(port, bench.fleet, drafters) as agents:
            ours.append(_rate(bench, agents, prompts, seed=1000 * count))
    alone = max(map(median, raw.values()))
    return {
        "devices": number,
        "mode": bench.options.mode,
        "raw_tokens_per_s": alone,
        "tokens_per_s": median(ours),
        "ratio": median(ours) / alone,
    }


def _raw_rate(engine: RawEngine, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    started = time.perf_counter()
    for slot, prompt in enumerate(prompts):
        policy = SamplingPolicy(mode=Mode.RESIDUAL, seed=slot, **_POLICY)
        engine.begin(slot, Prompt(tuple(prompt), policy, tokens))
    written, running = 0, len(prompts)
    while running:
        for each in engine.step().values():
            written += len(each.new)
            running -= each.ended
    return written / (time.perf_counter() - started)


def _rate(bench: Bench, agents: Sequence[Agent], prompts: Sequence[Sequence[int]], *, seed: int) -> float:
    def write(number: int) -> int:
        policy = SamplingPolicy(mode=bench.options.mode, seed=seed + number, **_POLICY)
        done = agents[number].generate(
            GenerateRequest(tuple(prompts[number]), policy=policy, max_new_tokens=bench.options.tokens)
        )
        if done.reason not in (EndReason.STOP, EndReason.LENGTH):
            raise BenchError(f"A text ended by {done.reason.value}.")
        return len(done.tokens)

    started = time.perf_counter()
    written = together([lambda n=n: write(n) for n in range(len(prompts))])  # type: ignore[misc]
    return sum(written) / (time.perf_counter() - started)

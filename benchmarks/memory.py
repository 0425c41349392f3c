"""Memory: what an edge, or a device, holds after thousands of texts (megabytes of 10⁶ bytes).

`edge`: a real edge and devices that have it generate short texts, each from a prompt of its own, which fills the whole
budget for keys and values; compared with its weights and that budget. `device`: a real `fleet device run` whose API is
asked for short chats, with prompts of all lengths; compared with its model's file. Resident memory is read from Linux;
pages of files that are mapped count. The slope in the second half is that of Theil and Sen. Takes 10 minutes each.
"""

import argparse
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Final

import httpx
from scipy.stats import theilslopes

from benchmarks.harness import Bench, Goal, Report, at_most, connected, number_of, table
from benchmarks.processes import BenchError
from fleet_device.client.agent import Agent
from fleet_device.drafters.model_file import GgufModel
from fleet_device.requests.generate import GenerateRequest
from schemas.policy import Mode, SamplingPolicy
from tests.support.replay_drafter import ReplayDrafter

_MB: Final = 1e6
_ALLOWED_MB: Final = {"llama.cpp": 100, "blocks": 350, "device": 250}
"""In addition to weights and budget, or to the model's file."""

_GROWTH_MB: Final = 5.0
"""A thousand requests may add this much to a device, by the lower end of the slope's confidence interval."""

_SAMPLES: Final = 100
_ANSWER_S: Final = 300.0
_WORDS: Final = ("pump", "valve", "pressure", "reading", "operator", "alarm", "shift", "water", "motor", "report")
_TOKENS_A_WORD: Final = 1.2

Resident = dict[str, float]
"""`texts` before, `all` resident memory, and its `own` without mapped files."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("of", nargs="?", choices=("edge", "device"), default="edge")
    parser.add_argument("--texts", type=number_of(int, 4), help="5000 of an edge, 1000 of a device")
    parser.add_argument("--at-once", type=number_of(int, 1), help="devices of an edge (16), applications (2)")
    parser.add_argument("--prompt", type=number_of(int, 1), help="tokens of prompts (24; of a device at most 256)")
    parser.add_argument("--tokens", type=number_of(int, 1), help="of a text (4; of a device 8)")
    parser.add_argument("--context", type=number_of(int, 1), help="1024 of an edge, 2048 of a device")
    parser.add_argument("--engine", default="blocks", choices=("blocks", "llama.cpp"), help="of the edge")
    parser.add_argument("--kv-bytes", type=int, default=256 << 20, help="the edge's budget (default: %(default)s)")
    parser.add_argument("--draft", default="Q4_0", help="of the device (default: %(default)s)")
    parser.add_argument("--suffix", action="store_true", help="let the device draft from earlier text too")


def run(bench: Bench) -> Report:
    options = bench.options
    defaults = {"texts": 5000, "at_once": 16, "prompt": 24, "tokens": 4, "context": 1024}
    if options.of == "device":
        defaults = {"texts": 1000, "at_once": 2, "prompt": 256, "tokens": 8, "context": 2048}
    for name, value in defaults.items():
        setattr(options, name, getattr(options, name) or value)
    rows, allowed = (_device if options.of == "device" else _edge)(bench)
    table(rows[:: max(1, len(rows) // 10)], {"texts": ".0f", "all": ".1f", "own": ".1f"}, title="resident memory, MB")
    slope, low, high = growth(rows, options.texts)
    print(f"in the second half {slope:+.2f} MB a thousand texts ({low:+.2f} to {high:+.2f})")
    goals: list[Goal] = [at_most("MB at most", max(row["all"] for row in rows), allowed)]
    if options.of == "device":
        goals.append(at_most("MB a thousand requests, lower end", low, _GROWTH_MB))
    return Report(rows, goals, more={"slope_mb_per_thousand": [slope, low, high]})


def resident(pid: int, texts: int) -> Resident:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines[1:])}
    return {"texts": texts, "all": kib["Rss"] * 1024 / _MB, "own": kib["Anonymous"] * 1024 / _MB}


def growth(rows: list[Resident], texts: int) -> tuple[float, float, float]:
    """Return the slope in the second half (MB per thousand requests), with the ends of its 95 % interval."""
    return slope_of([(row["texts"] / 1000, row["all"]) for row in rows if row["texts"] >= texts / 2])


def slope_of(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Return the slope of points (x, y) by Theil and Sen, and its 95 % interval; single outliers do not move it."""
    found = theilslopes([y for _, y in points], [x for x, _ in points], alpha=0.95)
    return float(found.slope), float(found.low_slope), float(found.high_slope)


def _sampled(pid: int, texts: int, at_once: int, write: Callable[[int], object]) -> list[Resident]:
    """Run requests, some at once; return samples of a process's memory, the first from before."""
    samples, lock, done = [resident(pid, 0)], threading.Lock(), 0

    def one(number: int) -> None:
        nonlocal done
        write(number)
        with lock:
            done += 1
            if done % max(1, texts // _SAMPLES) == 0:
                samples.append(resident(pid, done))

    with ThreadPoolExecutor(at_once) as pool:
        for future in [pool.submit(one, number) for number in range(texts)]:
            future.result()
    return samples


def _edge(bench: Bench) -> tuple[list[Resident], float]:
    options = bench.options
    target = bench.target()
    with (
        closing(GgufModel(bench.model("Q4_1.gguf"), vocabulary_only=True)) as codec,
        bench.broker() as broker,
        bench.edge(broker.port, target, kv_bytes=options.kv_bytes, context=options.context) as edge,
        connected(
            broker.port, bench.fleet, [ReplayDrafter(codec, codec.vocabulary, ()) for _ in range(options.at_once)]
        ) as agents,
    ):
        idle: list[Agent] = list(agents)

        def write(number: int) -> None:
            prompt = random.Random(number).choices(range(codec.vocabulary.size), k=options.prompt)
            agent = idle.pop()
            agent.generate(
                GenerateRequest(
                    tuple(prompt), policy=SamplingPolicy(mode=Mode.COUPLED, seed=number), max_new_tokens=options.tokens
                )
            )
            idle.append(agent)

        samples = _sampled(edge.pid, options.texts, options.at_once, write)
    weights = target.stat().st_size / _MB
    print(f"weights {weights:.0f} MB, budget {options.kv_bytes / _MB:.0f} MB")
    return samples, weights + options.kv_bytes / _MB + _ALLOWED_MB[options.engine]


def _device(bench: Bench) -> tuple[list[Resident], float]:
    options, draft = bench.options, bench.model(f"{bench.options.draft}.gguf")
    settings = {
        "model": draft, "context": options.context, "texts_at_once": options.at_once, "truncate": "start",
        "suffix": options.suffix,
    }  # fmt: skip
    with (
        bench.broker() as broker,
        bench.edge(broker.port, bench.target(), engine="llama.cpp"),
        bench.device(broker.port, **settings) as device,
        httpx.Client(base_url=device.url, timeout=_ANSWER_S) as client,
    ):

        def write(number: int) -> None:
            rng = random.Random(number)
            words = rng.choices(_WORDS, k=rng.randint(1, max(1, int(options.prompt / _TOKENS_A_WORD))))
            message = {"role": "user", "content": f"Number {number}: {' '.join(words)}."}
            body = {"model": "fleet", "messages": [message], "max_tokens": options.tokens, "seed": number}
            reply = client.post("/chat/completions", json=body)
            if not reply.is_success:
                raise BenchError(f"The device answered {reply.status_code}: {reply.text[:300]}")

        write(0)
        samples = _sampled(device.pid, options.texts, options.at_once, write)
    return samples, draft.stat().st_size / _MB + _ALLOWED_MB["device"]

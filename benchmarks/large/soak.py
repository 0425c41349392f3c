"""Soak: long and short prompts of many devices at a target of a real size, for long (MB, seconds).

Devices without a draft model ask one request after another: of every eight, one has a prompt of `--long` tokens, the
others of up to 128. The target has random weights in the shape of Qwen2.5, as in `large`, whose greedy text is known:
so each output is checked. Each minute the edge's memory is sampled: what is its own, what it maps of packed weights,
and the pages of keys and values, which `kv_bytes` bounds. Takes `--minutes`, the longest request, and a start.
"""

import argparse
import contextlib
import os
import random
import re
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.harness import Bench, SuiteReport, at_most, connected, number_of, say, table
from benchmarks.large.models import FIRST, VOCABULARY, add_model, made, successors
from benchmarks.processes import BenchError
from fleet_device.client.agent import Agent
from fleet_device.drafters.model_file import GgufModel
from fleet_device.drafters.without_model import NoDrafter
from fleet_device.requests.generate import GenerateRequest, Generation, RequestContext
from fleet_edge.settings import EdgeSettings, KeptIn
from fleet_edge.verifiers.blocks_engine import kept_pages_path
from schemas.errors import FleetError
from schemas.policy import SamplingPolicy

_SAMPLE_S: Final = 60.0
_SHORT: Final = (16, 128)
_LONG_ONE_OF: Final = 8
_MB: Final = 1e6
_GROWTH_MB: Final = 32.0
_MORE_BYTES: Final = 16 << 20
"""Records and rounding of the file of pages, in addition to `kv_bytes`."""


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--devices", type=number_of(int, 1), default=16, help="(default: %(default)s)")
    parser.add_argument("--minutes", type=number_of(float, 0.1), default=30.0, help="(default: %(default)s)")
    parser.add_argument("--long", type=number_of(int, 1), default=4000, help="tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=number_of(int, 1), default=32, help="of an output (default: %(default)s)")
    parser.add_argument("--kv-bytes", type=number_of(int, 1), default=1 << 30, help="(default: %(default)s)")


@dataclass(slots=True)
class _Tally:
    first_s: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})  # by whether it is long
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)


def run(bench: Bench) -> SuiteReport:
    options = bench.options
    bench.share_cores()
    target = made(bench)
    kept = kept_pages_path(EdgeSettings(fleet=bench.fleet, kv_kept=KeptIn.MEMORY))
    samples: list[dict[str, Any]] = []
    tally, following, ending = _Tally(), successors().tolist(), threading.Event()
    with contextlib.ExitStack() as stack:
        if kept is not None:
            kept.unlink(missing_ok=True)
            stack.callback(kept.unlink, missing_ok=True)
        codec = stack.enter_context(closing(GgufModel(target, vocabulary_only=True)))
        broker = stack.enter_context(bench.broker())
        settings: dict[str, Any] = {"kv_bytes": options.kv_bytes, "kv_kept": KeptIn.MEMORY.value}
        edge = stack.enter_context(bench.edge(broker.port, target, engine="blocks", **settings))
        drafters = [NoDrafter(codec.vocabulary, codec) for _ in range(options.devices)]
        agents = stack.enter_context(connected(broker.port, bench.fleet, drafters))
        threads = [
            threading.Thread(target=_ask, args=(agent, number, options, following, tally, ending), daemon=True)
            for number, agent in enumerate(agents)
        ]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        while time.monotonic() < began + 60.0 * options.minutes:
            samples.append(_sample(edge.pid, time.monotonic() - began, tally))
            say(
                "{minute:.0f} min: {own_mb:.0f} MB own, {pages_mb:.0f} MB pages, {requests} requests".format_map(
                    samples[-1]
                )
            )
            time.sleep(min(_SAMPLE_S, 60.0 * options.minutes))
        ending.set()
        for thread in threads:
            thread.join()
        samples.append(_sample(edge.pid, time.monotonic() - began, tally))
    rows = [
        {"prompts": "long" if long else "short", "requests": len(times), "first_token_s_p50": median(times),
         "first_token_s_max": max(times)}
        for long, times in tally.first_s.items() if times
    ]  # fmt: skip
    columns = {"prompts": "", "requests": "d", "first_token_s_p50": ".1f", "first_token_s_max": ".1f"}
    table(rows, columns, title=f"{options.shape} {options.file}, {options.devices} devices")
    table(samples, {"minute": ".1f", "own_mb": ".0f", "weights_mb": ".0f", "pages_mb": ".0f", "requests": "d"})
    bound = (options.kv_bytes + _MORE_BYTES) / _MB
    half = samples[len(samples) // 2 :]
    goals = [
        at_most("growth of its own memory in the second half, MB", half[-1]["own_mb"] - half[0]["own_mb"], _GROWTH_MB),
        at_most("pages of keys and values, MB", max(each["pages_mb"] for each in samples), bound),
    ]
    more = {"samples": samples, "tokens": tally.tokens}
    return SuiteReport(rows, goals, more=more, wrong=tally.wrong)


def _ask(
    agent: Agent,
    number: int,
    options: argparse.Namespace,
    following: Sequence[int],
    tally: _Tally,
    ending: threading.Event,
) -> None:
    draw, asked = random.Random(number), number  # so that long prompts come at different times
    while not ending.is_set():
        is_long = asked % _LONG_ONE_OF == 0
        asked += 1
        length = options.long if is_long else draw.randint(*_SHORT)
        prompt = tuple(draw.randrange(FIRST, VOCABULARY) for _ in range(length))
        wanted = [prompt[-1]]
        for _ in range(options.tokens):
            wanted.append(following[wanted[-1]])
        try:
            made, first_s = _generate(agent, prompt, options.tokens, seed=asked)
        except FleetError as error:
            tally.wrong.append(f"A request of device {number} with {length} tokens failed: {error}")
            continue
        tally.first_s[is_long].append(first_s)
        tally.tokens += len(made.tokens)
        if list(made.tokens) != wanted[1:]:
            tally.wrong.append(f"An output of device {number} is not the target's text.")


def _generate(agent: Agent, prompt: tuple[int, ...], tokens: int, *, seed: int) -> tuple[Generation, float]:
    """Return the output, and the seconds until its first token."""
    began, times = time.monotonic(), list[float]()
    made = agent.generate(
        GenerateRequest(prompt, SamplingPolicy(temperature=0.0, seed=seed), tokens),
        RequestContext(on_tokens=lambda _new: times.append(time.monotonic())),
    )
    return made, times[0] - began


def _sample(pid: int, passed_s: float, tally: _Tally) -> dict[str, Any]:
    status = Path(f"/proc/{pid}/status")
    sizes = re.findall(r"^Rss(\w+):\s+(\d+) kB", status.read_text() if status.exists() else "", re.MULTILINE)
    if not sizes:
        raise BenchError(f"The edge has ended after {passed_s / 60.0:.0f} min; its last lines are above.")
    kb = {name: int(size) for name, size in sizes}
    return {
        "minute": passed_s / 60.0,
        "own_mb": kb["Anon"] * 1024 / _MB,
        "weights_mb": kb["File"] * 1024 / _MB,
        "pages_mb": kb["Shmem"] * 1024 / _MB,
        "requests": sum(map(len, tally.first_s.values())),
        "load": os.getloadavg()[0],
    }

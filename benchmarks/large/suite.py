"""Large: a target of a real size on an ordinary CPU, and devices of other sizes (tokens/s of all devices, and ratios).

A model of random weights in the shape of a Qwen2.5, whose greedy text is known: see `benchmarks/large/models.py`. A
real edge on all cores, a real mosquitto, a relay that delays, and devices that replay drafts: each token is right with
probability `--acceptance`, and takes `--token-ms`. All plans write in turn, so that a slow moment of the machine hits
all; a device that chooses (`auto`) has written two texts before. Paces are from the first tokens to the last. With
`--servers`, llama.cpp's server writes as many texts at once from the same file, alone, and with a draft model of the
shape 0.5b that is right as often (its draft lengths of 2 and 4, of which the better counts). It is built once, in
`--tools`, in five minutes. Its `--spec-type draft-mtp` is absent: it needs a model that was trained to predict several
tokens. At 7b with the defaults it takes half an hour. With `--curve`, the target's steps are played
as long as a measured curve says (`fleet edge advise --save-curve`): of another machine, or of this one while it was
quiet. All else is real. `energy` and `bytes` choose by these goals. Bytes are what the relay carries, with 52 for each
TCP segment, without TLS; joules are computed from assumed figures, `_POWER`.
"""

import argparse
import http.client
import itertools
import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, Final

from benchmarks.bytes import TCP_IP_HEAD
from benchmarks.fleet_load import FleetLoad, mean_pace
from benchmarks.harness import (
    MODELS,
    Bench,
    BenchGoal,
    SuiteReport,
    add_curve,
    at_least,
    edge_only_pacing,
    number_of,
    say,
    table,
    together,
)
from benchmarks.large.models import FIRST, VOCABULARY, add_model, made, make, walk
from benchmarks.processes import venv
from benchmarks.serving import BUILD, SOURCE, build_server, llama_server
from fleet_device.drafters.model_file import GgufModel
from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import FixedPacing, Pacing
from fleet_device.pacing.plans import prices_of
from fleet_device.power import joules_of
from fleet_device.requests.generate import Generation
from fleet_device.settings import Goal, Power
from sampling.distribution import point_mass
from schemas.policy import Mode, SamplingPolicy
from tests.support.recorded_drafter import RecordedText
from tests.support.relay import Relay

_CONTEXT: Final = 1_023
_PROMPT: Final = 24
_LEARNED: Final = 2
"""Texts of a device that chooses before it is measured."""

_SERVER_DRAFTS: Final = (2, 4)
_DRAFT_SHAPE: Final = "0.5b"

EDGE_ONLY: Final = "edge-only"
_CHOSEN: Final = ("auto", "energy", "bytes")
_POWER: Final = Power(drafting_w=7.0, idle_w=3.0, joules_per_mb=20.0)
"""Assumed figures of a small board with a mobile modem; put in those of another."""

PLANS: Final[Mapping[str, Callable[[], Pacing]]] = MappingProxyType(
    {
        EDGE_ONLY: edge_only_pacing,
        "auto": lambda: AdaptivePacing(edge_only=None),
        "energy": lambda: AdaptivePacing(edge_only=None, prices=prices_of(Goal.ENERGY, _POWER)),
        "bytes": lambda: AdaptivePacing(edge_only=None, prices=prices_of(Goal.BYTES, _POWER)),
        "2": lambda: FixedPacing(2),
        "4": lambda: FixedPacing(4),
        "2 ahead": lambda: FixedPacing(2, ahead=True),
        "4 ahead": lambda: FixedPacing(4, ahead=True),
    }
)
_GOALS: Final = {1: 1.3, 2: 1.1}
"""Of `auto` over edge-only decoding with the first acceptance and token time, by devices; elsewhere `_LEAST`."""

_LEAST: Final = 0.97


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--engine", choices=("blocks", "llama.cpp"), default="blocks", help="(default: %(default)s)")
    parser.add_argument("--devices", nargs="+", type=number_of(int, 1), default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--acceptance", nargs="+", type=float, default=[0.8, 0.6], metavar="A")
    parser.add_argument(
        "--token-ms", nargs="+", type=float, default=[15.0, 40.0], metavar="MS", help="of a draft token"
    )
    parser.add_argument("--round-trip", type=float, default=20.0, metavar="MS", help="(default: %(default)s)")
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS), metavar="PLAN", help=", ".join(PLANS))
    parser.add_argument("--rounds", type=number_of(int, 1), default=2, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=number_of(int, 8), default=64, help="of a text (default: %(default)s)")
    parser.add_argument("--threads", type=number_of(int, 1), default=len(os.sched_getaffinity(0)))
    add_curve(parser)
    parser.add_argument("--servers", action="store_true", help="also measure llama.cpp's server")
    parser.add_argument("--tools", type=Path, default=MODELS.parent / "tools", help="(default: %(default)s)")


def run(bench: Bench) -> SuiteReport:
    options = bench.options
    bench.share_cores()
    # Where steps are played, only the vocabulary counts.
    target = made(bench, "" if options.curve is None else "tiny")
    rows = _fleets(bench, target)
    if options.servers:
        rows += _servers(bench, target)
    return SuiteReport(rows, [goal for row in rows if (goal := _goal(row, options)) is not None])


def _show(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    columns = {"acceptance": ".1f", "token_ms": ".0f", "devices": "d", "system": ""}
    figures = {
        "tokens_per_s": ".1f",
        "over_edge_only": ".2f",
        "accepted": ".2f",
        "mean_draft": ".1f",
        "edge_only": ".0%",
        "bytes_per_token": ".0f",
        "joules_per_token": ".3f",
    }
    table(rows, columns | figures, title=title)


def _compare(rows: Sequence[dict[str, Any]]) -> None:
    """Add the ratio to edge-only decoding, round by round: what slows down the machine is in both."""
    base = next(row["rounds"] for row in rows if row["system"] == EDGE_ONLY)
    for row in rows:
        row["over_edge_only"] = median(pace / its for pace, its in zip(row["rounds"], base, strict=True))


def _goal(row: Mapping[str, Any], options: argparse.Namespace) -> BenchGoal | None:
    if row["system"] != "auto":
        return None
    best = (row["acceptance"], row["token_ms"]) == (options.acceptance[0], options.token_ms[0])
    wanted = _GOALS.get(row["devices"], _LEAST) if best else _LEAST
    what = f"auto over edge-only decoding, {row['devices']} devices, acceptance {row['acceptance']:g}, "
    return at_least(f"{what}{row['token_ms']:g} ms a token", row["over_edge_only"], wanted)


def _fleets(bench: Bench, target: Path) -> list[dict[str, Any]]:
    options, rows = bench.options, list[dict[str, Any]]()
    settings: dict[str, Any] = {"engine": options.engine, "threads": options.threads, "context": _CONTEXT}
    with (
        closing(GgufModel(target, vocabulary_only=True)) as codec,
        bench.broker() as broker,
        bench.edge(broker.port, target, **settings),
    ):
        for devices, acceptance, token_ms in itertools.product(options.devices, options.acceptance, options.token_ms):
            say(f"{devices} devices, acceptance {acceptance:g}, {token_ms:g} ms a token")
            place = {"acceptance": acceptance, "token_ms": token_ms, "devices": devices}
            with (
                Relay(broker.port, round_trip_s=options.round_trip / 1e3) as relay,
                FleetLoad(
                    relay.port, bench.fleet, codec, codec.vocabulary, devices=devices, token_s=token_ms / 1e3
                ) as load,
            ):
                found = [{**place, **row} for row in _plans(load, relay, options, acceptance, devices)]
            _compare(found)
            _show(found, f"{options.shape} {options.file}" if options.curve is None else f"steps of {options.curve}")
            rows += found
    return rows


def _plans(
    load: FleetLoad, relay: Relay, options: argparse.Namespace, acceptance: float, devices: int
) -> list[dict[str, Any]]:
    plans = list(dict.fromkeys((EDGE_ONLY, *options.plans)))
    pacings = {plan: [PLANS[plan]() for _ in range(devices)] for plan in plans}
    paces: dict[str, list[float]] = {plan: [] for plan in plans}
    generations: dict[str, list[Generation]] = {plan: [] for plan in plans}
    sent = dict.fromkeys(plans, 0)
    for number in range(_LEARNED + options.rounds):
        texts = [text_of(devices * number + device, acceptance, options.tokens) for device in range(devices)]
        for plan in plans:
            if number < _LEARNED and plan not in _CHOSEN:
                continue
            load.pace(pacings[plan])
            before = _carried(relay)
            written = load.write(texts, mode=Mode.RESIDUAL)
            if number >= _LEARNED:
                sent[plan] += _carried(relay) - before
                paces[plan].append(devices * mean_pace([written]))
                generations[plan] += [text.generation for text in written.texts if text.generation is not None]
    return [{"system": plan, **_outcome(paces[plan], generations[plan], sent[plan])} for plan in plans]


def _carried(relay: Relay) -> int:
    """Return the bytes that the devices have sent and received, with TCP and IP headers."""
    return relay.up + relay.down + TCP_IP_HEAD * sum(relay.segments)


def _outcome(paces: Sequence[float], generations: Sequence[Generation], sent: int) -> dict[str, Any]:
    names = ("drafted", "tested", "accepted", "edge_only")
    total = {name: sum(getattr(each.counters, name) for each in generations) for name in names}
    tokens, drafts = sum(len(each.tokens) for each in generations), sum(each.drafts for each in generations)
    return {
        "tokens_per_s": median(paces),
        "rounds": list(paces),
        "mean_draft": total["drafted"] / drafts if drafts else None,
        "accepted": total["accepted"] / total["tested"] if total["tested"] else None,
        "edge_only": total["edge_only"] / tokens,
        "bytes_per_token": sent / tokens,
        "joules_per_token": sum(joules_of(each, _POWER, _POWER.idle_w * each.wall_ms / 1e3) for each in generations)
        / tokens,
    }


def text_of(number: int, acceptance: float, tokens: int) -> RecordedText:
    """Return a known text, and drafts of which the share `acceptance` is right."""
    chance = random.Random(number)
    prompt = tuple(chance.randrange(FIRST, VOCABULARY) for _ in range(_PROMPT))
    text = walk(prompt[-1], tokens)
    right = [place < round(acceptance * tokens) for place in range(tokens)]
    chance.shuffle(right)
    drafted = [token if each else _other(token) for token, each in zip(text, right, strict=True)]
    policy = SamplingPolicy(temperature=0.0, seed=number)
    return RecordedText("", prompt, policy, text, tuple(point_mass(token) for token in drafted))


def _other(token: int) -> int:
    return token - 1 if token > FIRST else token + 1


# llama.cpp's server


def _servers(bench: Bench, target: Path) -> list[dict[str, Any]]:
    options, rows = bench.options, list[dict[str, Any]]()
    say("llama-server --spec-type draft-mtp is not compared: random models have no layers that predict several tokens")
    tools = options.tools.resolve()
    program = tools / f"llama-server-{version(SOURCE)}"
    if not program.exists():
        build_server(venv(tools / "build", *BUILD), program)
    for devices in options.devices:
        say(f"llama-server, {devices} slots")
        row = {"acceptance": None, "token_ms": None, "devices": devices}
        found = [{**row, "system": "llama-server", **_server(bench, program, target, devices)}]
        for acceptance in options.acceptance:
            vocabulary = bench.model("Q4_0.gguf")
            draft = make(options.cache, _DRAFT_SHAPE, "Q4_0", vocabulary=vocabulary, right=acceptance)
            tried = [
                _server(bench, program, target, devices, "-md", draft, "--spec-draft-n-max", most)
                for most in _SERVER_DRAFTS
            ]
            best = max(tried, key=lambda each: each["tokens_per_s"])
            row = {"acceptance": acceptance, "token_ms": None, "devices": devices}
            found.append({**row, "system": "llama-server with a draft model", **best})
        _show(found, f"{options.shape} {options.file}, llama.cpp's server")
        rows += found
    return rows


def _server(bench: Bench, program: Path, target: Path, slots: int, *more: object) -> dict[str, Any]:
    options = bench.options
    log = bench.new_folder() / "llama-server.log"
    with llama_server(bench, program, target, slots, "-t", options.threads, *more, log=log) as url:
        address = url.removeprefix("http://").partition("/")[0]
        paces = []
        for number in range(options.rounds):
            texts = [text_of(1_000 * (number + 1) + slot, 1.0, options.tokens) for slot in range(slots)]
            paces.append(slots * _written(address, texts))
    return {"tokens_per_s": median(paces), "rounds": paces}


def _written(address: str, texts: Sequence[RecordedText]) -> float:
    """Let a server write texts at once; return the tokens per second of one, from the first to the last."""
    timed = together([partial(_complete, address, text) for text in texts])
    rate: float = sum(tokens for tokens, _ in timed) / sum(seconds for _, seconds in timed)
    return rate


def _complete(address: str, text: RecordedText) -> tuple[int, float]:
    asked = {"prompt": text.prompt, "n_predict": len(text.tokens), "temperature": 0.0, "stream": True,
             "ignore_eos": True, "cache_prompt": False, "return_tokens": True}  # fmt: skip
    connection = http.client.HTTPConnection(address)
    connection.request("POST", "/completion", json.dumps(asked), {"Content-Type": "application/json"})
    tokens, times = list[int](), list[tuple[float, int]]()
    for line in connection.getresponse():
        if line.startswith(b"data: "):
            new = json.loads(line[6:]).get("tokens", [])
            if new:
                tokens += new
                times.append((time.monotonic(), len(new)))
    connection.close()
    assert tuple(tokens) == text.tokens[: len(tokens)], "llama-server writes another text"
    (first, head), (last, _) = times[0], times[-1]
    return len(tokens) - head, last - first

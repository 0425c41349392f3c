"""Pacing benchmark: plans that devices choose, beside every fixed one, the edge's own writing among them.

Every cell is one draft model, one distance (a relay delays), one load (devices that write at the same time) and one
cost of the target (blocks that compute and change nothing make it cost several times as much). A real edge over
llama.cpp, a real mosquitto, real devices but for their draft models: these are recorded on this machine and played
again, each at its own pace, as on a processor of the device's own; in coupled mode a record is accepted as the model
itself would be. In each round all plans write the same texts, one after another, each round beginning with another
plan; few devices write several texts. A device's pace is counted from its first tokens to its last, so that prompts are
left out. Devices that choose begin each cell knowing nothing; the first round, in which they learn, is not counted for
any plan, but told beside the others.
"""

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from benchmarks.pacing.cells import CHOSEN, PLANS, STREAM, Cell, Outcome, geometric_mean
from benchmarks.shared.conditions import conditions
from benchmarks.shared.ending import ending_cleanly
from benchmarks.shared.fleet_load import FleetLoad, WrittenTexts, mean_pace
from benchmarks.shared.recordings import Recording, record
from broker_config.broker import Broker
from broker_config.errors import BrokerError
from broker_config.processes.runner import MosquittoProcess
from fleet_cli.prompts import built_in
from fleet_device.drafters.gguf import GgufModel
from fleet_device.pacing.contract import Pacing
from schemas.errors import FleetError
from tests.support.edge_process import edge_process
from tests.support.relay import Relay

__all__ = ["main"]

FLEET: Final = "pacing"
_CONTEXT: Final = 1023
_LEAST_GOAL: Final = 0.92
_STREAM_GOAL: Final = 0.97
_MEAN_GOAL: Final = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all cells; return 0 if choosing is as good as it shall be, 1 if not, 2 on errors."""
    arguments = _read(argv)
    cells: list[Cell] = []
    try:
        with ending_cleanly(), MosquittoProcess(Broker(fleet=FLEET)) as broker:
            for cost in arguments.costs:
                for cell in _measure(arguments, broker.port, cost):
                    cells.append(cell)
                    print("\n".join(_lines(cell)), flush=True)
    except (FleetError, BrokerError) as error:
        print(error, file=sys.stderr)
        return 2
    best, least, stream = (
        geometric_mean([cell.against_best for cell in cells]),
        min(cell.against_best for cell in cells),
        min(cell.against_stream for cell in cells),
    )
    print(
        f"auto beside the best fixed plan of each cell: {best:.2f} in the geometric mean (goal {_MEAN_GOAL}), "
        f"{least:.2f} at least (goal {_LEAST_GOAL}); beside the edge by itself {stream:.2f} at least "
        f"(goal {_STREAM_GOAL})"
    )
    if arguments.json:
        report = {
            **conditions("llama-cpp-python", "paho-mqtt", broker=True),
            "against_best": {"mean": best, "least": least},
            "against_stream": {"least": stream},
            "cells": [cell.json() for cell in cells],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if best >= _MEAN_GOAL and least >= _LEAST_GOAL and stream >= _STREAM_GOAL else 1


def _read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks pacing", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--drafts", nargs="+", default=["Q4_0", "Q4_1"], help="quantizations (default: %(default)s)")
    parser.add_argument("--round-trips", nargs="+", type=int, default=[0, 20, 100], metavar="MS")
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 4, 16], metavar="N")
    parser.add_argument("--costs", nargs="+", type=int, default=[1, 8], metavar="N")
    parser.add_argument("--plans", nargs="+", choices=list(PLANS), default=list(PLANS), metavar="PLAN")
    parser.add_argument("--rounds", type=int, default=2, help="counted (default: %(default)s)")
    parser.add_argument(
        "--texts", type=int, default=4, help="of each plan and round, one a device at least (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=48, help="of each text, at most (default: %(default)s)")
    parser.add_argument(
        "--token-ms", type=float, help="time of a draft token; by default as recorded here, on one core"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the edge")
    parser.add_argument("--quick", action="store_true", help="one draft, one device, 20 ms, one round")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.drafts, arguments.devices, arguments.round_trips, arguments.rounds = ["Q4_0"], [1], [20], 1
    arguments.plans = list(dict.fromkeys(arguments.plans))
    if not {CHOSEN, STREAM} <= set(arguments.plans):
        parser.error(f"--plans must name {STREAM} and {CHOSEN}: it is their ratio that is told.")
    return arguments


def _measure(arguments: argparse.Namespace, port: int, cost: int) -> Iterator[Cell]:
    target = arguments.models / ("target-Q8_0.gguf" if cost == 1 else f"target-Q8_0-cost{cost}.gguf")
    if not target.exists():
        raise FleetError(
            f"There is no {target}; make it: fleet models prepare{'' if cost == 1 else f' --cost {cost}'}."
        )
    recordings = [
        record(
            arguments.models / "target-Q8_0.gguf",
            arguments.models / f"{draft}.gguf",
            built_in(),
            tokens=arguments.tokens,
            cache=arguments.models / "recordings",
            on_progress=lambda said: print(f"{said} …", file=sys.stderr, flush=True),
        )
        for draft in arguments.drafts
    ]
    codec = GgufModel(target, vocabulary_only=True)
    with closing(codec), _edge(target, port, arguments.threads):
        for recording in recordings:
            for round_trip_ms in arguments.round_trips:
                for devices in arguments.devices:
                    cell = Cell(cost, recording.draft, round_trip_ms, devices)
                    _fill(cell, arguments, port, codec, recording)
                    yield cell


def _fill(cell: Cell, arguments: argparse.Namespace, port: int, codec: GgufModel, recording: Recording) -> None:
    token_s = recording.token_s if arguments.token_ms is None else arguments.token_ms / 1e3
    pacings: dict[str, list[Pacing]] = {plan: [PLANS[plan]() for _ in range(cell.devices)] for plan in arguments.plans}
    cell.outcomes = {plan: Outcome() for plan in arguments.plans}
    with (
        Relay(port, round_trip_s=cell.round_trip_ms / 1e3) as relay,
        FleetLoad(
            relay.port, FLEET, codec, codec.vocabulary, devices=cell.devices, token_s=token_s, draft=cell.draft
        ) as load,
    ):
        recorded = itertools.cycle(recording.texts)
        for number in range(arguments.rounds + 1):
            turns = [
                list(itertools.islice(recorded, cell.devices))
                for _ in range(max(1, math.ceil(arguments.texts / cell.devices)))
            ]
            first = number % len(arguments.plans)
            for plan in (*arguments.plans[first:], *arguments.plans[:first]):
                load.pace(pacings[plan])
                written = [load.write(texts) for texts in turns]
                pace = mean_pace(written)
                if number == 0:
                    cell.outcomes[plan].learning = pace
                else:
                    _count(cell.outcomes[plan], written, pace)


def _count(outcome: Outcome, written: Sequence[WrittenTexts], pace: float) -> None:
    outcome.paces.append(pace)
    for text in (text for texts in written for text in texts.texts):
        assert text.generation is not None
        counters = text.generation.counters
        outcome.tokens += text.tokens
        outcome.drafts += text.generation.drafts
        outcome.drafted += counters.drafted
        outcome.tested += counters.tested
        outcome.accepted += counters.accepted
        outcome.streamed += counters.streamed


@contextmanager
def _edge(target: Path, port: int, threads: int) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            "--fleet", FLEET, "--port", str(port), "--target", str(target),
            "--engine", "llama.cpp", "--context", str(_CONTEXT), "--threads", str(threads),
            "--db", f"sqlite:///{folder}/log.sqlite3", "--spool", f"{folder}/spool",
        ]  # fmt: skip
        with edge_process(flags):
            yield


def _lines(cell: Cell) -> list[str]:
    head = f"cost {cell.cost}, draft {cell.draft}, round trip {cell.round_trip_ms} ms, {cell.devices} devices"
    lines = [f"{head:<52} tokens/s  mean draft  acceptance  streamed"]
    for plan, outcome in cell.outcomes.items():
        draft = f"{outcome.drafted / outcome.drafts:10.1f}" if outcome.drafts else f"{'-':>10}"
        acceptance = f"{outcome.accepted / outcome.tested:10.2f}" if outcome.tested else f"{'-':>10}"
        lines.append(
            f"  {plan:<50} {outcome.pace:8.1f}  {draft}  {acceptance}  {outcome.streamed / outcome.tokens:8.0%}"
        )
    if CHOSEN in cell.outcomes:
        lines.append(
            f"  auto: {cell.against_best:.2f} times the best fixed plan ({cell.best}), "
            f"{cell.against_stream:.2f} times stream (standard error {cell.stream_error:.2f}), "
            f"{cell.learning:.2f} while it learns"
            + ("" if cell.again is None else f"; stream again: {cell.again:.2f} times stream")
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())

"""Pacing: plans that devices choose, next to every fixed one and to edge-only decoding (tokens a second, ratios).

Every cell is one draft model, one distance (a relay delays), one load (devices that write at the same time) and one
cost of the target (blocks that compute and change nothing). A real edge, a real mosquitto, real devices
but for their draft models: these are recorded on this machine and played again, each at its own pace, as on a
processor of the device's own. In each round all plans write the same texts, one after another, each round beginning
with another plan; few devices write several texts. A device's pace is counted from its first tokens to its last.
Devices that choose begin each cell knowing nothing; the first round, in which they learn, is not counted for any plan,
but printed too. Takes 13 minutes with
`--costs 1 --round-trips 20 100 --plans edge-only 4 "4 ahead" auto "edge-only again"`.
"""

import argparse
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from statistics import median, stdev
from types import MappingProxyType
from typing import Any, Final

from benchmarks.fleet_load import FleetLoad, WrittenTexts, mean_pace
from benchmarks.harness import Bench, SuiteReport, add_engine, at_least, edge_only_pacing, number_of, table
from benchmarks.recordings import Recording, record
from fleet_admin.models.prompts import built_in
from fleet_device.drafters.model_file import GgufModel
from fleet_device.pacing.adaptive import AdaptivePacing
from fleet_device.pacing.contract import FixedPacing, Pacing
from tests.support.relay import Relay

_CONTEXT: Final = 1023
_MIN_GOAL, _EDGE_ONLY_GOAL, _MEAN_GOAL = 0.92, 0.97, 1.0

CHOSEN: Final = "auto"
EDGE_ONLY: Final = "edge-only"
AGAIN: Final = "edge-only again"
"""The same plan again: its ratio to the first is the measurement error."""

PLANS: Final[Mapping[str, Callable[[], Pacing]]] = MappingProxyType(
    {
        "1": lambda: FixedPacing(1),
        "2": lambda: FixedPacing(2),
        "4": lambda: FixedPacing(4),
        "8": lambda: FixedPacing(8),
        "4 ahead": lambda: FixedPacing(4, ahead=True),
        EDGE_ONLY: edge_only_pacing,
        AGAIN: edge_only_pacing,
        CHOSEN: lambda: AdaptivePacing(edge_only=None),
    }
)

Outcome = dict[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    add_engine(parser)
    parser.add_argument("--drafts", nargs="+", default=["Q4_0", "Q4_1"], help="quantizations (default: %(default)s)")
    parser.add_argument("--round-trips", nargs="+", type=int, default=[0, 20, 100], metavar="MS")
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 4, 16], metavar="N")
    parser.add_argument("--costs", nargs="+", type=int, default=[1, 8], metavar="N")
    parser.add_argument("--plans", nargs="+", choices=list(PLANS), default=list(PLANS), metavar="PLAN")
    parser.add_argument("--rounds", type=number_of(int, 1), default=2, help="counted (default: %(default)s)")
    parser.add_argument("--outputs", type=number_of(int, 1), default=4, help="of each plan and round, at least")
    parser.add_argument("--tokens", type=number_of(int, 2), default=48, help="of each text, at most")
    parser.add_argument("--token-ms", type=float, help="of a draft token; by default as recorded here, on one core")
    parser.add_argument("--quick", action="store_true", help="one draft, one device, 20 ms, one round")


def run(bench: Bench) -> SuiteReport:
    options = bench.options
    if options.quick:
        options.drafts, options.devices, options.round_trips, options.rounds = ["Q4_0"], [1], [20], 1
    plans = list(dict.fromkeys([*options.plans, EDGE_ONLY, CHOSEN]))
    os.sched_setaffinity(0, bench.cores.edge | bench.cores.others)
    recordings = [record(bench, draft, built_in(), tokens=options.tokens) for draft in options.drafts]
    threads = len(bench.cores.edge | bench.cores.others)
    rows: list[dict[str, Any]] = []
    with bench.broker() as broker:
        for cost in options.costs:
            target = bench.target(cost)
            with (
                closing(GgufModel(target, vocabulary_only=True)) as codec,
                bench.edge(broker.port, target, context=_CONTEXT, threads=threads),
            ):
                for recording, round_trip_ms, devices in itertools.product(
                    recordings, options.round_trips, options.devices
                ):
                    place = {"cost": cost, "draft": recording.draft, "round_trip_ms": round_trip_ms, "devices": devices}
                    outcomes = _measure(bench, broker.port, codec, recording, plans, round_trip_ms, devices)
                    rows.append({**place, **compared(outcomes)})
                    _print(rows[-1])
    ratios = [row["auto_over_best"] for row in rows]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    least = min(row["auto_over_edge_only"] for row in rows)
    goals = [
        at_least("auto over the best fixed plan of each cell, geometric mean", mean, _MEAN_GOAL),
        at_least("the same, in the worst cell", min(ratios), _MIN_GOAL),
        at_least("auto over edge-only decoding, in the worst cell", least, _EDGE_ONLY_GOAL),
    ]
    return SuiteReport(rows, goals)


def _measure(
    bench: Bench,
    port: int,
    codec: GgufModel,
    recording: Recording,
    plans: Sequence[str],
    round_trip_ms: int,
    devices: int,
) -> dict[str, Outcome]:
    options = bench.options
    token_s = recording.token_s if options.token_ms is None else options.token_ms / 1e3
    pacings = {plan: [PLANS[plan]() for _ in range(devices)] for plan in plans}
    paces: dict[str, list[float]] = {plan: [] for plan in plans}
    written: dict[str, list[WrittenTexts]] = {plan: [] for plan in plans}
    with (
        Relay(port, round_trip_s=round_trip_ms / 1e3) as relay,
        FleetLoad(
            relay.port, bench.fleet, codec, codec.vocabulary, devices=devices, token_s=token_s, draft=recording.draft
        ) as load,
    ):
        recorded = itertools.cycle(recording.texts)
        for number in range(options.rounds + 1):
            turns = [
                list(itertools.islice(recorded, devices)) for _ in range(max(1, math.ceil(options.outputs / devices)))
            ]
            first = number % len(plans)
            for plan in (*plans[first:], *plans[:first]):
                load.pace(pacings[plan])
                here = [load.write(texts) for texts in turns]
                paces[plan].append(mean_pace(here))
                written[plan] += here if number else []
    return {plan: _outcome(paces[plan], written[plan]) for plan in plans}


def _outcome(paces: Sequence[float], written: Sequence[WrittenTexts]) -> Outcome:
    """Return the outcome of one plan; the first pace is that of the uncounted round."""
    generations = [text.generation for texts in written for text in texts.texts if text.generation is not None]
    total = {
        name: sum(getattr(each.counters, name) for each in generations)
        for name in ("drafted", "tested", "accepted", "edge_only")
    }
    tokens, drafts = sum(len(each.tokens) for each in generations), sum(each.drafts for each in generations)
    return {
        "tokens_per_s": median(paces[1:]),  # so that a disturbed round counts no more than another
        "rounds": list(paces[1:]),
        "learning": paces[0],
        "mean_draft": total["drafted"] / drafts if drafts else None,
        "acceptance": total["accepted"] / total["tested"] if total["tested"] else None,
        "edge_only": total["edge_only"] / tokens if tokens else None,
    }


def compared(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Return the ratios of a cell, round by round: a disturbance of the machine is in both."""

    def ratios(plan: str, other: str) -> list[float]:
        pairs = zip(outcomes[plan]["rounds"], outcomes[other]["rounds"], strict=True)
        return [pace / its for pace, its in pairs]

    best = max((plan for plan in outcomes if plan not in (CHOSEN, AGAIN)), key=lambda p: outcomes[p]["tokens_per_s"])
    ratio = ratios(CHOSEN, EDGE_ONLY)
    return {
        "best": best,
        "auto_over_best": median(ratios(CHOSEN, best)),
        "auto_over_edge_only": median(ratio),
        "standard_error": stdev(ratio) / math.sqrt(len(ratio)) if len(ratio) > 1 else 0.0,
        "while_learning": outcomes[CHOSEN]["learning"] / outcomes[EDGE_ONLY]["learning"],
        "edge_only_again": median(ratios(AGAIN, EDGE_ONLY)) if AGAIN in outcomes else None,
        "plans": dict(outcomes),
    }


def _print(row: Mapping[str, Any]) -> None:
    where = f"cost {row['cost']}, draft {row['draft']}, round trip {row['round_trip_ms']} ms, {row['devices']} devices"
    shown = [{"plan": plan, **outcome} for plan, outcome in row["plans"].items()]
    columns = {"plan": "", "tokens_per_s": ".1f", "mean_draft": ".1f", "acceptance": ".2f", "edge_only": ".0%"}
    table(shown, columns, title=where)
    again = "" if row["edge_only_again"] is None else f"; edge-only again: {row['edge_only_again']:.2f} times edge-only"
    print(
        f"  auto: {row['auto_over_best']:.2f} times the best fixed plan ({row['best']}), "
        f"{row['auto_over_edge_only']:.2f} times edge-only (standard error {row['standard_error']:.2f}), "
        f"{row['while_learning']:.2f} while it learns{again}",
        flush=True,
    )

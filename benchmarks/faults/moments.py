"""Moments: texts and session log when whatever can fail does, at random moments (texts, tokens, seconds to go on).

A real mosquitto with certificates, an edge over a toy target model and devices over a toy draft model, each in a
process of its own; devices write all the time, in both modes, drafting ahead. Each text is checked token by token, the
session log is compared with what the devices know, and the time is taken from the end of a fault to the next token of
each device. The end of a fault is when the fleet may go on: an edge is online, a broker listens, a line is free. Lost
segments are made by the relay before each client: a piece of the stream, and all behind it, comes as much later as TCP
needs to send it again. Clocks are those of edge and devices alone. Takes an hour, `--quick` half of it.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.experiment import Experiment, Result
from benchmarks.faults.fleet import Load
from benchmarks.faults.kinds import FAULTS
from benchmarks.harness import Bench, Report, number_of, say, table

_COLUMNS = {
    "name": "", "moments": "d", "coupled": "d", "residual": "d", "tokens": "d", "altered": "d", "lost": "d", "log": "d",
    "failed": "d", "resumes": "d", "p50_s": ".2f", "p95_s": ".2f", "longest_s": ".2f",
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "faults: " + "; ".join(f"{fault.name} ({fault.summary})" for fault in FAULTS.values())
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), metavar="FAULT", help="default: all")
    parser.add_argument("--moments", type=number_of(int, 1), default=20, help="at which each strikes")
    parser.add_argument("--devices", type=number_of(int, 1), default=8, help="that write (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="shorten those that last 40 s and more")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep logs and databases there; must be empty or not there")


def run(bench: Bench) -> Report:
    options, load = bench.options, Load(devices=bench.options.devices)
    os.sched_setaffinity(0, bench.cores.edge | bench.cores.others)
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    for name in options.only or FAULTS:
        limits = {"moments": options.moments, "seed": options.seed, "quick": options.quick}
        experiment = Experiment(FAULTS[name], load, **limits, on_progress=say)
        result = experiment.run((options.folder or bench.folder).resolve() / name)
        rows.append(_row(result))
        table(rows[-1:], _COLUMNS)
        sentences = [
            *result.broken_off[:3],
            *result.disagreements[:3],
            *(f"{n} texts {w}" for w, n in result.wrong.items()),
        ]
        wrong += [f"{name}: {sentence}" for sentence in sentences]
        wrong += [f"{name}: {result.stuck} devices had not gone on after a minute."] * bool(result.stuck)
    table(rows, _COLUMNS, title="all faults: texts that failed before a token was committed are known as failed")
    return Report(rows, more={"load": asdict(load)}, wrong=wrong)


def _row(result: Result) -> dict[str, Any]:
    p50, p95, longest = percentiles(result.recovery_s)
    fields = {name: value for name, value in asdict(result).items() if name != "recovery_s"}
    return {
        **fields,
        "coupled": result.texts.get("coupled", 0),
        "residual": result.texts.get("residual", 0),
        "altered": sum(result.wrong.values()),
        "lost": len(result.broken_off),
        "log": len(result.disagreements),
        "failed": len(result.refused),
        "exact": result.exact,
        "p50_s": p50,
        "p95_s": p95,
        "longest_s": longest,
    }


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, the 95th percentile and the greatest of some values; zeros of none."""
    return tuple(map(float, np.percentile(values, [50, 95, 100]))) if values else (0.0, 0.0, 0.0)  # type: ignore[return-value]

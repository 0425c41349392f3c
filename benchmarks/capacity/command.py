"""Capacity benchmark: how many devices an edge holds at a service level, and its tokens a second, by each system.

The edge has half of the cores for itself; devices, line and broker have the others, and what they took is told. Devices
replay drafts that were recorded on this machine, each at the draft model's own pace as on a processor of its own, in
the mode that they were recorded in, so that they are accepted as the model itself would be; a text that takes another
turn than the recorded one ends there. Devices that choose their plan write in coupled mode, since a residual text
depends on where drafts begin, and so does the edge that writes alone: the same texts, both at the price of rows that
repeat. The other systems do not pay it, nor does an edge that writes alone in residual mode (edge-streaming-residual).
What needs no network (raw llama.cpp, and both models on the edge's cores) has the same cores, the same prompts and as
many clients. Nobody goes on from a prompt that was computed for somebody else. Each client writes text after text; a
cell is counted from when all have had a token, and those that choose their plan 24. A target of several times the cost
has blocks that compute and change nothing: its text is the small model's, its cost is real.
"""

import argparse
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

from benchmarks.capacity.arrivals import Arrivals
from benchmarks.capacity.cell import Cell, Place
from benchmarks.capacity.picture import draw
from benchmarks.capacity.residual import record_residual
from benchmarks.capacity.rows import HEAD, Row, line, table
from benchmarks.capacity.systems import ALL, DRAFT, STANDARD, drafts, replays_residual
from benchmarks.capacity.timing import Timing
from benchmarks.shared.conditions import conditions
from benchmarks.shared.ending import ending_cleanly
from benchmarks.shared.processes import Cores
from benchmarks.shared.recordings import Recording, key_of, record
from broker_config.errors import BrokerError
from fleet_cli.prompts import built_in, some
from fleet_device.drafters.gguf import GgufModel
from schemas.errors import FleetError
from schemas.policy import Mode

__all__ = ["cells", "main", "read"]

_EACH: Final = 4  # prompts of each category
_OVERHEAD_S: Final = 3.0  # of a cell, beside what is counted


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all cells; return 0, or 2 on errors."""
    arguments = read(argv)
    rows: list[Row] = []
    grid = list(cells(arguments))
    logging.getLogger("fleet_device").setLevel(logging.ERROR)  # that an edge is overloaded is what is measured
    deadline = time.monotonic() + 60.0 * arguments.minutes
    try:
        with ending_cleanly():
            # Recorded with all cores: threads of a model that outnumber its cores wait for one another.
            recordings = {draft: _recordings(arguments, draft, grid) for draft in arguments.drafts}
            os.sched_setaffinity(0, arguments.cores.others)
            _measure(arguments, grid, recordings, rows, deadline)
    except (FleetError, BrokerError) as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        os.sched_setaffinity(0, arguments.cores.edge | arguments.cores.others)
    print(table(rows))
    if len(rows) < len(grid):
        print(f"{len(grid) - len(rows)} of {len(grid)} cells were left out: {arguments.minutes:g} minutes are over.")
    if arguments.json:
        found = {
            **conditions("llama-cpp-python", "paho-mqtt", broker=True),
            "settings": _settings(arguments),
            "rows": [{**asdict(row), "load_bound": row.load_bound} for row in rows],
        }
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if arguments.picture:
        draw(rows, arguments.picture)
    return 0


def cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    """Return what is measured, in order: systems of one place one after another, so that what disturbs one does all.

    Unless all of it is asked for, Poisson arrivals are measured with the first cost and draft model, and most but one
    devices.
    """
    for cost, arrivals, devices in itertools.product(arguments.costs, arguments.arrivals, arguments.devices):
        few = arrivals is Arrivals.POISSON and len(arguments.arrivals) > 1 and not arguments.whole
        place = (arguments.costs[0], sorted(arguments.devices)[max(0, len(arguments.devices) - 2)])
        if few and (cost, devices) != place:
            continue
        for number, draft in enumerate(arguments.drafts[:1] if few else arguments.drafts):
            for system in arguments.systems:
                if drafts(system):
                    yield Cell(system, draft, cost, devices, arrivals)
                elif number == 0:
                    yield Cell(system, "", cost, devices, arrivals)


def read(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of a command line."""
    parser = argparse.ArgumentParser(prog="benchmarks capacity", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 4, 16, 64], metavar="N")
    parser.add_argument("--drafts", nargs="+", default=["Q4_0", "Q4_1"], help="quantizations (default: %(default)s)")
    parser.add_argument("--costs", nargs="+", type=int, default=[1, 8], metavar="N")
    parser.add_argument("--arrivals", nargs="+", type=Arrivals, default=list(Arrivals), choices=list(Arrivals))
    parser.add_argument("--systems", nargs="+", choices=ALL, default=list(STANDARD), metavar="SYSTEM")
    parser.add_argument("--whole", action="store_true", help="Poisson arrivals in all cells, not in a few")
    parser.add_argument("--round-trip", type=float, default=20.0, metavar="MS", help="(default: %(default)s)")
    parser.add_argument("--mbit", type=float, default=0.0, help="of each device's line; 0 is no limit (the default)")
    parser.add_argument("--tokens", type=int, default=96, help="of each text, at most (default: %(default)s)")
    parser.add_argument("--token-ms", type=float, help="time of a draft token; by default as measured here, one core")
    parser.add_argument("--seconds", type=float, default=3.0, help="counted in each cell (default: %(default)s)")
    parser.add_argument("--settle", type=float, default=1.0, metavar="S", help="before that (default: %(default)s)")
    parser.add_argument(
        "--patience", type=float, default=8.0, metavar="S", help="for first tokens, and 0.3 a device (default: 8)"
    )
    parser.add_argument("--pause", type=float, default=1.0, metavar="S", help="mean of Poisson arrivals (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of Poisson arrivals (default: 0)")
    parser.add_argument("--minutes", type=float, default=10.0, help="cells beyond are left out (default: 10)")
    parser.add_argument(
        "--no-stable-rows", dest="stable_rows", action="store_false", help="as the edge's setting: coupled texts turn"
    )
    parser.add_argument("--together", action="store_true", help="edge and devices share all cores")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw clients at the level (needs matplotlib)")
    arguments = parser.parse_args(argv)
    arguments.cores = Cores.choose(os.sched_getaffinity(0), apart=not arguments.together)
    return arguments


def _settings(arguments: argparse.Namespace) -> dict[str, object]:
    return {
        "edge_cores": len(arguments.cores.edge),
        "apart": arguments.cores.apart,
        "seconds": arguments.seconds,
        "tokens": arguments.tokens,
        "pause_s": arguments.pause,
        "seed": arguments.seed,
        "stable_rows": arguments.stable_rows,
        "draft_length_where_fixed": DRAFT,
    }


def _measure(
    arguments: argparse.Namespace,
    grid: Sequence[Cell],
    recordings: Mapping[str, Mapping[Mode, Recording]],
    rows: list[Row],
    deadline: float,
) -> None:
    timing = Timing(arguments.seconds, arguments.settle, arguments.patience)
    print(f"{len(grid)} cells of {timing.seconds:g} s, on {len(arguments.cores.edge)} cores for the edge")
    print(HEAD)
    for cost, here in itertools.groupby(grid, key=lambda cell: cell.cost):
        target = _target(arguments, cost)
        with ExitStack() as stack:
            codec = stack.enter_context(closing(GgufModel(target, vocabulary_only=True)))
            place = stack.enter_context(
                Place(
                    target,
                    arguments.models,
                    codec,
                    cores=arguments.cores,
                    round_trip_ms=arguments.round_trip,
                    mbit_s=arguments.mbit,
                    timing=timing,
                    pause_s=arguments.pause,
                    seed=arguments.seed,
                    stable_rows=arguments.stable_rows,
                )
            )
            for cell in here:
                longest = timing.patience_of(cell.devices) + timing.settle_s + timing.seconds + _OVERHEAD_S
                if time.monotonic() + longest > deadline:
                    return
                found = recordings[cell.draft or arguments.drafts[0]]
                mode = Mode.RESIDUAL if replays_residual(cell.system) else Mode.COUPLED
                rows.append(place.measure(cell, found[mode]))
                print(line(rows[-1]), flush=True)


def _target(arguments: argparse.Namespace, cost: int) -> Path:
    target: Path = arguments.models / ("target-Q8_0.gguf" if cost == 1 else f"target-Q8_0-cost{cost}.gguf")
    if not target.exists():
        raise FleetError(
            f"There is no {target}; make it: fleet models prepare{'' if cost == 1 else f' --cost {cost}'}."
        )
    return target


def _recordings(arguments: argparse.Namespace, draft: str, grid: Sequence[Cell]) -> dict[Mode, Recording]:
    """Return what a draft model says, recorded in each mode that is measured."""

    def tell(said: str) -> None:
        print(f"{said} …", file=sys.stderr, flush=True)

    target, file = _target(arguments, 1), arguments.models / f"{draft}.gguf"
    if not file.exists():
        raise FleetError(f"There is no {file}; make it: fleet models prepare.")
    cache, prompts = arguments.models / "recordings", some(built_in(), _EACH)
    coupled = record(target, file, prompts, tokens=arguments.tokens, cache=cache, on_progress=tell)
    if arguments.token_ms is not None:
        coupled = replace(coupled, token_s=arguments.token_ms / 1e3)
    found = {Mode.COUPLED: coupled}
    if any(replays_residual(cell.system) for cell in grid):
        key = key_of(target, file, prompts, arguments.tokens)
        found[Mode.RESIDUAL] = record_residual(
            coupled,
            target=target,
            draft=file,
            length=DRAFT,
            file=cache / f"{draft}-residual-{DRAFT}-{key}.npz",
            tokens=arguments.tokens,
            threads=len(arguments.cores.edge | arguments.cores.others),
            on_progress=tell,
        )
    return found


if __name__ == "__main__":
    sys.exit(main())

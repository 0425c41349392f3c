"""Fault benchmark: what becomes of texts and session log when whatever can fail does, at random moments.

A real mosquitto with certificates, an edge over a toy target model and devices over a toy draft model, each in a
process of its own; devices write all the time, in both modes, drafting ahead. Each text is checked token by token, the
session log is compared with what the devices know, and the time is taken from the end of a fault to the next token of
each device. The end of a fault is when the fleet may go on: an edge is online, a broker listens, a line is free.

Lost segments are made by the relay before each client: a piece of the stream, and all behind it, comes as much later as
TCP needs to send it again. Clocks are those of edge and devices alone, not the broker's.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.faults.experiment import Experiment, Result
from benchmarks.faults.fleet import Load
from benchmarks.faults.kinds import FAULTS
from benchmarks.faults.report import HEADER, line, report
from benchmarks.shared.ending import ending_cleanly
from broker_config.errors import BrokerError
from schemas.errors import FleetError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the faults; return 0 if every text and the log came out right, 1 if not, 2 if they could not be run."""
    parser = argparse.ArgumentParser(
        prog="benchmarks faults",
        description=__doc__,
        epilog="faults: " + "; ".join(f"{fault.name} ({fault.summary})" for fault in FAULTS.values()),
    )
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), metavar="FAULT", help="default: all")
    parser.add_argument("--moments", type=int, default=20, help="at which each strikes (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=8, help="that write (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="shorten those that last 40 s and more")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep logs and databases there; must be empty or not there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args(argv)
    if arguments.moments < 1 or not 1 <= arguments.devices <= 200:
        parser.error("--moments must be positive, --devices 1 to 200")
    load = Load(devices=arguments.devices)
    results: list[Result] = []
    with ending_cleanly(), ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-faults-")))
        for name in arguments.only or FAULTS:
            experiment = Experiment(
                FAULTS[name],
                load,
                moments=arguments.moments,
                seed=arguments.seed,
                quick=arguments.quick,
                on_progress=lambda sentence: print(sentence, file=sys.stderr, flush=True),
            )
            try:
                results.append(experiment.run(folder.resolve() / name))
            except (FleetError, BrokerError) as error:
                print(error, file=sys.stderr)
                return 2
            _show(results[-1], first=len(results) == 1)
            if arguments.json is not None:
                settings = {"moments": arguments.moments, "seed": arguments.seed, "quick": arguments.quick}
                content = report(results, load=load, settings=settings)
                arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    failed = [result.name for result in results if not result.exact]
    print("every text and the log are right" if not failed else f"NOT all is right after: {', '.join(failed)}")
    return 1 if failed else 0


def _show(result: Result, *, first: bool) -> None:
    if first:
        print(HEADER)
    print(line(result), flush=True)
    for sentence in (*result.broken_off[:3], *result.disagreements[:3]):
        print(f"    {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

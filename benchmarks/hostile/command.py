"""Hostile-device benchmark: what one device with a good certificate can do to the others of its fleet.

A real mosquitto with certificates, a real edge, honest devices that write all the time, each in a process of its own,
and one attacker. Every attack meets a new broker and a new edge. In one run are measured: what the honest devices write
without an attack; the same while the attack's messages go to a topic that no edge serves (the control: how much of the
fall is the attacker's and the broker's processor time on the same machine); during the attack; and from 5 s after it.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from benchmarks.hostile.attacks.registry import ATTACKS
from benchmarks.hostile.experiment import Experiment, Result, Timing
from benchmarks.hostile.fleet import Fleet, Models
from benchmarks.hostile.report import HEADER, line, met, report
from benchmarks.shared.processes import Cores
from broker_config.errors import BrokerError
from schemas.errors import FleetError

__all__ = ["main"]

_FRESH: Final = 6
_DEVICES: Final = max(attack.devices for attack in ATTACKS.values())
_DRAFT_MODEL: Final = "Q4_0.gguf"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the attacks; return 0 if the fleet held out against all, 1 if not, 2 if they could not be run."""
    parser = argparse.ArgumentParser(
        prog="benchmarks hostile",
        description=__doc__,
        epilog="attacks: " + "; ".join(f"{attack.name} ({attack.summary})" for attack in ATTACKS.values()),
    )
    parser.add_argument("--attack", nargs="+", choices=list(ATTACKS), metavar="NAME", help="default: all")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each attack (default: %(default)s)")
    parser.add_argument("--baseline", type=float, default=10.0, metavar="SECONDS", help="of each other measurement")
    parser.add_argument("--honest", type=int, default=3, help="honest devices (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=192, help="of an honest text, at most (default: %(default)s)")
    parser.add_argument("--models", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--scripted", action="store_true", help="a scripted target instead of the real one")
    parser.add_argument("--shared-cores", action="store_true", help="give the edge no cores of its own")
    parser.add_argument("--no-control", action="store_true", help="leave the controls out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep logs and databases there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    arguments = parser.parse_args(argv)
    if arguments.honest < 1 or arguments.seconds <= 0 or arguments.baseline <= 0:
        parser.error("--honest, --seconds and --baseline must be positive")
    _allow_descriptors()
    attacks = [ATTACKS[name] for name in arguments.attack or ATTACKS]
    timing = Timing(
        attack=arguments.seconds, baseline=arguments.baseline, control=arguments.baseline, after=arguments.baseline
    )
    cores = Cores.choose(os.sched_getaffinity(0), apart=not arguments.shared_cores)
    models = Models(None, None)
    if not arguments.scripted:
        models = Models(arguments.models / "target", arguments.models / _DRAFT_MODEL)
    results: list[Result] = []
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-hostile-")))
        folder.mkdir(parents=True, exist_ok=True)
        before = os.sched_getaffinity(0)
        stack.callback(os.sched_setaffinity, 0, before)
        os.sched_setaffinity(0, cores.others)
        fleet = Fleet(
            folder=folder.resolve(),
            models=models,
            honest=[f"device-{number}" for number in range(1, arguments.honest + 1)],
            hostile=[f"hostile-{number}" for number in range(1, _DEVICES + 1)],
            fresh=[f"fresh-{number}" for number in range(1, _FRESH + 1)],
            cores=cores,
            seed=arguments.seed,
            tokens=arguments.tokens,
        )
        try:
            fleet.make()
            print("recording the honest devices' texts …", file=sys.stderr)
            fleet.record()
            print(HEADER, flush=True)
            for attack in attacks:
                experiment = Experiment(
                    fleet, attack, timing, seed=arguments.seed, with_control=not arguments.no_control
                )
                results.append(experiment.run())
                print(line(results[-1]), flush=True)
                if arguments.json is not None:
                    settings = {
                        "honest": arguments.honest,
                        "tokens": arguments.tokens,
                        "seed": arguments.seed,
                        "target": "scripted" if arguments.scripted else str(arguments.models),
                    }
                    content = report(results, timing=timing, cores=cores, settings=settings)
                    arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except (FleetError, BrokerError) as error:
            print(error, file=sys.stderr)
            return 2
    failed = [result.name for result in results if not met(result)]
    print("the fleet held out against all of them" if not failed else f"it did NOT against: {', '.join(failed)}")
    return 1 if failed else 0


def _allow_descriptors() -> None:
    """Let the broker and the attacker have as many connections as the system allows; they have it from us."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())

"""Attacks: what one device with a good certificate can do to the others of its fleet (shares of their tokens a second).

A real mosquitto with certificates, a real edge, honest devices that write all the time, each in a process of its own,
and one attacker. Every attack meets a new broker and a new edge. In one run are measured: what the honest devices
write without an attack; the same while the attack's messages go to a topic that no edge serves (the control: how much
of the fall is the attacker's and the broker's processor time on the same machine); during the attack; and from 5 s
after it. Takes 40 minutes for all attacks.
"""

import argparse
import resource
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import Bench, Report, number_of, say, table
from benchmarks.hostile.attacks.registry import ATTACKS
from benchmarks.hostile.experiment import Experiment, Result, Timing
from benchmarks.hostile.fleet import Fleet, Models
from benchmarks.processes import Cores, on_cores

_FRESH: Final = 6
_DEVICES: Final = max(attack.devices for attack in ATTACKS.values())
_LEAST_DURING: Final = 0.9
_LEAST_OF_PLAIN: Final = 0.7
_LEAST_AFTER: Final = 0.9  # what is full recovery within the spread of a ten-second window
_MOST_EDGE_MB: Final = 100.0
_MOST_ROWS: Final = 100.0
_LONGEST_WAIT_S: Final = 1.0
_COLUMNS: Final = {
    "name": "", "baseline": ".1f", "honest_control": ".2f", "honest_during": ".2f", "honest_during_of_control": ".2f",
    "honest_after": ".2f", "edge_rss_mb": ".0f", "broker_rss_mb": ".0f", "rows": ".0f", "fresh_device_s": ".2f",
    "notes": "",
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "attacks: " + "; ".join(f"{attack.name} ({attack.summary})" for attack in ATTACKS.values())
    parser.add_argument("--attack", nargs="+", choices=list(ATTACKS), metavar="NAME", help="default: all")
    parser.add_argument("--seconds", type=number_of(float, 0.1), default=20.0, help="of each attack")
    parser.add_argument("--baseline", type=number_of(float, 0.1), default=10.0, help="seconds of other measurements")
    parser.add_argument("--honest", type=number_of(int, 1), default=3, help="honest devices (default: %(default)s)")
    parser.add_argument("--tokens", type=number_of(int, 1), default=192, help="of an honest text, at most")
    parser.add_argument("--scripted", action="store_true", help="a scripted target instead of the real one")
    parser.add_argument("--shared-cores", action="store_true", help="give the edge no cores of its own")
    parser.add_argument("--no-control", action="store_true", help="leave the controls out")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep logs and databases there")


def run(bench: Bench) -> Report:
    options = bench.options
    _allow_descriptors()
    baseline = options.baseline
    timing = Timing(attack=options.seconds, baseline=baseline, control=baseline, after=baseline)
    cores = Cores.choose(bench.cores.edge | bench.cores.others, apart=not options.shared_cores)
    models = Models(None, None)
    if not options.scripted:
        models = Models(bench.model("target"), bench.model("Q4_0.gguf"))
    folder = options.folder or bench.folder
    folder.mkdir(parents=True, exist_ok=True)
    fleet = Fleet(
        folder=folder.resolve(),
        models=models,
        honest=[f"device-{number}" for number in range(1, options.honest + 1)],
        hostile=[f"hostile-{number}" for number in range(1, _DEVICES + 1)],
        fresh=[f"fresh-{number}" for number in range(1, _FRESH + 1)],
        cores=cores,
        seed=options.seed,
        tokens=options.tokens,
    )
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    with on_cores(cores.others):
        fleet.make()
        say("recording the honest devices' texts")
        fleet.record()
        for name in options.attack or ATTACKS:
            control = not options.no_control
            result = Experiment(fleet, ATTACKS[name], timing, seed=options.seed, with_control=control).run()
            found = list(wrong_with(result))
            wrong += [f"{name}: {what}." for what in found]
            rows.append({**asdict(result), "met": not found, "notes": ", ".join(_notes(result))})
            table(rows[-1:], _COLUMNS)
    table(rows, _COLUMNS, title="all attacks; shares are of the same attack's baseline (tokens a second)")
    return Report(rows, more={"timing_s": asdict(timing)}, wrong=wrong)


def wrong_with(result: Result) -> Iterator[str]:
    """Yield what has not held out as it should."""
    during = max(result.honest_during, result.honest_during_of_control or 0.0)
    least = _LEAST_DURING if ATTACKS[result.name].plain is None else _LEAST_OF_PLAIN
    if during < least:
        yield f"honest devices kept {during:.2f} of their pace ({least} wanted)"
    if result.honest_after < _LEAST_AFTER:
        yield f"honest devices came back to {result.honest_after:.2f} of their pace ({_LEAST_AFTER} wanted)"
    if result.edge_rss_mb > _MOST_EDGE_MB:
        yield f"the edge grew by {result.edge_rss_mb:.0f} MB ({_MOST_EDGE_MB:.0f} allowed)"
    if result.rows > _MOST_ROWS:
        yield f"{result.rows:.0f} database rows a minute ({_MOST_ROWS:.0f} allowed)"
    if result.fresh_device_s > _LONGEST_WAIT_S:
        yield f"a fresh device waited {result.fresh_device_s:.2f} s ({_LONGEST_WAIT_S:g} allowed)"
    if result.differing_texts:
        yield f"{result.differing_texts} honest texts ALTERED"
    if result.edge_died or result.broker_died:
        yield f"the {'edge' if result.edge_died else 'broker'} DIED"


def _notes(result: Result) -> Iterator[str]:
    yield from ["slowed"] * result.slowed + ["fenced"] * result.fenced
    if result.kicked:
        yield "kicked " + " ".join(f"{count}x{why}" for why, count in result.kicked.items())
    if result.failed_texts:
        yield f"{len(result.failed_texts)} honest texts failed"


def _allow_descriptors() -> None:
    """Let the broker and the attacker have as many connections as the system allows; they have it from us."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

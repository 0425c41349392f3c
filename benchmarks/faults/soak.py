"""Soak test: many devices write for long under random faults; texts stay right, and memory stays flat.

A fleet as the suite `faults` has it, with more devices that write more slowly. Faults of all kinds come at random
moments; those that end the edge come in the first quarter of the warm-up alone, because memory is measured over one
life of a process. Resident memory is sampled, and its slope after the warm-up is that of Theil and Sen, with its 95 %
interval. A warm-up is long enough when the edge has lived for about ten minutes: until then the database's cache of
pages fills, what it keeps of ended texts does, and the largest backlog that the faults make has come.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.faults.agreement import disagreements
from benchmarks.faults.fleet import EDGE, DisturbedFleet, Load
from benchmarks.faults.kinds import FAULTS, Fault
from benchmarks.shared.conditions import conditions
from benchmarks.shared.ending import ending_cleanly
from benchmarks.shared.processes import BenchError
from benchmarks.shared.slope import Slope, robust_slope
from broker_config.errors import BrokerError
from schemas.errors import FleetError

__all__ = ["Memory", "main"]

_MB: Final = 1e6
_HOUR_S: Final = 3600.0
_SAMPLE_S: Final = 5.0
_MOST_POINTS: Final = 400
_REPORT_S: Final = 60.0
_PATIENCE_S: Final = 90.0
_END_THE_EDGE: Final = frozenset({"edge-kill", "clock-restart"})
_END_IT_WITHIN: Final = 0.25  # the share of the warm-up in which they come
_LONGEST: Final = 160  # tokens of a text, its prompt counted in
_BROKER: Final = "broker"
_DEVICES: Final = "devices"


@dataclass(slots=True)
class Memory:
    """Resident memory of processes over time.

    Attributes:
        samples: By name: process id, seconds, megabytes.
    """

    samples: dict[str, list[tuple[int, float, float]]] = field(default_factory=dict)

    def take(self, name: str, pid: int, at: float) -> None:
        """Sample a process; one that has ended is left out."""
        try:
            rss = psutil.Process(pid).memory_info().rss
        except psutil.Error:
            return
        self.samples.setdefault(name, []).append((pid, at, rss / _MB))

    def points(self, name: str, *, since: float) -> list[tuple[float, float]]:
        """Return hours and megabytes of a process's longest life after a moment, thinned to a few hundred medians."""
        lives: dict[int, list[tuple[float, float]]] = {}
        for pid, at, megabytes in self.samples.get(name, ()):
            if at >= since:
                lives.setdefault(pid, []).append((at / _HOUR_S, megabytes))
        longest = max(lives.values(), key=len, default=[])
        width = -(-len(longest) // _MOST_POINTS)
        blocks = [longest[begin : begin + width] for begin in range(0, len(longest), width or 1)]
        return [(block[len(block) // 2][0], sorted(y for _, y in block)[len(block) // 2]) for block in blocks]


def main(argv: Sequence[str] | None = None) -> int:
    """Soak; return 0 if texts, log and the edge's memory are as they should be, 1 if not, 2 if it could not be run."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="the warm-up included (default: %(default)s)")
    parser.add_argument("--warm-up", type=float, metavar="MINUTES", help="default: half of it, at most 15")
    parser.add_argument("--devices", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--limit", type=float, default=1.0, metavar="MB", help="an hour, of the edge (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep logs and databases there; must be empty or not there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write figures and samples to FILE")
    arguments = parser.parse_args(argv)
    if arguments.minutes <= 0 or not 1 <= arguments.devices <= 200:
        parser.error("--minutes must be positive, --devices 1 to 200")
    warm_up = arguments.warm_up if arguments.warm_up is not None else min(15.0, 0.5 * arguments.minutes)
    # A device of a fleet does not write all the time, and fifty of them share this machine.
    # Room for two of their longest texts each: the edge keeps ended ones as well, up to that, and is full soon.
    load = Load(
        devices=arguments.devices,
        shortest=16,
        longest=96,
        token_s=0.1,
        pause_s=3.0,
        kv_tokens=2 * _LONGEST * arguments.devices,
    )
    with ending_cleanly(), ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-soak-")))
        try:
            with DisturbedFleet.run(folder.resolve(), load, seed=arguments.seed) as fleet:
                soak = _Soak(fleet, random.Random(f"soak-{arguments.seed}"), warm_up * 60.0, arguments.minutes * 60.0)
                soak.run()
                fleet.stop()
                wrong = [*fleet.tally.broken_off, *disagreements(fleet.database, fleet.tally)]
        except (FleetError, BrokerError) as error:
            print(error, file=sys.stderr)
            return 2
    wrong += [f"{number} texts are {what}" for what, number in soak.fleet.tally.wrong.items()]
    wrong += [f"{number} devices did not go on after {name}" for name, number in soak.stuck.items()]
    return _conclude(soak, wrong, limit=arguments.limit, file=arguments.json)


@dataclass(slots=True)
class _Soak:
    fleet: DisturbedFleet
    rng: random.Random
    warm_up_s: float
    seconds: float
    memory: Memory = field(default_factory=Memory)
    struck: dict[str, int] = field(default_factory=dict)
    moments: list[tuple[str, float]] = field(default_factory=list)
    stuck: dict[str, int] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    _sampled: float = 0.0
    _reported: float = 0.0

    def run(self) -> None:
        """Let faults come until the time is over."""
        self._wait_for_all("the start", since=0.0)
        self.began = time.monotonic()
        kinds = self._kinds()
        while self._passed < self.seconds:
            self._watch(self.rng.uniform(1.0, 6.0))
            fault = next(kinds)
            self.fleet.tally.forget_moments()
            self.moments.append((fault.name, round(self._passed, 1)))
            with fault.act(self.fleet, self.rng):
                self._watch(fault.duration_s(self.rng, quick=True))
            self.struck[fault.name] = self.struck.get(fault.name, 0) + 1
            self._wait_for_all(fault.name, since=time.monotonic())

    @property
    def _passed(self) -> float:
        return time.monotonic() - self.began

    def _kinds(self) -> Iterator[Fault]:
        """Yield kinds in random order, each as often; those that end the edge early in the warm-up alone."""
        while True:
            kinds = list(FAULTS.values())
            self.rng.shuffle(kinds)
            for fault in kinds:
                if self._passed < _END_IT_WITHIN * self.warm_up_s or fault.name not in _END_THE_EDGE:
                    yield fault

    def _wait_for_all(self, what: str, *, since: float) -> None:
        """Wait until every device has gone on."""
        devices, deadline = len(self.fleet.names), time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            self._watch(0.0)
            if len(self.fleet.tally.wait_for_all(devices, since=since, timeout_s=1.0)) == devices:
                return
        missing = devices - len(self.fleet.tally.wait_for_all(devices, since=since, timeout_s=0.0))
        if what == "the start":
            raise BenchError(f"{missing} devices write nothing; see the logs in {self.fleet.folder}.")
        self.stuck[what] = self.stuck.get(what, 0) + missing

    def _watch(self, seconds: float) -> None:
        """Let time pass, and look at the processes meanwhile."""
        end = time.monotonic() + seconds
        while True:
            now = time.monotonic()
            if now - self._sampled >= _SAMPLE_S:
                self._sampled = now
                self._sample(now)
            if now - self._reported >= _REPORT_S:
                self._reported = now
                self._report()
            if now >= end:
                return
            time.sleep(min(0.2, end - now))

    def _sample(self, now: float) -> None:
        if self.fleet.edge is not None:
            self.memory.take(EDGE, self.fleet.edge.pid, now)
        for child in psutil.Process().children():
            if child.name() == "mosquitto":
                self.memory.take(_BROKER, child.pid, now)
        for name, device in self.fleet.devices.items():
            self.memory.take(name, device.pid, now)

    def _report(self) -> None:
        tally, faults = self.fleet.tally, sum(self.struck.values())
        print(
            f"{self._passed / 60:5.1f} min: {len(tally.texts)} texts, {tally.tokens} tokens, {faults} faults, "
            f"{sum(tally.wrong.values())} wrong, {len(tally.broken_off)} lost, {len(tally.told)} told; "
            f"edge {self.last(EDGE):.1f} MB",
            file=sys.stderr,
            flush=True,
        )

    def last(self, name: str) -> float:
        """Return the last megabytes of the edge, the broker or the device in the middle; 0 if there are none."""
        names = self.fleet.names if name == _DEVICES else [name]
        found = [samples[-1][2] for each in names if (samples := self.memory.samples.get(each))]
        return statistics.median(found) if found else 0.0

    def slopes(self) -> dict[str, Slope | None]:
        """Return MB an hour after the warm-up, of the edge, the broker and the device in the middle."""
        since = self.began + self.warm_up_s
        found = {name: robust_slope(self.memory.points(name, since=since)) for name in (EDGE, _BROKER)}
        devices = [robust_slope(self.memory.points(name, since=since)) for name in self.fleet.names]
        known = sorted((slope for slope in devices if slope is not None), key=lambda slope: slope.value)
        return {**found, _DEVICES: known[len(known) // 2] if known else None}


def _conclude(soak: _Soak, wrong: Sequence[str], *, limit: float, file: Path | None) -> int:
    tally, slopes = soak.fleet.tally, soak.slopes()
    modes = ", ".join(f"{number} {mode}" for mode, number in sorted(tally.by_mode.items()))
    print(
        f"{len(tally.texts)} texts ({modes}), "
        f"{tally.tokens} tokens, {tally.resumes} resumes, {len(tally.told)} texts told that they could not be begun; "
        f"faults: {', '.join(f'{number} {name}' for name, number in sorted(soak.struck.items()))}"
    )
    for sentence in wrong[:20]:
        print(f"    WRONG: {sentence}")
    print(f"{'memory':<10} {'MB/h':>8} {'95 % interval':>20} {'samples':>8} {'now, MB':>8}")
    for name, slope in slopes.items():
        last = soak.last(name)
        interval = "-" if slope is None else f"{slope.low:.2f} to {slope.high:.2f}"
        print(
            f"{name:<10} {'-' if slope is None else format(slope.value, '.2f'):>8} {interval:>20} "
            f"{0 if slope is None else slope.samples:>8} {last:>8.1f}"
        )
    edge = slopes[EDGE]
    if edge is not None and edge.low <= limit < edge.high:
        print(f"The interval of the edge holds the limit of {limit:g} MB/h: soak longer to tell.")
    if file is not None:
        file.write_text(json.dumps(_content(soak, slopes, wrong), indent=2) + "\n", encoding="utf-8")
    return 1 if wrong or edge is None or edge.value > limit else 0


def _content(soak: _Soak, slopes: dict[str, Slope | None], wrong: Sequence[str]) -> dict[str, Any]:
    tally = soak.fleet.tally
    return {
        "texts": dict(tally.by_mode),
        "tokens": tally.tokens,
        "told": tally.told,
        "wrong": list(wrong),
        "faults": soak.struck,
        "moments_s": soak.moments,
        "mb_per_hour": {name: None if slope is None else asdict(slope) for name, slope in slopes.items()},
        "samples": {
            name: [(pid, round(at - soak.began, 1), round(megabytes, 2)) for pid, at, megabytes in samples]
            for name, samples in soak.memory.samples.items()
        },
        **conditions("paho-mqtt", "sqlalchemy", broker=True),
    }


if __name__ == "__main__":
    sys.exit(main())

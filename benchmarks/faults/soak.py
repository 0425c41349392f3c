"""Soak: many devices write for long under random faults; texts stay right, and memory stays flat (MB an hour).

A fleet as the suite `faults moments` has it, with more devices that write more slowly. Faults of all kinds come at
random moments; those that end the edge come in the first quarter of the warm-up alone, because memory is measured over
one life of a process. Resident memory is sampled; its slope after the warm-up is that of Theil and Sen, with its 95 %
interval. A warm-up is long enough when the edge has lived for about ten minutes. Takes half an hour. With
`--structured` devices ask for short answers that follow JSON schemas, each is validated, and no memory is measured.
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import psutil
from scipy.stats import theilslopes

from benchmarks.faults.fleet import EDGE, DisturbedFleet, disagreements
from benchmarks.faults.moments import FAULTS, Disturbance
from benchmarks.faults.writer import Load
from benchmarks.harness import Bench, SuiteReport, add_curve, at_least, at_most, number_of, table
from benchmarks.processes import BenchError

_MB: Final = 1e6
_HOUR_S: Final = 3600.0
_SAMPLE_S: Final = 5.0
_MAX_POINTS: Final = 400
_REPORT_S: Final = 60.0
_PATIENCE_S: Final = 90.0
_END_THE_EDGE: Final = frozenset({"edge-kill", "clock-restart"})
_END_IT_WITHIN: Final = 0.25  # the share of the warm-up in which they come
_LONGEST: Final = 160  # tokens of a sequence, prompt included
_BROKER: Final = "broker"
_DEVICES: Final = "devices"


@dataclass(slots=True)
class ResidentMemory:
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
        width = -(-len(longest) // _MAX_POINTS)
        blocks = [longest[begin : begin + width] for begin in range(0, len(longest), width or 1)]
        return [(block[len(block) // 2][0], sorted(y for _, y in block)[len(block) // 2]) for block in blocks]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=number_of(float, 0.01), default=30.0, help="the warm-up included")
    parser.add_argument("--warm-up", type=float, metavar="MINUTES", help="default: half of it, at most 15")
    parser.add_argument("--devices", type=number_of(int, 1), default=50, help="at most 200 (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=1.0, metavar="MB", help="an hour, of the edge (%(default)s)")
    parser.add_argument("--structured", type=number_of(int, 1), metavar="N", help="end after N answers of JSON schemas")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep logs and databases there; must be empty or not there")
    add_curve(parser)


def run(bench: Bench) -> SuiteReport:
    options = bench.options
    os.sched_setaffinity(0, bench.cores.edge | bench.cores.others)
    warm_up = options.warm_up if options.warm_up is not None else min(15.0, 0.5 * options.minutes)
    # Devices of a fleet are idle at times, and fifty of them share this machine.
    # Room for two of their longest sequences each: the edge retains ended ones up to that, and is full soon.
    kv_tokens = 2 * _LONGEST * options.devices
    load = Load(devices=options.devices, shortest=16, longest=96, token_s=0.1, pause_s=3.0, kv_tokens=kv_tokens)
    if options.structured:
        load = replace(load, pause_s=1.5, structured=True)
    with DisturbedFleet.run((options.folder or bench.folder).resolve(), load, seed=options.seed) as fleet:
        soak = _Soak(fleet, random.Random(f"soak-{options.seed}"), warm_up * 60.0, options.minutes * 60.0)
        soak.texts = options.structured
        soak.run()
        fleet.stop()
        wrong = [*fleet.tally.broken_off, *disagreements(fleet.database, fleet.tally)]
    wrong += [f"{number} texts are {what}" for what, number in fleet.tally.wrong.items()]
    wrong += [f"{number} devices did not go on after {name}" for name, number in soak.stuck.items()]
    if options.structured:
        soak.report()
        found = {"answers": len(fleet.tally.texts), "faults": sum(soak.struck.values())}
        goals = [at_least("structured answers", len(fleet.tally.texts), options.structured)]
        return SuiteReport([found], goals, more={"faults": soak.struck, "failed": fleet.tally.refused}, wrong=wrong)
    rows = soak.slopes()
    soak.report()
    table(rows, {"process": "", "mb_per_hour": ".2f", "low": ".2f", "high": ".2f", "samples": "d", "now_mb": ".1f"})
    more = {
        "texts": dict(fleet.tally.by_mode),
        "tokens": fleet.tally.tokens,
        "failed": fleet.tally.refused,
        "faults": soak.struck,
        "moments_s": soak.moments,
        "samples": soak.memory.samples,
    }
    edge = rows[0]["mb_per_hour"]
    goals = [at_most("MB an hour of the edge", float("inf") if edge is None else edge, options.limit)]
    return SuiteReport(rows, goals, more=more, wrong=wrong)


@dataclass(slots=True)
class _Soak:
    fleet: DisturbedFleet
    rng: random.Random
    warm_up_s: float
    seconds: float
    memory: ResidentMemory = field(default_factory=ResidentMemory)
    struck: dict[str, int] = field(default_factory=dict)
    moments: list[tuple[str, float]] = field(default_factory=list)
    stuck: dict[str, int] = field(default_factory=dict)
    texts: int | None = None
    began: float = field(default_factory=time.monotonic)
    _sampled: float = 0.0
    _reported: float = 0.0

    def run(self) -> None:
        self._wait_for_all("the start", since=0.0)
        self.began = time.monotonic()
        kinds = self._kinds()
        while self._passed < self.seconds if self.texts is None else len(self.fleet.tally.texts) < self.texts:
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

    def _kinds(self) -> Iterator[Disturbance]:
        """Yield kinds in random order, each as often; those that end the edge only early in the warm-up."""
        while True:
            kinds = list(FAULTS.values())
            self.rng.shuffle(kinds)
            for fault in kinds:
                if self.texts or self._passed < _END_IT_WITHIN * self.warm_up_s or fault.name not in _END_THE_EDGE:
                    yield fault

    def _wait_for_all(self, what: str, *, since: float) -> None:
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
        end = time.monotonic() + seconds
        while True:
            now = time.monotonic()
            if now - self._sampled >= _SAMPLE_S:
                self._sampled = now
                self._sample(now)
            if now - self._reported >= _REPORT_S:
                self._reported = now
                self.report()
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

    def report(self) -> None:
        tally, faults = self.fleet.tally, sum(self.struck.values())
        print(
            f"{self._passed / 60:5.1f} min: {len(tally.texts)} texts, {tally.tokens} tokens, {faults} faults, "
            f"{sum(tally.wrong.values())} wrong, {len(tally.broken_off)} lost, {len(tally.refused)} failed; "
            f"edge {self.last(EDGE):.1f} MB",
            flush=True,
        )

    def last(self, name: str) -> float:
        """Return the last megabytes of the edge, the broker or the median device; 0 without samples."""
        names = self.fleet.names if name == _DEVICES else [name]
        found = [samples[-1][2] for each in names if (samples := self.memory.samples.get(each))]
        return statistics.median(found) if found else 0.0

    def slopes(self) -> list[dict[str, Any]]:
        """Return MB per hour after the warm-up, of the edge, the broker and the median device."""
        since = self.began + self.warm_up_s
        found = {name: self._slope(name, since) for name in (EDGE, _BROKER)}
        devices = [slope for name in self.fleet.names if (slope := self._slope(name, since))["mb_per_hour"] is not None]
        devices.sort(key=lambda slope: slope["mb_per_hour"])
        found[_DEVICES] = devices[len(devices) // 2] if devices else self._slope("", since)
        return [{"process": name, **slope, "now_mb": self.last(name)} for name, slope in found.items()]

    def _slope(self, name: str, since: float) -> dict[str, Any]:
        points = self.memory.points(name, since=since)
        if len(points) <= 2:
            return {"mb_per_hour": None, "low": None, "high": None, "samples": len(points)}
        found = theilslopes([megabytes for _, megabytes in points], [hours for hours, _ in points], alpha=0.95)
        slope, low, high = (float(each) for each in (found.slope, found.low_slope, found.high_slope))
        return {"mb_per_hour": slope, "low": low, "high": high, "samples": len(points)}

"""Moments: texts and session log when whatever can fail does, at random moments (texts, tokens, seconds to go on).

A real mosquitto with certificates, an edge over a toy target model and devices over a toy draft model, each in a
process of its own; devices write all the time, in both modes, drafting ahead. Each text is checked token by token, the
session log is compared with what the devices know, and the time is taken from the end of a fault to the next token of
each device. The end of a fault is when the fleet may go on: an edge is online, a broker listens, a line is free. Lost
segments are made by the relay before each client: a piece of the stream, and all behind it, comes as much later as TCP
needs to send it again. Clocks are those of edge and devices alone. Takes an hour, `--quick` half of it.
"""

import argparse
import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.faults.fleet import EDGE, DisturbedFleet, Load, disagreements
from benchmarks.harness import Bench, Report, number_of, say, table
from benchmarks.processes import BenchError

Act = Callable[[DisturbedFleet, random.Random], contextlib.AbstractContextManager[None]]
"""Begins a fault on entry and ends it on exit, when edge and broker are online again."""

_HOUR_S: Final = 3600.0
_FAR_S: Final = 2.0
_LOSS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    summary: str
    seconds: tuple[float, float]
    act: Act
    quick: tuple[float, float] | None = None

    def duration_s(self, rng: random.Random, *, quick: bool) -> float:
        return rng.uniform(*(self.quick if quick and self.quick else self.seconds))


@contextlib.contextmanager
def _edge_kill(fleet: DisturbedFleet, _rng: random.Random) -> Iterator[None]:
    fleet.kill_edge()
    yield
    fleet.start_edge()


@contextlib.contextmanager
def _edge_stop(fleet: DisturbedFleet, _rng: random.Random) -> Iterator[None]:
    fleet.signal_edge(signal.SIGSTOP)
    try:
        yield
    finally:
        fleet.signal_edge(signal.SIGCONT)


@contextlib.contextmanager
def _broker_kill(fleet: DisturbedFleet, _rng: random.Random) -> Iterator[None]:
    fleet.broker.kill()
    yield
    fleet.broker.start()


@contextlib.contextmanager
def _broker_restart(fleet: DisturbedFleet, _rng: random.Random) -> Iterator[None]:
    fleet.broker.stop()
    yield
    fleet.forget_retained()
    fleet.broker.start()


@contextlib.contextmanager
def _device_kill(fleet: DisturbedFleet, rng: random.Random) -> Iterator[None]:
    name = rng.choice(fleet.names)
    fleet.kill_device(name)
    yield
    fleet.start_devices([name])


def _clients_of(fleet: DisturbedFleet, rng: random.Random) -> list[str]:
    """Choose whose line is affected: the edge's, a device's, several devices', everybody's."""
    several = rng.sample(fleet.names, k=max(2, len(fleet.names) // 2)) if len(fleet.names) > 1 else list(fleet.names)
    return rng.choice([[EDGE], [rng.choice(fleet.names)], several, [EDGE, *fleet.names]])


@contextlib.contextmanager
def _link_cut(fleet: DisturbedFleet, rng: random.Random) -> Iterator[None]:
    relays = [fleet.relays[name] for name in _clients_of(fleet, rng)]
    for relay in relays:
        relay.isolate()
    yield
    for relay in relays:
        relay.reunite()


@contextlib.contextmanager
def _link_stall(fleet: DisturbedFleet, rng: random.Random) -> Iterator[None]:
    relays = [fleet.relays[name] for name in _clients_of(fleet, rng)]
    for relay in relays:
        relay.stall()
    try:
        yield
    finally:
        for relay in relays:
            relay.release()


@contextlib.contextmanager
def _link_loss(fleet: DisturbedFleet, rng: random.Random) -> Iterator[None]:
    names = _clients_of(fleet, rng)
    for name in names:
        fleet.relays[name].loss = _LOSS
    yield
    for name in names:
        fleet.relays[name].cut()
        fleet.relays[name].loss = 0.0


@contextlib.contextmanager
def _link_far(fleet: DisturbedFleet, rng: random.Random) -> Iterator[None]:
    relays = [fleet.relays[name] for name in _clients_of(fleet, rng)]
    for relay in relays:
        relay.round_trip_s = _FAR_S
    yield
    for relay in relays:
        relay.round_trip_s = 0.0


@contextlib.contextmanager
def _database_away(fleet: DisturbedFleet, _rng: random.Random) -> Iterator[None]:
    with fleet.locked_database():
        yield


@contextlib.contextmanager
def _disk_full(fleet: DisturbedFleet, _rng: random.Random) -> Iterator[None]:
    pid = fleet.edge_pid
    fleet.disk.fill(pid)
    try:
        yield
    finally:
        fleet.disk.free(pid)


@contextlib.contextmanager
def _clock_jump(fleet: DisturbedFleet, rng: random.Random) -> Iterator[None]:
    fleet.clock.set(rng.choice((-_HOUR_S, _HOUR_S)))
    yield
    fleet.clock.set(0.0)


@contextlib.contextmanager
def _clock_and_restart(fleet: DisturbedFleet, rng: random.Random) -> Iterator[None]:
    fleet.clock.set(rng.choice((-_HOUR_S, _HOUR_S)))
    time.sleep(rng.uniform(0.2, 1.0))
    fleet.kill_edge()
    yield
    fleet.clock.set(0.0)
    fleet.start_edge()


@contextlib.contextmanager
def _certificates(fleet: DisturbedFleet, rng: random.Random) -> Iterator[None]:
    fleet.renew_certificates(_clients_of(fleet, rng))
    yield


_SHORT: Final = (0.1, 2.0)
_LINE: Final = (1.0, 8.0)

_ALL: Final = (
    Fault("edge-kill", "SIGKILL of the edge, which is started again", _SHORT, _edge_kill),
    Fault("edge-stop", "SIGSTOP of the edge for 40 s, then SIGCONT", (40.0, 40.0), _edge_stop, (5.0, 12.0)),
    Fault("broker-kill", "SIGKILL of the broker, which is started again", _SHORT, _broker_kill),
    Fault("broker-restart", "the broker stops and starts without anything that it has kept", _SHORT, _broker_restart),
    Fault("device-kill", "SIGKILL of a device, which is started again", _SHORT, _device_kill),
    Fault("link-cut", "connections of some end, and new ones as they come", (0.1, 4.0), _link_cut),
    Fault("link-stall", "lines of some pass nothing, and no end is notified", _LINE, _link_stall),
    Fault("link-loss", "lines of some lose one segment in ten, and are reset at the end", (2.0, 6.0), _link_loss),
    Fault("link-far", "lines of some take 2 s there and back", (4.0, 10.0), _link_far),
    Fault("database-away", "the database is locked for 60 s", (60.0, 60.0), _database_away, (6.0, 12.0)),
    Fault("disk-full", "no room for the database nor for the spool", (2.0, 12.0), _disk_full),
    Fault("clock-jump", "the clocks of edge and devices jump by an hour, and back", (0.5, 3.0), _clock_jump),
    Fault("clock-restart", "they jump, the edge is killed, they jump back, it is started", _SHORT, _clock_and_restart),
    Fault("certificates", "certificates of some are renewed", _SHORT, _certificates),
)

FAULTS: Final[Mapping[str, Fault]] = {fault.name: fault for fault in _ALL}


_FIRST_S: Final = 60.0  # until all devices generate
_PATIENCE_S: Final = 60.0  # until all go on after a fault
_BETWEEN_S: Final = (0.3, 2.0)


@dataclass(slots=True)
class MomentResult:
    """Result of a fault.

    Attributes:
        how: How it was made, where that depends on the machine.
        wrong: Number of wrong outputs by kind of error.
        broken_off: Errors of requests that failed after tokens had been committed: these tokens are lost.
        refused: Errors of requests that failed before: the application can retry.
        stuck: Devices without a token a minute after a fault, summed over the moments.
        recovery_s: From the end of each fault to each device's next token.
    """

    name: str
    how: str = ""
    moments: int = 0
    seconds: float = 0.0
    texts: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    resumes: int = 0
    wrong: dict[str, int] = field(default_factory=dict)
    broken_off: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)
    stuck: int = 0
    recovery_s: list[float] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Return whether no token was lost, duplicated or altered, no device is stuck, and log and devices agree."""
        return not (self.wrong or self.broken_off or self.disagreements or self.stuck)


@dataclass(frozen=True, slots=True)
class Experiment:
    fault: Fault
    load: Load
    moments: int
    seed: int
    quick: bool = False
    on_progress: Callable[[str], None] = lambda _line: None

    def run(self, folder: Path) -> MomentResult:
        rng = random.Random(f"{self.seed}-{self.fault.name}")
        result = MomentResult(self.fault.name)
        with DisturbedFleet.run(folder, self.load, seed=self.seed) as fleet:
            writing = fleet.tally.wait_for_all(self.load.devices, since=0.0, timeout_s=_FIRST_S)
            if len(writing) < self.load.devices:
                raise BenchError(f"Only {len(writing)} devices write before {self.fault.name}; see {folder}/*.log.")
            began = time.monotonic()
            for moment in range(1, self.moments + 1):
                time.sleep(rng.uniform(*_BETWEEN_S))
                self._strike(fleet, rng, moment, result)
            result.seconds = time.monotonic() - began
            fleet.stop()
            tally = fleet.tally
            result.how = fleet.disk.how if self.fault.name == "disk-full" else ""
            result.texts, result.tokens, result.resumes = dict(tally.by_mode), tally.tokens, tally.resumes
            result.wrong, result.broken_off, result.refused = dict(tally.wrong), tally.broken_off, tally.refused
            result.disagreements = disagreements(fleet.database, tally)
        return result

    def _strike(self, fleet: DisturbedFleet, rng: random.Random, moment: int, result: MomentResult) -> None:
        fleet.tally.forget_moments()
        with self.fault.act(fleet, rng):
            time.sleep(self.fault.duration_s(rng, quick=self.quick))
        ended = time.monotonic()
        waited = fleet.tally.wait_for_all(self.load.devices, since=ended, timeout_s=_PATIENCE_S)
        result.moments = moment
        result.recovery_s += waited.values()
        result.stuck += self.load.devices - len(waited)
        slowest = max(waited.values(), default=_PATIENCE_S)
        self.on_progress(
            f"{self.fault.name} {moment}/{self.moments}: {len(waited)} of {self.load.devices} devices went on, "
            f"the last after {slowest:.2f} s; {fleet.tally.tokens} tokens so far"
        )


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


def _row(result: MomentResult) -> dict[str, Any]:
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
    """Return the median, the 95th percentile and the maximum; zeros without values."""
    return tuple(map(float, np.percentile(values, [50, 95, 100]))) if values else (0.0, 0.0, 0.0)  # type: ignore[return-value]

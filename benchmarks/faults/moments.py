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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.faults.fleet import EDGE, DisturbedFleet, disagreements
from benchmarks.faults.writer import Load
from benchmarks.harness import Bench, SuiteReport, add_curve, number_of, say, table
from benchmarks.processes import BenchError
from tests.support.relay import Relay

Act = Callable[[DisturbedFleet, random.Random], contextlib.AbstractContextManager[None]]
"""Begins a fault on entry and ends it on exit, when edge and broker are online again."""

_HOUR_S: Final = 3600.0
_FAR_S: Final = 2.0
_LOSS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Disturbance:
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


def _link(begin: Callable[[Relay], object], end: Callable[[Relay], object]) -> Act:
    """Return a fault of some clients' lines."""

    @contextlib.contextmanager
    def act(fleet: DisturbedFleet, rng: random.Random) -> Iterator[None]:
        relays = [fleet.relays[name] for name in _clients_of(fleet, rng)]
        for relay in relays:
            begin(relay)
        try:
            yield
        finally:
            for relay in relays:
                end(relay)

    return act


def _end_loss(relay: Relay) -> None:
    relay.cut()
    relay.loss = 0.0


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


def _locked(fleet: DisturbedFleet, _rng: random.Random) -> contextlib.AbstractContextManager[None]:
    return fleet.locked_database()


_CUT: Final = _link(Relay.isolate, Relay.reunite)
_STALL: Final = _link(Relay.stall, Relay.release)
_LOSSY: Final = _link(lambda relay: setattr(relay, "loss", _LOSS), _end_loss)
_FAR: Final = _link(
    lambda relay: setattr(relay, "round_trip_s", _FAR_S), lambda relay: setattr(relay, "round_trip_s", 0.0)
)
_SHORT: Final = (0.1, 2.0)
_LINE: Final = (1.0, 8.0)

_ALL: Final = (
    Disturbance("edge-kill", "SIGKILL of the edge, which is started again", _SHORT, _edge_kill),
    Disturbance("edge-stop", "SIGSTOP of the edge for 40 s, then SIGCONT", (40.0, 40.0), _edge_stop, (5.0, 12.0)),
    Disturbance("broker-kill", "SIGKILL of the broker, which is started again", _SHORT, _broker_kill),
    Disturbance(
        "broker-restart", "the broker stops and starts without anything that it has kept", _SHORT, _broker_restart
    ),
    Disturbance("device-kill", "SIGKILL of a device, which is started again", _SHORT, _device_kill),
    Disturbance("link-cut", "connections of some end, and new ones as they come", (0.1, 4.0), _CUT),
    Disturbance("link-stall", "lines of some pass nothing, and no end is notified", _LINE, _STALL),
    Disturbance("link-loss", "lines of some lose one segment in ten, and are reset at the end", (2.0, 6.0), _LOSSY),
    Disturbance("link-far", "lines of some take 2 s there and back", (4.0, 10.0), _FAR),
    Disturbance("database-away", "the database is locked for 60 s", (60.0, 60.0), _locked, (6.0, 12.0)),
    Disturbance("disk-full", "no room for the database nor for the spool", (2.0, 12.0), _disk_full),
    Disturbance("clock-jump", "the clocks of edge and devices jump by an hour, and back", (0.5, 3.0), _clock_jump),
    Disturbance(
        "clock-restart", "they jump, the edge is killed, they jump back, it is started", _SHORT, _clock_and_restart
    ),
    Disturbance("certificates", "certificates of some are renewed", _SHORT, _certificates),
)

FAULTS: Final[Mapping[str, Disturbance]] = {fault.name: fault for fault in _ALL}


_FIRST_S: Final = 60.0  # until all devices generate
_PATIENCE_S: Final = 60.0  # until all go on after a fault
_BETWEEN_S: Final = (0.3, 2.0)


Row = dict[str, Any]


def strike(fault: Disturbance, load: Load, options: argparse.Namespace, folder: Path) -> Row:
    """Let a fault strike a new fleet at random moments; return what became of its texts and its session log."""
    rng = random.Random(f"{options.seed}-{fault.name}")
    recovery_s: list[float] = []
    stuck = 0
    with DisturbedFleet.run(folder, load, seed=options.seed) as fleet:
        tally = fleet.tally
        writing = tally.wait_for_all(load.devices, since=0.0, timeout_s=_FIRST_S)
        if len(writing) < load.devices:
            raise BenchError(f"Only {len(writing)} devices write before {fault.name}; see {folder}/*.log.")
        began = time.monotonic()
        for moment in range(1, options.moments + 1):
            time.sleep(rng.uniform(*_BETWEEN_S))
            tally.forget_moments()
            with fault.act(fleet, rng):
                time.sleep(fault.duration_s(rng, quick=options.quick))
            waited = tally.wait_for_all(load.devices, since=time.monotonic(), timeout_s=_PATIENCE_S)
            recovery_s += waited.values()
            stuck += load.devices - len(waited)
            say(
                f"{fault.name} {moment}/{options.moments}: {len(waited)} of {load.devices} devices went on, the last "
                f"after {max(waited.values(), default=_PATIENCE_S):.2f} s; {tally.tokens} tokens so far"
            )
        seconds = time.monotonic() - began
        fleet.stop()
        wrong_in_log = disagreements(fleet.database, tally)
    p50, p95, longest = percentiles(recovery_s)
    return {
        "name": fault.name,
        "how": fleet.disk.how if fault.name == "disk-full" else "",
        "moments": options.moments,
        "seconds": seconds,
        "coupled": tally.by_mode["coupled"],
        "residual": tally.by_mode["residual"],
        "tokens": tally.tokens,
        "resumes": tally.resumes,
        "wrong": dict(tally.wrong),
        "broken_off": tally.broken_off,
        "refused": tally.refused,
        "disagreements": wrong_in_log,
        "stuck": stuck,
        "altered": sum(tally.wrong.values()),
        "lost": len(tally.broken_off),
        "log": len(wrong_in_log),
        "failed": len(tally.refused),
        "exact": not (tally.wrong or tally.broken_off or wrong_in_log or stuck),
        "p50_s": p50,
        "p95_s": p95,
        "longest_s": longest,
    }


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
    add_curve(parser)


def run(bench: Bench) -> SuiteReport:
    options, load = bench.options, Load(devices=bench.options.devices)
    os.sched_setaffinity(0, bench.cores.edge | bench.cores.others)
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    for name in options.only or FAULTS:
        row = strike(FAULTS[name], load, options, (options.folder or bench.folder).resolve() / name)
        rows.append(row)
        table([row], _COLUMNS)
        sentences = [
            *row["broken_off"][:3],
            *row["disagreements"][:3],
            *(f"{n} texts {w}" for w, n in row["wrong"].items()),
        ]
        wrong += [f"{name}: {sentence}" for sentence in sentences]
        wrong += [f"{name}: {row['stuck']} devices had not gone on after a minute."] * bool(row["stuck"])
    table(rows, _COLUMNS, title="all faults: texts that failed before a token was committed are known as failed")
    return SuiteReport(rows, more={"load": asdict(load)}, wrong=wrong)


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, the 95th percentile and the maximum; zeros without values."""
    return tuple(map(float, np.percentile(values, [50, 95, 100]))) if values else (0.0, 0.0, 0.0)  # type: ignore[return-value]

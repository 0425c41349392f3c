"""Verdicts: what an edge costs next to its model (milliseconds, verdicts a second, microseconds of processor time).

The edge has one core, the broker and the devices another. Its engine is a script that costs next to nothing, its
session log a real one. In one run are measured: the time from a draft to its verdict, and that of a bare QoS 1 echo
through the same broker; and verdicts a second with many devices, each of which sends as soon as it is answered.
Devices send what a real one has sent in the same session, so that they cost little. Takes a minute.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, Final

import numpy as np
import psutil

from benchmarks.harness import Bench, BenchGoal, SuiteReport, at_least, at_most, cpu_s, number_of, say, table
from benchmarks.overhead.player import Echoed, Played, PlayedSession, Player, ReplayConnection, ReplayTally, play
from fleet_common.logs import Event
from schemas.policy import Mode
from tests.support.processes import BrokerClient, Program, quota_variables, scripted_edge

_EDGE, _ECHO = "edge-1", "edge-echo"
_SESSIONS, _TOKENS = 8, 128
_START_S: Final = 120.0
_BLOCK, _WARM_UP = 100, 50
_SETTLE_S: Final = 2.0
_ECHOES: Final = 2.5
_PER_S: Final = 2000.0

_names = count()
Sessions = Mapping[str, Sequence[PlayedSession]]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--answers", type=number_of(int, 2), default=1500, help="timed of each kind")
    parser.add_argument("--devices", type=number_of(int, 1), default=64, help="at saturation (default: %(default)s)")
    parser.add_argument("--seconds", type=number_of(float, 0.1), default=8.0, help="counted at saturation")


def run(bench: Bench) -> SuiteReport:
    options = bench.options
    say("recording what a device sends")
    sessions = {mode.value: play(_SESSIONS, mode=mode, tokens=_TOKENS) for mode in Mode}
    with bench.broker(_EDGE, _ECHO) as broker, _edge(bench, broker.port) as edge, _echo(bench, broker.port):
        say(f"timing {options.answers} answers of each kind")
        answers = _answers(bench, broker.port, sessions)
        pids = (edge.pid, broker.pid)
        loads = [_saturate(bench, broker.port, mode, played, pids) for mode, played in sessions.items()]
    table(answers, {"answer": "", "number": "d", "p50_ms": ".2f", "p99_ms": ".2f"}, title="one device")
    columns = {"mode": "", "verdicts_per_s": ".0f", "p50_ms": ".2f", "p99_ms": ".2f", "edge_cpu_us": ".0f"}
    busy = {"edge": ".0%", "broker": ".0%", "devices": ".0%", "limit": ""}
    table(loads, columns | busy, title=f"{options.devices} devices")
    wrong = [f"{load['wrong']} verdicts were not as recorded, {load['mode']}." for load in loads if load["wrong"]]
    return SuiteReport([*answers, *loads], _goals(answers, loads), wrong=wrong)


def _goals(answers: Sequence[dict[str, Any]], loads: Sequence[dict[str, Any]]) -> list[BenchGoal]:
    echo, *verdicts = answers
    goals = [at_most(f"verdict over echo, {v['answer']}", v["p50_ms"] / echo["p50_ms"], _ECHOES) for v in verdicts]
    return goals + [at_least(f"verdicts a second, {load['mode']}", load["verdicts_per_s"], _PER_S) for load in loads]


def _answers(bench: Bench, port: int, sessions: Sessions) -> list[dict[str, Any]]:
    """Time answers of an echo and of the edge in each mode, in turns; each by one device."""
    tallies = {name: ReplayTally() for name in ("echo", *sessions)}
    connections: dict[str, ReplayConnection] = {"echo": Echoed(port, bench.fleet, _name(), _ECHO, tallies["echo"])}
    for mode, played in sessions.items():
        connections[mode] = Played(port, bench.fleet, _name(), _EDGE, tallies[mode], sessions=played, first=0)
    players = {name: Player([connection]) for name, connection in connections.items()}
    times: dict[str, list[float]] = {name: [] for name in players}
    try:
        for name, player in players.items():
            _serve(player, tallies[name], _WARM_UP)
        for _ in range(-(-bench.options.answers // _BLOCK)):
            for name, player in players.items():
                times[name] += _serve(player, tallies[name], _BLOCK)
    finally:
        for player in players.values():
            player.__exit__(None, None, None)
    return [{"answer": name, "number": len(own), **_percentiles(own)} for name, own in times.items()]


def _saturate(
    bench: Bench, port: int, mode: str, played: Sequence[PlayedSession], pids: tuple[int, int]
) -> dict[str, Any]:
    """Let devices send as fast as they are answered."""
    say(f"{bench.options.devices} devices, {mode}")
    tally = ReplayTally()
    connections = [
        Played(port, bench.fleet, _name(), _EDGE, tally, sessions=played, first=number)
        for number in range(bench.options.devices)
    ]
    processes = [*(psutil.Process(pid) for pid in pids), psutil.Process()]
    with Player(connections) as player:
        player.serve(_SETTLE_S)
        first, before = len(tally.times_s), [cpu_s(each) for each in processes]
        took = player.serve(bench.options.seconds)
        edge, broker, devices = ((cpu_s(each) - then) / took for each, then in zip(processes, before, strict=True))
        times = tally.times_s[first:]
    limit = "neither core: the machine is busy with other work"
    if edge >= 0.9:
        limit = "the edge's core"
    elif broker + devices >= 0.9:
        limit = "the core of broker and devices"
    return {
        "mode": mode,
        **_percentiles(times),
        "verdicts_per_s": len(times) / took,
        "edge_cpu_us": edge * took / max(1, len(times)) * 1e6,
        "edge": edge,
        "broker": broker,
        "devices": devices,
        "limit": limit,
        "wrong": tally.wrong,
    }


@contextmanager
def _edge(bench: Bench, port: int) -> Iterator[Program]:
    """Run a scripted edge with a session log and without quotas."""
    cores, environment = bench.cores.edge, quota_variables()
    identity, folder = BrokerClient(_EDGE, "127.0.0.1", port), bench.new_folder()
    with scripted_edge(identity, fleet=bench.fleet, folder=folder, cores=cores, environment=environment) as edge:
        yield edge


@contextmanager
def _echo(bench: Bench, port: int) -> Iterator[None]:
    arguments = ["--port", str(port), "--fleet", bench.fleet, "--edge", _ECHO]
    log = bench.folder / "echo.log"
    with Program("benchmarks.overhead.echo", arguments, cores=bench.cores.edge, log=log) as echo:
        echo.wait_for(Event.ONLINE, timeout_s=_START_S)
        yield


def _serve(player: Player, tally: ReplayTally, number: int) -> list[float]:
    """Return the times of `number` answers, without one that has waited since the last turn."""
    first = len(tally.times_s) + 1
    player.until(lambda: len(tally.times_s) >= first + number)
    return tally.times_s[first:]


def _percentiles(times_s: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(times_s, [50, 99]) * 1e3
    return {"p50_ms": float(p50), "p99_ms": float(p99)}


def _name() -> str:
    return f"device-{next(_names)}"

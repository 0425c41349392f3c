"""Verdicts: what an edge costs next to its model (milliseconds, verdicts a second, microseconds of processor time).

The edge has one core, the broker and the devices another. Its engine is a script that costs next to nothing, its
session log a real one. In one run are measured: the time from a draft to its verdict, and that of a bare QoS 1 echo
through the same broker; verdicts a second with many devices, each of which sends as soon as it is answered; and where
the edge's processor time goes, by sampling. Devices send what a real one has sent in the same session, so that they
cost little. Then the same sampling over a real model with 16 devices: the edge's own share of a step. Takes 2 minutes.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import count
from typing import Any, Final

import numpy as np
import psutil

from benchmarks.fleet_load import FleetLoad
from benchmarks.harness import Bench, Goal, Report, at_least, at_most, cpu_s, number_of, say, table
from benchmarks.metered_edge import metered_edge
from benchmarks.overhead.player import Connection, Echoed, Played, PlayedSession, Player, ReplayTally, play
from benchmarks.processes import Program
from benchmarks.recordings import record_laws
from fleet_admin.models.prompts import built_in, some
from fleet_common.logs import Event
from fleet_device.drafters.model_file import GgufModel
from fleet_device.pacing.contract import FixedPacing
from schemas.policy import Mode

_EDGE, _ECHO = "edge-1", "edge-echo"
_SESSIONS, _TOKENS = 8, 128
_REAL_DRAFT, _REAL_TEXTS, _REAL_TOKENS = 4, 6, 64
_START_S: Final = 120.0
_BLOCK, _WARM_UP = 100, 50
_SETTLE_S: Final = 2.0
_ECHOES: Final = 2.5
_PER_S: Final = 2000.0
_OWN: Final = 0.10
_ENGINE: Final = "engine"

_names = count()
Sessions = Mapping[str, Sequence[PlayedSession]]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draft", default="Q4_0", help="over the real model (default: %(default)s)")
    parser.add_argument("--answers", type=number_of(int, 2), default=1500, help="timed of each kind")
    parser.add_argument("--devices", type=number_of(int, 1), default=64, help="at saturation (default: %(default)s)")
    parser.add_argument("--real-devices", type=number_of(int, 1), default=16, help="over the real model")
    parser.add_argument("--seconds", type=number_of(float, 0.1), default=8.0, help="counted at saturation")
    parser.add_argument("--no-model", action="store_true", help="leave out what needs a real model")


def run(bench: Bench) -> Report:
    options = bench.options
    say("recording what a device sends")
    sessions = {mode.value: play(_SESSIONS, mode=mode, tokens=_TOKENS) for mode in Mode}
    loads, shares = [], []
    with bench.broker(_EDGE, _ECHO) as broker:
        with metered_edge(bench, broker.port, None) as edge, _echo(bench, broker.port):
            say(f"timing {options.answers} answers of each kind")
            answers = _answers(bench, broker.port, sessions)
            for mode, played in sessions.items():
                loads.append(_saturate(bench, broker.port, mode, played, (edge.pid, broker.pid)))
        for mode, played in sessions.items():
            sampled: dict[str, Any] = {}
            with metered_edge(bench, broker.port, None, sample=sampled) as edge:
                _saturate(bench, broker.port, mode, played, (edge.pid, broker.pid))
            shares.append(_share(f"scripted, {mode}", sampled))
        if not options.no_model:
            shares.append(_over_a_model(bench, broker.port))
    table(answers, {"answer": "", "number": "d", "p50_ms": ".2f", "p99_ms": ".2f"}, title="one device")
    columns = {"mode": "", "verdicts_per_s": ".0f", "p50_ms": ".2f", "p99_ms": ".2f", "edge_cpu_us": ".0f"}
    busy = {"edge": ".0%", "broker": ".0%", "devices": ".0%", "limit": ""}
    table(loads, columns | busy, title=f"{options.devices} devices")
    for share in shares:
        parts = ", ".join(f"{part} {micros:.0f}" for part, micros in share["parts_us"].items())
        print(f"processor time of a verdict, us ({share['load']}, {share['batch']:.1f} in a step): {parts}")
    wrong = [f"{load['wrong']} verdicts were not as recorded, {load['mode']}." for load in loads if load["wrong"]]
    more = {"answers": answers, "saturation": loads, "shares": shares}
    return Report(
        [*answers, *loads, *shares], _goals(answers, loads, shares), more=more, wrong=wrong, draw=_draw(shares)
    )


def _goals(
    answers: Sequence[dict[str, Any]], loads: Sequence[dict[str, Any]], shares: Sequence[dict[str, Any]]
) -> list[Goal]:
    echo, *verdicts = answers
    goals = [at_most(f"verdict over echo, {v['answer']}", v["p50_ms"] / echo["p50_ms"], _ECHOES) for v in verdicts]
    goals += [at_least(f"verdicts a second, {load['mode']}", load["verdicts_per_s"], _PER_S) for load in loads]
    real = [share for share in shares if not share["load"].startswith("scripted")]
    return goals + [at_most(f"the edge's own share of a step, {s['load']}", s["own_share"], _OWN) for s in real]


def _answers(bench: Bench, port: int, sessions: Sessions) -> list[dict[str, Any]]:
    """Time answers of an echo and of the edge in each mode, in turns; each by one device."""
    tallies = {name: ReplayTally() for name in ("echo", *sessions)}
    connections: dict[str, Connection] = {"echo": Echoed(port, bench.fleet, _name(), _ECHO, tallies["echo"])}
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


def _over_a_model(bench: Bench, port: int) -> dict[str, Any]:
    """Sample an edge over a real model while devices replay recorded drafts."""
    devices, target = bench.options.real_devices, bench.target()
    prompts = some(built_in(), -(-_REAL_TEXTS // 6))
    laws = record_laws(bench, bench.options.draft, prompts, tokens=_REAL_TOKENS).laws
    texts = [laws[n % len(laws)].written(n % len(laws)) for n in range(devices)]
    sampled: dict[str, Any] = {}
    with (
        closing(GgufModel(target, vocabulary_only=True)) as codec,
        metered_edge(bench, port, target, sample=sampled),
        FleetLoad(port, bench.fleet, codec, codec.vocabulary, devices=devices, token_s=0.0) as load,
    ):
        say(f"{devices} devices over {target.name}")
        load.pace([FixedPacing(_REAL_DRAFT) for _ in texts])
        load.write(texts)
    return _share(f"{target.stem}, coupled, {devices} devices", sampled)


def _share(load: str, sampled: Mapping[str, Any]) -> dict[str, Any]:
    """Return the edge's processor time by part, in microseconds per verdict."""
    verifying = [number for _, _, number in sampled["steps"] if number]
    parts = {part: seconds / max(1, sum(verifying)) * 1e6 for part, seconds in sampled["parts"].items()}
    total = sum(parts.values())
    return {
        "load": load,
        "batch": sum(verifying) / max(1, len(verifying)),
        "parts_us": parts,
        "own_share": 1.0 - parts.get(_ENGINE, 0.0) / total if total else 0.0,
    }


@contextmanager
def _echo(bench: Bench, port: int) -> Iterator[None]:
    arguments = ["--port", str(port), "--fleet", bench.fleet, "--edge", _ECHO]
    log = bench.folder / "echo.log"
    echo = Program("benchmarks.overhead.echo", arguments, cores=bench.cores.edge, log=log)
    try:
        echo.wait_for(Event.ONLINE, timeout_s=_START_S)
        yield
    finally:
        echo.end()


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


def _draw(shares: Sequence[dict[str, Any]]) -> Any:  # noqa: ANN401 - draws on matplotlib's figure
    """Return a function that draws a bar for each load, without the engine's own time."""

    def draw(figure: Any) -> None:  # noqa: ANN401
        figure.set_size_inches(8.0, 1.2 + 0.8 * len(shares))
        axes = figure.add_subplot()
        left = [0.0] * len(shares)
        for name in sorted({part for share in shares for part in share["parts_us"]} - {_ENGINE}):
            widths = [share["parts_us"].get(name, 0.0) for share in shares]
            axes.barh(range(len(shares)), widths, left=left, label=name)
            left = [begin + width for begin, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(shares)), [share["load"] for share in shares])
        axes.invert_yaxis()
        axes.set_xlabel("processor time of a verdict without the engine's, microseconds")
        axes.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25))

    return draw

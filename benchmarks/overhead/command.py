"""Overhead benchmark: what an edge costs beside its model.

The edge has one core, the broker and the devices another. Its engine is a script that costs next to nothing, its
session log a real one. In one run are measured: the time from a draft to its verdict, beside a bare QoS 1 echo through
the same broker; verdicts a second with many devices, each of which sends as soon as it is answered; and in a process of
its own where the edge's processor time goes, by sampling. Devices send what a real one has sent in the same session, so
that they cost little. Then the same sampling over a real model with 16 devices: the edge's own share of a step.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.overhead.measures import Answers, Saturation, answer_times, saturate
from benchmarks.overhead.played import PlayedSession, play
from benchmarks.overhead.report import Share, goals_of, lines_of, rows_of
from benchmarks.shared.conditions import conditions
from benchmarks.shared.ending import ending_cleanly
from benchmarks.shared.fleet_load import FleetLoad
from benchmarks.shared.laws import record_laws
from benchmarks.shared.metered_edge import SLEEP
from benchmarks.shared.processes import Cores, Program
from broker_config.broker import Broker
from broker_config.errors import BrokerError
from broker_config.processes.runner import MosquittoProcess
from fleet_cli.prompts import built_in, some
from fleet_device.drafters.gguf import GgufModel
from fleet_device.pacing.contract import FixedPacing
from fleet_runtime.events import Event
from schemas.errors import FleetError
from schemas.policy import Mode

__all__ = ["main"]

FLEET: Final = "overhead"
EDGE: Final = "edge-1"
ECHO: Final = "edge-echo"
_SESSIONS: Final = 8
_TOKENS: Final = 128
_REAL_DRAFT: Final = 4
_REAL_TEXTS: Final = 6
_REAL_TOKENS: Final = 64
_START_S: Final = 120.0


@dataclass(slots=True)
class Found:
    """What was measured.

    Attributes:
        answers: Times of answers, the echo's first.
        saturations: By mode.
        shares: Where processor time went, by mode; over the real model last.
    """

    answers: list[Answers] = field(default_factory=list)
    saturations: list[Saturation] = field(default_factory=list)
    shares: list[Share] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return 0 if the goals are reached, 1 if not, 2 on errors."""
    arguments = _read(argv)
    cores = Cores.choose(os.sched_getaffinity(0), apart=True)
    before = os.sched_getaffinity(0)
    found = Found()
    try:
        with ending_cleanly():
            os.sched_setaffinity(0, cores.others)
            _say("recording what a device sends")
            played = {mode.value: play(_SESSIONS, mode=mode, tokens=_TOKENS) for mode in Mode}
            with MosquittoProcess(Broker(fleet=FLEET, edges=(EDGE, ECHO))) as broker:
                _measure(arguments, cores, broker, played, found)
                for mode, sessions in played.items():
                    _say(f"sampling, {mode}")
                    found.shares.append(_sample(arguments, cores, broker, mode, sessions))
                if not arguments.no_model:
                    found.shares.append(_over_a_model(arguments, cores, broker))
    except (FleetError, BrokerError) as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        os.sched_setaffinity(0, before)
    goals = goals_of(found.answers, found.saturations, found.shares)
    print("\n".join(lines_of(found.answers, found.saturations, found.shares)))
    for goal in goals:
        print(goal.sentence)
    if arguments.json:
        report = {
            **conditions("paho-mqtt", "cbor2", "pydantic", "sqlalchemy", "numpy", "llama-cpp-python", broker=True),
            "cores": {"edge": sorted(cores.edge), "others": sorted(cores.others)},
            "seeds": {"first": 0, "sessions": _SESSIONS},
            "answers": [asdict(each) for each in found.answers],
            "saturation": [each.json() for each in found.saturations],
            "shares": [each.json() for each in found.shares],
            "goals": [goal.json() for goal in goals],
            "rows": rows_of(found.answers, found.saturations, found.shares),
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if arguments.picture:
        from benchmarks.overhead.picture import draw  # noqa: PLC0415 - matplotlib is an extra

        draw(found.shares, arguments.picture)
    return 0 if all(goal.reached for goal in goals) else 1


def _read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks overhead", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--draft", default="Q4_0", help="over the real model (default: %(default)s)")
    parser.add_argument("--answers", type=int, default=1500, help="timed of each kind (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=64, help="at saturation (default: %(default)s)")
    parser.add_argument("--real-devices", type=int, default=16, help="over the real model (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=8.0, help="at saturation, counted (default: %(default)s)")
    parser.add_argument("--no-model", action="store_true", help="leave out what needs a real model")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw where time goes (needs matplotlib)")
    arguments = parser.parse_args(argv)
    if arguments.answers < 2 or arguments.devices < 1 or arguments.seconds <= 0:
        parser.error("there must be two answers, a device and some time at least")
    return arguments


def _measure(
    arguments: argparse.Namespace,
    cores: Cores,
    broker: MosquittoProcess,
    played: dict[str, list[PlayedSession]],
    found: Found,
) -> None:
    with _edge(cores, broker.port) as edge, _echo(cores, broker.port):
        _say(f"timing {arguments.answers} answers of each kind")
        found.answers = answer_times(
            broker.port, FLEET, edge=EDGE, echo=ECHO, sessions=dict(played), number=arguments.answers
        )
        for mode, sessions in played.items():
            _say(f"{arguments.devices} devices, {mode}")
            found.saturations.append(_saturate(arguments, broker, edge, mode, sessions))


def _saturate(
    arguments: argparse.Namespace,
    broker: MosquittoProcess,
    edge: Program,
    mode: str,
    sessions: Sequence[PlayedSession],
) -> Saturation:
    return saturate(
        broker.port,
        FLEET,
        edge=EDGE,
        mode=mode,
        sessions=sessions,
        devices=arguments.devices,
        seconds=arguments.seconds,
        pids=(edge.pid, broker.pid),
    )


def _sample(
    arguments: argparse.Namespace,
    cores: Cores,
    broker: MosquittoProcess,
    mode: str,
    sessions: Sequence[PlayedSession],
) -> Share:
    ended: dict[str, Any] = {}
    with _edge(cores, broker.port, sample=ended) as edge:
        saturation = _saturate(arguments, broker, edge, mode, sessions)
    return Share.of(f"scripted, {mode}", arguments.devices, ended, wrong=saturation.wrong)


def _over_a_model(arguments: argparse.Namespace, cores: Cores, broker: MosquittoProcess) -> Share:
    """Sample an edge over a real model while devices play recorded drafts."""
    target = arguments.models / "target-Q8_0.gguf"
    laws = record_laws(
        target,
        arguments.models / f"{arguments.draft}.gguf",
        some(built_in(), -(-_REAL_TEXTS // 6)),
        tokens=_REAL_TOKENS,
        cache=arguments.models / "recordings",
        on_progress=_say,
    )
    texts = [laws.laws[n % len(laws.laws)].written(n % len(laws.laws)) for n in range(arguments.real_devices)]
    codec = GgufModel(target, vocabulary_only=True)
    ended: dict[str, Any] = {}
    with closing(codec), _edge(cores, broker.port, target=target, sample=ended):
        _say(f"{arguments.real_devices} devices over {target.name}")
        with FleetLoad(
            broker.port, FLEET, codec, codec.vocabulary, devices=arguments.real_devices, token_s=0.0
        ) as load:
            load.pace([FixedPacing(_REAL_DRAFT) for _ in texts])
            load.write(texts)
    return Share.of(f"{target.stem}, coupled", arguments.real_devices, ended)


@contextmanager
def _edge(
    cores: Cores, port: int, *, target: Path | None = None, sample: dict[str, Any] | None = None
) -> Iterator[Program]:
    """Run an edge on its core; what it says at its end is put into `sample`, if there is one."""
    with tempfile.TemporaryDirectory(prefix="fleet-overhead-") as folder:
        engine = [SLEEP, "--target", "."] if target is None else ["llama.cpp", "--target", str(target)]
        edge = Program(
            "benchmarks.shared.metered_edge",
            [
                "--fleet", FLEET, "--port", str(port), "--folder", folder, "--engine", *engine,
                "--step-ms", "0", "--session-ms", "0", "--threads", str(len(cores.edge)),
                *(["--sample"] if sample is not None else []),
            ],
            cores=cores.edge,
            log=Path(folder) / "edge.log",
        )  # fmt: skip
        try:
            edge.wait_for(Event.ONLINE, timeout_s=_START_S)
            yield edge
        finally:
            lines = edge.end()
        if sample is not None:
            sample.update(json.loads(lines[-1]))


@contextmanager
def _echo(cores: Cores, port: int) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="fleet-overhead-") as folder:
        echo = Program(
            "benchmarks.overhead.echo",
            ["--port", str(port), "--fleet", FLEET, "--edge", ECHO],
            cores=cores.edge,
            log=Path(folder) / "echo.log",
        )
        try:
            echo.wait_for(Event.ONLINE, timeout_s=_START_S)
            yield
        finally:
            echo.end()


def _say(what: str) -> None:
    print(f"{what} …", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

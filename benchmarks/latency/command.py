"""Latency benchmark: what one device gets of a large model's text, over distance and width of the line, by each system.

Live models, a real edge on a processor core of its own, a real mosquitto, and a relay that delays and narrows the line.
The device and its draft model have another core. All systems write the same prompts in turn, so that whatever else the
machine does hits all of them alike. A device that chooses its plan has written one text before at each place, which is
not counted. Texts are counted from their first tokens to their last; the time to the first is
told beside. Full distributions up are sent as filling of the same size, and cost nothing but the line.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.latency.local import Timed, write_alone, write_together
from benchmarks.latency.picture import draw
from benchmarks.latency.remote_device import Line, RemoteDevice
from benchmarks.latency.systems import CO_LOCATED, DEVICE_ALONE, DRAFT, SYSTEMS
from benchmarks.shared.conditions import conditions
from benchmarks.shared.ending import ending_cleanly
from benchmarks.shared.recordings import policy_of
from broker_config.broker import Broker
from broker_config.errors import BrokerError
from broker_config.processes.runner import MosquittoProcess
from dssd.downlink import Form
from fleet_cli.prompts import built_in, some
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.pacing.contract import Pacing
from fleet_device.texts.chat import ChatMessage, encode_chat
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.registry import load_verifier
from schemas.errors import FleetError
from tests.support.edge_process import edge_process

__all__ = ["Row", "main"]

_CONTEXT: Final = 1023
FLEET: Final = "latency"

_NARROWEST_MBIT: Final = 1.0
"""Over a narrower line the full distributions of one draft take longer than a connection waits for an answer."""


@dataclass(slots=True)
class Row:
    """What one system did at one place.

    Attributes:
        system: Its name.
        draft: The draft model's.
        cost: How many times the target costs what the demo's does.
        rtt_ms: There and back.
        mbit_s: Width of the line, each way.
        devices: That write at the same time.
        tokens_per_s: The median over texts, first pieces left out.
        ttft_ms: Time to the first token, likewise.
        uplink_bytes_per_token: Payload.
        downlink_bytes_per_token: Payload.
    """

    system: str
    draft: str
    cost: int
    rtt_ms: float
    mbit_s: float
    devices: int = 1
    tokens_per_s: float = 0.0
    ttft_ms: float = 0.0
    uplink_bytes_per_token: float = 0.0
    downlink_bytes_per_token: float = 0.0
    texts: list[Timed] = field(default_factory=list)

    def sum_up(self) -> None:
        """Reckon the figures from the texts."""
        tokens = sum(text.tokens for text in self.texts)
        self.tokens_per_s = median(text.pace for text in self.texts)
        self.ttft_ms = median(text.first_s for text in self.texts) * 1e3
        self.uplink_bytes_per_token = sum(text.up_bytes for text in self.texts) / tokens
        self.downlink_bytes_per_token = sum(text.down_bytes for text in self.texts) / tokens


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every system at every place."""
    arguments = _read(argv)
    rows: list[Row] = []
    try:
        with ending_cleanly():
            _pin(arguments.device_core)
            for cost in arguments.costs:
                for draft in arguments.drafts:
                    rows += _measure(arguments, cost, draft)
    except (FleetError, BrokerError) as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        kept = [{name: value for name, value in asdict(row).items() if name != "texts"} for row in rows]
        found = {**conditions("llama-cpp-python", "paho-mqtt", broker=True), "rows": kept}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if arguments.picture:
        draw(rows, arguments.picture)
    return 0


def _read(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks latency", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--drafts", nargs="+", default=["Q4_0"], help="quantizations (default: %(default)s)")
    parser.add_argument("--costs", nargs="+", type=int, default=[1, 8], metavar="N")
    parser.add_argument("--round-trips", nargs="+", type=float, default=[0, 20, 50, 100, 200], metavar="MS")
    parser.add_argument("--mbit", type=float, default=10.0, help="where the distance varies (default: %(default)s)")
    parser.add_argument("--widths", nargs="*", type=float, default=[0.1, 1.0], metavar="MBIT", help="at 50 ms")
    parser.add_argument("--systems", nargs="+", choices=[DEVICE_ALONE, CO_LOCATED, *SYSTEMS], metavar="SYSTEM")
    parser.add_argument("--texts", type=int, default=2, help="of each system at each place (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="of each text, at most (default: %(default)s)")
    parser.add_argument(
        "--limit", type=float, default=6.0, metavar="S", help="a text ends there (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw tokens/s over distance (needs matplotlib)")
    arguments = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))
    arguments.edge_core, arguments.device_core = cores[0], cores[-1]
    arguments.systems = arguments.systems or [DEVICE_ALONE, CO_LOCATED, *SYSTEMS]
    return arguments


def _measure(arguments: argparse.Namespace, cost: int, draft: str) -> list[Row]:
    target = arguments.models / ("target-Q8_0.gguf" if cost == 1 else f"target-Q8_0-cost{cost}.gguf")
    if not target.exists():
        raise FleetError(
            f"There is no {target}; make it: fleet models prepare{'' if cost == 1 else f' --cost {cost}'}."
        )
    drafter = LlamaCppDrafter(LlamaCppSettings(path=arguments.models / f"{draft}.gguf", threads=1))
    prompts = [tuple(encode_chat(drafter.codec, [ChatMessage("user", prompt.text)])) for prompt in some(built_in(), 1)][
        : arguments.texts
    ]
    places = [(rtt, arguments.mbit) for rtt in arguments.round_trips] + [(50.0, width) for width in arguments.widths]
    with closing(drafter):
        local = _locally(arguments, target, drafter, prompts)
        rows = []
        for rtt_ms, mbit_s in places:
            for name, texts in local.items():
                # Its text travels as a stream would: nothing waits for an answer.
                rows.append(Row(name, draft, cost, rtt_ms, mbit_s, texts=texts))
        with ExitStack() as stack:
            ports = {}
            for form in {SYSTEMS[name].form for name in arguments.systems if name in SYSTEMS}:
                ports[form] = stack.enter_context(MosquittoProcess(Broker(fleet=FLEET))).port
                stack.enter_context(_edge(arguments, target, ports[form], form))
            pacings = {name: system.pacing() for name, system in SYSTEMS.items()}
            for rtt_ms, mbit_s in places:
                found = {
                    name: Row(name, draft, cost, rtt_ms, mbit_s)
                    for name in arguments.systems
                    if name in SYSTEMS and (not SYSTEMS[name].full_up or mbit_s >= _NARROWEST_MBIT)
                }
                with ExitStack() as place:
                    devices = {
                        name: place.enter_context(_device(ports[SYSTEMS[name].form], drafter, name, rtt_ms, mbit_s))
                        for name in found
                    }
                    _write_all(devices, pacings, found, prompts, arguments)
                rows += found.values()
                _tell(rows, rtt_ms, mbit_s)
    return rows


def _write_all(
    devices: Mapping[str, RemoteDevice],
    pacings: Mapping[str, Pacing],
    rows: Mapping[str, Row],
    prompts: Sequence[Sequence[int]],
    arguments: argparse.Namespace,
) -> None:
    """Write all texts by all systems, in turns."""

    def write(name: str, number: int) -> Timed:
        return devices[name].write(
            SYSTEMS[name],
            pacings[name],
            prompts[number],
            policy=policy_of(number),
            tokens=arguments.tokens,
            limit_s=arguments.limit,
        )

    for name in rows:
        if SYSTEMS[name].learns:
            write(name, 0)
    for number in range(len(prompts)):
        for name, row in rows.items():
            row.texts.append(write(name, number))


def _locally(
    arguments: argparse.Namespace, target: Path, drafter: LlamaCppDrafter, prompts: Sequence[Sequence[int]]
) -> dict[str, list[Timed]]:
    """Write what needs no network, once for all distances."""
    found: dict[str, list[Timed]] = {}
    if DEVICE_ALONE in arguments.systems:
        found[DEVICE_ALONE] = [
            write_alone(drafter, prompt, policy=policy_of(number), tokens=arguments.tokens)
            for number, prompt in enumerate(prompts)
        ]
    if CO_LOCATED in arguments.systems:
        _pin(arguments.edge_core)
        settings = EdgeSettings(target=str(target), engine="llama.cpp", context=_CONTEXT, threads=1)
        verifier = load_verifier(settings)
        found[CO_LOCATED] = [
            write_together(
                drafter,
                verifier,
                prompt,
                policy=policy_of(number),
                tokens=arguments.tokens,
                length=DRAFT,
                limit_s=arguments.limit,
            )
            for number, prompt in enumerate(prompts)
        ]
        _pin(arguments.device_core)
    return found


@contextmanager
def _device(port: int, drafter: LlamaCppDrafter, name: str, rtt_ms: float, mbit_s: float) -> Iterator[RemoteDevice]:
    with (
        Line(port, round_trip_ms=rtt_ms, mbit_s=mbit_s) as line,
        RemoteDevice(line, FLEET, drafter, name=name, full_up=SYSTEMS[name].full_up) as device,
    ):
        yield device


@contextmanager
def _edge(arguments: argparse.Namespace, target: Path, port: int, form: Form) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            "--fleet", FLEET, "--port", str(port), "--target", str(target), "--engine", "llama.cpp",
            "--context", str(_CONTEXT), "--threads", "1", "--form", form.value, "--prefix-sharing", "off",
            "--db", f"sqlite:///{folder}/log.sqlite3", "--spool", f"{folder}/spool",
        ]  # fmt: skip
        _pin(arguments.edge_core)  # a process that is started runs where its parent does
        with ExitStack() as stack:
            stack.enter_context(edge_process(flags))
            _pin(arguments.device_core)
            yield


def _pin(core: int) -> None:
    os.sched_setaffinity(0, {core})


def _tell(rows: Sequence[Row], rtt_ms: float, mbit_s: float) -> None:
    here = [row for row in rows if (row.rtt_ms, row.mbit_s) == (rtt_ms, mbit_s)]
    if not here:
        print(f"round trip {rtt_ms:g} ms, {mbit_s:g} Mbit/s: too narrow for what was asked for", flush=True)
        return
    head = f"cost {here[0].cost}, draft {here[0].draft}, round trip {rtt_ms:g} ms, {mbit_s:g} Mbit/s"
    print(f"{head:<58} tokens/s  first token, ms  up, B/token  down, B/token")
    for row in here:
        row.sum_up()
        print(
            f"  {row.system:<56} {row.tokens_per_s:8.1f}  {row.ttft_ms:15.0f}  {row.uplink_bytes_per_token:11.1f}"
            f"  {row.downlink_bytes_per_token:13.1f}"
        )
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

"""Cells: one system, draft model, cost of the target and load; and the place that they are measured at."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import psutil

from benchmarks.capacity.arrivals import Arrival, Arrivals
from benchmarks.capacity.devices import Devices
from benchmarks.capacity.local_process import CELLS, KV_BYTES
from benchmarks.capacity.rows import Row
from benchmarks.capacity.systems import DRAFT, FREE, RAW, THROUGH_BROKER
from benchmarks.capacity.timing import Timing
from benchmarks.shared.processes import BenchError, Cores
from benchmarks.shared.recordings import Recording
from broker_config.broker import Broker
from broker_config.processes.runner import MosquittoProcess
from dssd.downlink import Form
from fleet_cli.edge.advise.service_level import Client, Window
from fleet_device.drafters.gguf import GgufModel
from fleet_device.pacing.contract import Pacing
from tests.support.edge_process import edge_process
from tests.support.relay import Relay

__all__ = ["Cell", "Place", "in_process"]

FLEET: Final = "capacity"
# What we set for our own processes: whoever runs the library alone does not.
_OURS: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_LOAD_S: Final = 120.0
_LEARNING: Final = 2
_LEARNING_TOKENS: Final = 24
"""Tokens that a device which chooses has had before it counts, and how many times as long is waited for them."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What is measured at once.

    Attributes:
        system: Its name.
        draft: The draft model's, empty where there is none.
        cost: How many times the target costs what the demo's does.
        devices: That write at the same time.
        arrivals: How they ask.
    """

    system: str
    draft: str
    cost: int
    devices: int
    arrivals: Arrivals


@dataclass(frozen=True, slots=True)
class _Served:
    """An edge and the line to it.

    Attributes:
        port: Where the line begins.
        edge: Process.
        broker: Process.
    """

    port: int
    edge: psutil.Process
    broker: psutil.Process


class Place(AbstractContextManager["Place"]):
    """An edge with a broker and a line for each form of answers, started when they are first needed.

    Args:
        target: GGUF.
        models: Folder of the draft models.
        codec: Over the target's vocabulary.
        cores: Who runs where; this process is on those of the others already.
        round_trip_ms: Between devices and broker.
        mbit_s: Width of each device's line, each way; 0 is none.
        timing: How long a cell takes.
        pause_s: Mean pause of Poisson arrivals.
        seed: Of these.
        stable_rows: Whether the edge's texts repeat.
    """

    def __init__(
        self,
        target: Path,
        models: Path,
        codec: GgufModel,
        *,
        cores: Cores,
        round_trip_ms: float,
        mbit_s: float,
        timing: Timing,
        pause_s: float,
        seed: int,
        stable_rows: bool,
    ) -> None:
        self._target = target
        self._models = models
        self._codec = codec
        self._cores = cores
        self._round_trip_ms = round_trip_ms
        self._mbit_s = mbit_s
        self._timing = timing
        self._pause_s = pause_s
        self._seed = seed
        self._stable_rows = stable_rows
        self._served: dict[Form, _Served] = {}
        self._pacings: dict[tuple[str, str], list[Pacing]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def measure(self, cell: Cell, recording: Recording) -> Row:
        """Measure a cell.

        Args:
            cell: Over this place's target.
            recording: What its devices replay, or the prompts of its clients.
        """
        row = Row(cell.system, cell.draft, cell.cost, cell.devices, self._round_trip_ms, self._mbit_s, cell.arrivals)
        if cell.system in THROUGH_BROKER:
            self._through_broker(row, recording)
        else:
            self._locally(row, recording)
        return row

    def _through_broker(self, row: Row, recording: Recording) -> None:
        system = THROUGH_BROKER[row.system]
        served = self._serving(system.form)
        # Devices live longer than a cell: those that choose have learnt in the cells before.
        pacings = self._pacings.setdefault((row.system, row.draft), [])
        pacings += [system.pacing() for _ in range(row.devices - len(pacings))]
        load = (psutil.Process(), served.broker)
        marks: list[tuple[float, float]] = []

        def mark() -> None:
            marks.append((_cpu_s(served.edge), sum(map(_cpu_s, load))))

        with Devices(
            served.port,
            FLEET,
            self._codec,
            self._codec.vocabulary,
            token_s=recording.token_s,
            draft=recording.draft,
            pacings=pacings[: row.devices],
            mode=system.mode,
            replayed=row.system != FREE,
        ) as devices:
            arrivals = [
                Arrival.of(number, recording.texts, row.arrivals, pause_s=self._pause_s, seed=self._seed)
                for number in range(row.devices)
            ]
            timing = self._timing
            if system.learns:
                timing = replace(timing, patience_s=_LEARNING * timing.patience_s, tokens=_LEARNING_TOKENS)
            found = devices.measure(arrivals, timing, on_window=mark)
        row.count(found.clients, found.window)
        row.edge_cpu, row.load_cpu = (
            (after - before) / found.window.seconds for before, after in zip(*marks, strict=True)
        )
        row.uplink_bytes_per_token, row.downlink_bytes_per_token = found.bytes_per_token()
        row.acceptance = found.share(lambda c: c.accepted, lambda c: c.tested)
        tokens = sum(len(each.tokens) for each in found.generations)
        drafts = sum(each.drafts for each in found.generations)
        row.streamed = sum(each.counters.streamed for each in found.generations) / tokens if tokens else None
        row.mean_draft = sum(each.counters.drafted for each in found.generations) / drafts if drafts else None
        if row.system != FREE and found.as_recorded:
            row.as_recorded = sum(found.as_recorded) / len(found.as_recorded)
        row.text_tokens = tokens / len(found.generations) if found.generations else None
        row.draft_token_ms = 1e3 * recording.token_s if row.draft else None
        row.failed = dict(found.failed)

    def _locally(self, row: Row, recording: Recording) -> None:
        asked = {
            "target": str(self._target),
            "draft": None if row.system == RAW else str(self._models / f"{row.draft}.gguf"),
            "length": DRAFT,
            "devices": row.devices,
            "threads": len(self._cores.edge),
            "arrivals": row.arrivals,
            "pause_s": self._pause_s,
            "seed": self._seed,
            "timing": asdict(self._timing),
            "prompts": [
                {"tokens": text.prompt, "policy": text.policy.model_dump(mode="json"), "most": len(text.tokens)}
                for text in recording.texts
            ],
        }
        answer = in_process(asked, self._cores)
        clients = [Client.from_json(each) for each in answer["clients"]]
        row.count(clients, Window(answer["begin"], answer["end"]), travel_s=self._round_trip_ms / 1e3)

    def _serving(self, form: Form) -> _Served:
        if form not in self._served:
            broker = self._stack.enter_context(MosquittoProcess(Broker(fleet=FLEET)))
            edge = self._stack.enter_context(self._edge(broker.port, form))
            relay = self._stack.enter_context(
                Relay(broker.port, round_trip_s=self._round_trip_ms / 1e3, bytes_per_s=self._mbit_s * 1e6 / 8)
            )
            self._served[form] = _Served(relay.port, psutil.Process(edge), psutil.Process(broker.pid))
        return self._served[form]

    @contextmanager
    def _edge(self, port: int, form: Form) -> Iterator[int]:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            flags = [
                "--fleet", FLEET, "--port", str(port), "--target", str(self._target),
                "--engine", "llama.cpp", "--context", str(CELLS - 1), "--kv-bytes", str(KV_BYTES),
                "--threads", str(len(self._cores.edge)), "--form", form.value, "--prefix-sharing", "off",
                "--stable-rows" if self._stable_rows else "--no-stable-rows",
                "--db", f"sqlite:///{folder}/log.sqlite3", "--spool", f"{folder}/spool",
            ]  # fmt: skip
            with _on(self._cores.edge):
                process = stack.enter_context(edge_process(flags))
            yield process.pid


def in_process(asked: dict[str, Any], cores: Cores) -> dict[str, Any]:
    """Run the local process on the edge's cores; return its answer.

    Raises:
        BenchError: It has failed, or takes for ever.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _OURS or asked["draft"] is not None}
    timing = asked["timing"]
    with _on(cores.edge):
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.capacity.local_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=kept,
        )
    try:
        said, _ = process.communicate(json.dumps(asked), timeout=_LOAD_S + sum(timing.values()) + asked["devices"])
    except subprocess.TimeoutExpired:
        raise BenchError("The engine alone has not ended in time; measure fewer --devices.") from None
    finally:
        process.kill()
    if process.returncode:
        raise BenchError("The engine alone has failed, most likely for want of memory: measure fewer --devices.")
    answer: dict[str, Any] = json.loads(said)
    return answer


@contextmanager
def _on(cores: Sequence[int] | frozenset[int]) -> Iterator[None]:
    """Start processes on these cores: a child has its parent's."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)

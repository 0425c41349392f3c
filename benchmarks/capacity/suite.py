"""Capacity: devices that an edge holds at a service level, and its tokens a second, by each system.

The edge has half of the cores for itself; devices, line and broker have the others. Devices replay drafts that were
recorded on this machine, each at the draft model's own pace as on a processor of its own, in the mode that they were
recorded in, so that they are accepted as the model itself would be; a text that departs from the recorded one ends
there. Devices that choose their plan write in coupled mode, since a residual text depends on where drafts begin, and
so does edge-only decoding: the same texts, both at the price of rows that repeat. The other systems do not pay it, nor
does edge-only decoding in residual mode (edge-only-residual). Raw llama.cpp, which needs no network, has the
edge's cores, the same prompts and as many clients. Prompts are not shared. Each
client writes text after text; a cell is counted from when all have had a token, and those that choose their plan 24. A
target of several times the cost has blocks that compute and change nothing. Takes 14 minutes with `--costs 1 --seconds
8 --minutes 25`.
"""

import argparse
import itertools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from types import MappingProxyType, TracebackType
from typing import Any, Final, Self

import psutil

from benchmarks.capacity.service_level import LEVEL, Client, TimeWindow
from benchmarks.capacity.serving import CELLS, KV_BYTES, CellTiming, Devices, texts_of
from benchmarks.harness import Bench, SuiteReport, add_curve, add_engine, cpu_s, table
from benchmarks.processes import BenchError, Cores
from benchmarks.recordings import Recording, record, record_residual
from benchmarks.systems import DRAFT, SYSTEMS, System
from fleet_admin.models.prompts import built_in, some
from fleet_device.drafters.model_file import GgufModel
from fleet_device.pacing.contract import Pacing
from sampling.downlink import FormName
from schemas.policy import Mode
from tests.support.processes import on_cores
from tests.support.relay import Relay

_EACH: Final = 4  # prompts of each category
_OVERHEAD_S: Final = 3.0  # of a cell, in addition to what is counted
# What we set for our own processes: a user who runs the library alone does not.
_OURS: Final = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_LOAD_S: Final = 120.0
_LEARNING: Final = 2
_LEARNING_TOKENS: Final = 24
"""Tokens that a choosing device receives before it is counted, within `_LEARNING` times the usual wait."""

_LOAD_LIMIT: Final = 0.85
"""Cores: devices and line are one process of Python, which computes on one core at a time."""

RAW: Final = "raw-engine"

_EDGE_ONLY: Final = "edge-only"
_EDGE_DRAFT: Final = "edge-draft"
_EDGE_DRAFT_MODEL: Final = "Q4_0.gguf"
FREE: Final = "edge-only-residual"
"""Edge-only decoding in residual mode: not the recorded outputs, and no batch invariance."""

THROUGH_BROKER: Final[Mapping[str, System]] = MappingProxyType(
    {
        name: replace(system, mode=Mode.COUPLED) if system.learns or name in (_EDGE_ONLY, _EDGE_DRAFT) else system
        for name, system in {
            FREE: SYSTEMS[_EDGE_ONLY],
            _EDGE_DRAFT: replace(SYSTEMS[_EDGE_ONLY], edge_drafts=True),
            **SYSTEMS,
        }.items()
    }
)
"""Systems with a device.

A residual output depends on where drafts begin, so it cannot be replayed if the plan is chosen; a coupled one can.
Edge-only decoding is coupled as well: the same outputs, also with batch invariance.
"""

_ALL: Final = (RAW, *THROUGH_BROKER)

_STANDARD: Final = (_EDGE_ONLY, FREE, _EDGE_DRAFT, RAW, "dssd-dense", "ours-auto")
"""Measured by default."""


def replays_residual(system: str) -> bool:
    """Return whether its devices replay drafts that were recorded in residual mode."""
    return drafts(system) and system in THROUGH_BROKER and THROUGH_BROKER[system].mode is Mode.RESIDUAL


def drafts(system: str) -> bool:
    return system not in (RAW, _EDGE_ONLY, _EDGE_DRAFT, FREE)


@dataclass(frozen=True, slots=True)
class CapacityCell:
    system: str
    draft: str
    cost: int
    devices: int


@dataclass(slots=True)
class Row:
    """One system in one cell.

    Attributes:
        cost: Cost of the target, as a multiple of the demo's.
        tokens_per_s: Committed in the window by all devices.
        ttft_ms: Time to the first token: the median over requests, including waiting ones.
        clients_at_level: Devices that got the service level.
        pace: Tokens per second during requests: the median over devices.
        gap_p95_ms: Time between tokens at the 95th percentile: the median over devices.
        acceptance: Accepted share of tested draft tokens.
        edge_only: Share of tokens from edge-only decoding.
        as_recorded: Share of complete outputs that equal the recorded ones.
        text_tokens: Mean length of outputs, including cut-off ones.
        edge_cpu: Cores used by the edge.
        load_cpu: Cores used by devices, line and broker.
        failed: Failed requests by reason.
    """

    system: str
    draft: str
    cost: int
    devices: int
    rtt_ms: float
    tokens_per_s: float = 0.0
    ttft_ms: float = 0.0
    clients_at_level: int = 0
    pace: float = 0.0
    gap_p95_ms: float | None = None
    uplink_bytes_per_token: float = 0.0
    downlink_bytes_per_token: float = 0.0
    acceptance: float | None = None
    edge_only: float | None = None
    mean_draft: float | None = None
    as_recorded: float | None = None
    text_tokens: float | None = None
    draft_token_ms: float | None = None
    edge_cpu: float | None = None
    load_cpu: float | None = None
    window_s: float = 0.0
    failed: dict[str, int] = field(default_factory=dict)

    @property
    def load_bound(self) -> bool:
        """Return whether devices and line took nearly all that one process can: the edge might have done more."""
        return self.load_cpu is not None and self.load_cpu > _LOAD_LIMIT

    def count(self, clients: Sequence[Client], window: TimeWindow, *, travel_s: float = 0.0) -> None:
        self.window_s = window.seconds
        self.tokens_per_s = sum(client.tokens(window) for client in clients) / window.seconds
        waits = [text.first_s(window.end) for client in clients for text in client.texts if text.asked_at < window.end]
        self.ttft_ms = 1e3 * (median(waits) + travel_s) if waits else 0.0
        self.clients_at_level = sum(client.at_level(window) for client in clients)
        self.pace = median(client.pace(window) for client in clients)
        gaps = [gap for client in clients if (gap := client.gap_s(window)) is not None]
        self.gap_p95_ms = 1e3 * median(gaps) if gaps else None

    def json(self) -> dict[str, Any]:
        return {**asdict(self), "load_bound": self.load_bound}


def add_options(parser: argparse.ArgumentParser) -> None:
    add_engine(parser)
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 4, 16, 64], metavar="N")
    parser.add_argument("--drafts", nargs="+", default=["Q4_0", "Q4_1"], help="quantizations (default: %(default)s)")
    parser.add_argument("--costs", nargs="+", type=int, default=[1, 8], metavar="N")
    parser.add_argument("--systems", nargs="+", choices=_ALL, default=list(_STANDARD), metavar="SYSTEM")
    parser.add_argument("--round-trip", type=float, default=20.0, metavar="MS", help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=96, help="of each text, at most (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="counted in each cell (default: %(default)s)")
    parser.add_argument("--settle", type=float, default=1.0, metavar="S", help="before that (default: %(default)s)")
    parser.add_argument(
        "--patience", type=float, default=8.0, metavar="S", help="for first tokens, and 0.3 a device (default: 8)"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="cells beyond are left out (default: 10)")
    add_curve(parser)


def run(bench: Bench) -> SuiteReport:
    options, rows = bench.options, list[Row]()
    grid = list(cells(options))
    logging.getLogger("fleet_device").setLevel(logging.ERROR)  # that an edge is overloaded is what is measured
    deadline = time.monotonic() + 60.0 * options.minutes
    with on_cores(bench.cores.edge | bench.cores.others):
        # Recorded with all cores: a model with more threads than cores is slow.
        recordings = {draft: _recordings(bench, draft, grid) for draft in options.drafts}
    _measure(bench, grid, recordings, rows, deadline)
    show_levels(rows)
    if len(rows) < len(grid):
        print(f"{len(grid) - len(rows)} of {len(grid)} cells were left out: {options.minutes:g} minutes are over.")
    settings = {
        "edge_cores": len(bench.cores.edge),
        "apart": bench.cores.apart,
        "seconds": options.seconds,
        "tokens": options.tokens,
        "draft_length_where_fixed": DRAFT,
    }
    return SuiteReport([row.json() for row in rows], more={"settings": settings})


def cells(options: argparse.Namespace) -> Iterator[CapacityCell]:
    """Return the cells in order: systems of one place are adjacent, so that a disturbance affects all of them."""
    for cost, devices in itertools.product(options.costs, options.devices):
        for number, draft in enumerate(options.drafts):
            for system in options.systems:
                if drafts(system):
                    yield CapacityCell(system, draft, cost, devices)
                elif number == 0:
                    yield CapacityCell(system, "", cost, devices)


def _measure(
    bench: Bench,
    grid: Sequence[CapacityCell],
    recordings: Mapping[str, Mapping[Mode, Recording]],
    rows: list[Row],
    deadline: float,
) -> None:
    options = bench.options
    timing = CellTiming(options.seconds, options.settle, options.patience)
    print(f"{len(grid)} cells of {timing.seconds:g} s, on {len(bench.cores.edge)} cores for the edge", flush=True)
    for cost, here in itertools.groupby(grid, key=lambda cell: cell.cost):
        with (
            closing(GgufModel(bench.target(cost), vocabulary_only=True)) as codec,
            Place(bench, bench.target(cost), codec, timing) as place,
        ):
            for cell in here:
                longest = timing.patience_of(cell.devices) + timing.settle_s + timing.seconds + _OVERHEAD_S
                if time.monotonic() + longest > deadline:
                    return
                found = recordings[cell.draft or options.drafts[0]]
                mode = Mode.RESIDUAL if replays_residual(cell.system) else Mode.COUPLED
                row = place.measure(cell, found[mode])
                rows.append(row)
                print(
                    f"{row.system} {row.draft} cost {row.cost}, {row.devices} devices: "
                    f"{row.tokens_per_s:.1f} tokens/s, {row.clients_at_level} at the level",
                    flush=True,
                )


def _recordings(bench: Bench, draft: str, grid: Sequence[CapacityCell]) -> dict[Mode, Recording]:
    options, prompts = bench.options, some(built_in(), _EACH)
    coupled = record(bench, draft, prompts, tokens=options.tokens)
    found = {Mode.COUPLED: coupled}
    if any(replays_residual(cell.system) for cell in grid):
        found[Mode.RESIDUAL] = record_residual(bench, coupled, prompts, length=DRAFT, tokens=options.tokens)
    return found


@dataclass(frozen=True, slots=True)
class _Served:
    """An edge, and the port at which the line to it begins."""

    port: int
    edge: psutil.Process
    broker: psutil.Process


class Place(AbstractContextManager["Place"]):
    """An edge with a broker and a line for each form of answers, with or without a draft model, started when needed."""

    def __init__(self, bench: Bench, target: Path, codec: GgufModel, timing: CellTiming) -> None:
        self._bench = bench
        self._target = target
        self._codec = codec
        self._timing = timing
        self._served: dict[tuple[FormName, bool], _Served] = {}
        self._pacings: dict[tuple[str, str], list[Pacing]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def measure(self, cell: CapacityCell, recording: Recording) -> Row:
        round_trip_ms = self._bench.options.round_trip
        row = Row(cell.system, cell.draft, cell.cost, cell.devices, round_trip_ms)
        if cell.system in THROUGH_BROKER:
            self._through_broker(row, recording)
        else:
            self._raw(row, recording)
        return row

    def _through_broker(self, row: Row, recording: Recording) -> None:
        system = THROUGH_BROKER[row.system]
        served = self._serving(system.form, edge_drafts=system.edge_drafts)
        # Devices outlive a cell: those that choose have learned in earlier cells.
        pacings = self._pacings.setdefault((row.system, row.draft), [])
        pacings += [system.pacing() for _ in range(row.devices - len(pacings))]
        load = (psutil.Process(), served.broker)
        marks: list[tuple[float, float]] = []

        def mark() -> None:
            marks.append((cpu_s(served.edge), sum(map(cpu_s, load))))

        codec, vocabulary = self._codec, self._codec.vocabulary
        sizes: dict[str, Any] = {"devices": row.devices, "token_s": recording.token_s, "draft": recording.draft}
        with Devices(served.port, self._bench.fleet, codec, vocabulary, **sizes) as devices:
            devices.pace(pacings[: row.devices])
            texts = [texts_of(number, recording.texts) for number in range(row.devices)]
            timing = self._timing
            if system.learns:
                timing = replace(timing, patience_s=_LEARNING * timing.patience_s, tokens=_LEARNING_TOKENS)
            own: dict[str, Any] = {"mode": system.mode, "replayed": row.system != FREE}
            found = devices.measure(texts, timing, **own, on_window=mark)
        row.count(found.clients, found.window)
        row.edge_cpu, row.load_cpu = (
            (after - before) / found.window.seconds for before, after in zip(*marks, strict=True)
        )
        row.uplink_bytes_per_token, row.downlink_bytes_per_token = found.bytes_per_token()
        tested = sum(each.counters.tested for each in found.generations)
        row.acceptance = sum(each.counters.accepted for each in found.generations) / tested if tested else None
        tokens = sum(len(each.tokens) for each in found.generations)
        drafts = sum(each.drafts for each in found.generations)
        row.edge_only = sum(each.counters.edge_only for each in found.generations) / tokens if tokens else None
        row.mean_draft = sum(each.counters.drafted for each in found.generations) / drafts if drafts else None
        if row.system != FREE and found.as_recorded:
            row.as_recorded = sum(found.as_recorded) / len(found.as_recorded)
        row.text_tokens = tokens / len(found.generations) if found.generations else None
        row.draft_token_ms = 1e3 * recording.token_s if row.draft else None
        row.failed = dict(found.failed)

    def _raw(self, row: Row, recording: Recording) -> None:
        asked = {
            "target": str(self._target),
            "devices": row.devices,
            "threads": len(self._bench.cores.edge),
            "timing": asdict(self._timing),
            "prompts": [
                {"tokens": text.prompt, "policy": text.policy.model_dump(mode="json"), "most": len(text.tokens)}
                for text in recording.texts
            ],
        }
        answer = in_process(asked, self._bench.cores)
        clients = [Client.from_json(each) for each in answer["clients"]]
        row.count(clients, TimeWindow(answer["begin"], answer["end"]), travel_s=self._bench.options.round_trip / 1e3)

    def _serving(self, form: FormName, *, edge_drafts: bool) -> _Served:
        if (form, edge_drafts) not in self._served:
            options = self._bench.options
            broker = self._stack.enter_context(self._bench.broker())
            size: dict[str, Any] = {"context": CELLS - 1, "kv_bytes": KV_BYTES}
            if edge_drafts:
                size["edge_draft"] = str(self._bench.model(_EDGE_DRAFT_MODEL))
            served = self._bench.edge(broker.port, self._target, form=form.value, prefix_sharing="off", **size)
            edge = self._stack.enter_context(served)
            line = Relay(broker.port, round_trip_s=options.round_trip / 1e3)
            port = self._stack.enter_context(line).port
            self._served[form, edge_drafts] = _Served(port, psutil.Process(edge.pid), psutil.Process(broker.pid))
        return self._served[form, edge_drafts]


def in_process(asked: dict[str, Any], cores: Cores) -> dict[str, Any]:
    kept = {name: value for name, value in os.environ.items() if name not in _OURS}
    timing = asked["timing"]
    with on_cores(cores.edge):
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


def show_levels(rows: Sequence[Row]) -> None:
    """Print the clients at the service level and all tokens per second, by system."""
    print(
        f"Clients at a service level (each at least {LEVEL.tokens_per_s:g} tokens/s, 95 % of the waits between tokens "
        f"within {LEVEL.gap_s * 1e3:.0f} ms), and tokens/s of all:"
    )
    kinds = sorted({(row.cost, row.draft) for row in rows if row.draft})
    plain = {(row.cost, "") for row in rows} - {(cost, "") for cost, _ in kinds}
    for cost, draft in [*kinds, *sorted(plain)]:
        here = [row for row in rows if row.cost == cost and row.draft in (draft, "")]
        loads = [str(load) for load in sorted({row.devices for row in here})]
        by_system: dict[str, dict[str, str]] = {}
        for row in here:
            level = f"{row.clients_at_level} ({row.tokens_per_s:.1f}/s){'*' * row.load_bound}"
            by_system.setdefault(row.system, {"system": row.system})[str(row.devices)] = level
        title = f"target of {cost} times the cost, draft {draft or '-'}, round trip {here[0].rtt_ms:g} ms"
        table(list(by_system.values()), {"system": "", **dict.fromkeys(loads, ">")}, title=title)
    if any(row.load_bound for row in rows):
        print(f"* Devices and line took more than {_LOAD_LIMIT:g} cores: the edge might have done more.")

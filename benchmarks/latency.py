"""Latency: tokens a second of one device over distance and width of the line, by each system.

Live models, a real edge on a core of its own, a real mosquitto, and a relay that delays and narrows the line. Device
and draft model have another core. All systems write the same prompts in turn, so that whatever else the machine does
hits all of them alike. A device that chooses its plan has written one text before at each place, which is not counted.
Texts are counted from their first tokens to their last; the time to the first is printed too. Takes 15 minutes, and 9
with `--outputs 1 --tokens 40`.
"""

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.harness import Bench, SuiteReport, add_curve, add_engine, link_to, table
from benchmarks.recordings import policy_of
from benchmarks.systems import SYSTEMS
from fleet_admin.models.prompts import built_in, some
from fleet_device.client.agent import Agent
from fleet_device.drafters.llama_cpp import LlamaCppDrafter, LlamaCppSettings
from fleet_device.pacing.contract import FixedPacing, Pacing
from fleet_device.requests.chat import chat_prompt
from fleet_device.requests.generate import GenerateRequest, RequestContext
from fleet_device.requests.structured import ChatMessage
from schemas.policy import SamplingPolicy
from tests.support.relay import Relay

_CONTEXT: Final = 1023
_START_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Timed:
    """One output: seconds to its first tokens, from there to the last, tokens in that time, and payload bytes."""

    text: tuple[int, ...]
    first_s: float
    seconds: float
    after: int
    up_bytes: int = 0
    down_bytes: int = 0


@dataclass(slots=True)
class LatencyRow:
    """One system at one place; medians over outputs."""

    system: str
    draft: str
    cost: int
    rtt_ms: float
    mbit_s: float
    tokens_per_s: float = 0.0
    ttft_ms: float = 0.0
    uplink_bytes_per_token: float = 0.0
    downlink_bytes_per_token: float = 0.0
    texts: list[Timed] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        tokens = sum(len(each.text) for each in self.texts)
        self.tokens_per_s = median(each.after / each.seconds if each.seconds else 0.0 for each in self.texts)
        self.ttft_ms = median(each.first_s for each in self.texts) * 1e3
        self.uplink_bytes_per_token = sum(each.up_bytes for each in self.texts) / tokens
        self.downlink_bytes_per_token = sum(each.down_bytes for each in self.texts) / tokens
        return {name: value for name, value in asdict(self).items() if name != "texts"} | {"devices": 1}


def add_options(parser: argparse.ArgumentParser) -> None:
    add_engine(parser)
    parser.add_argument("--drafts", nargs="+", default=["Q4_0"], help="quantizations (default: %(default)s)")
    parser.add_argument("--costs", nargs="+", type=int, default=[1, 8], metavar="N")
    parser.add_argument("--round-trips", nargs="+", type=float, default=[0, 20, 50, 100, 200], metavar="MS")
    parser.add_argument("--mbit", type=float, default=10.0, help="where the distance varies (default: %(default)s)")
    parser.add_argument("--widths", nargs="*", type=float, default=[0.1, 1.0], metavar="MBIT", help="at 50 ms")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), metavar="SYSTEM")
    parser.add_argument("--outputs", type=int, default=2, help="of each system at each place (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="of each text, at most (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=6.0, metavar="S", help="a text ends there")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw the figures")
    add_curve(parser)


def run(bench: Bench) -> SuiteReport:
    cores = sorted(bench.cores.edge | bench.cores.others)
    edge_core, device_core = cores[0], cores[-1]
    rows: list[dict[str, Any]] = []
    os.sched_setaffinity(0, {device_core})
    for cost in bench.options.costs:
        for draft in bench.options.drafts:
            rows += _measure(bench, cost, draft, edge_core, device_core)
    if bench.options.picture:
        _draw(rows).savefig(bench.options.picture, dpi=120)
    return SuiteReport(rows)


def _measure(bench: Bench, cost: int, draft: str, edge_core: int, device_core: int) -> list[dict[str, Any]]:
    options, target = bench.options, bench.target(cost)
    places = [(rtt, options.mbit) for rtt in options.round_trips] + [(50.0, width) for width in options.widths]
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        drafter = stack.enter_context(
            closing(LlamaCppDrafter(LlamaCppSettings(path=bench.model(f"{draft}.gguf"), threads=1)))
        )
        asked = some(built_in(), 1)[: options.outputs]
        prompts = [tuple(chat_prompt(drafter.codec, [ChatMessage("user", prompt.text)]).tokens) for prompt in asked]
        os.sched_setaffinity(0, {edge_core})
        ports = {}
        for form in {SYSTEMS[name].form for name in options.systems}:
            ports[form] = stack.enter_context(bench.broker()).port
            settings: dict[str, Any] = {"context": _CONTEXT, "threads": 1, "form": form.value, "prefix_sharing": "off"}
            stack.enter_context(bench.edge(ports[form], target, **settings))
        os.sched_setaffinity(0, {device_core})
        pacings = {name: system.pacing() for name, system in SYSTEMS.items()}
        for rtt_ms, mbit_s in places:
            found = {name: LatencyRow(name, draft, cost, rtt_ms, mbit_s) for name in options.systems}
            with ExitStack() as place:
                devices = {
                    name: place.enter_context(_device(bench, ports[SYSTEMS[name].form], drafter, name, rtt_ms, mbit_s))
                    for name in found
                }
                _write_all(bench, devices, pacings, found, prompts)
            figures = [row.json() for row in found.values()]
            title = f"cost {cost}, draft {draft}, round trip {rtt_ms:g} ms, {mbit_s:g} Mbit/s"
            per_token = {"uplink_bytes_per_token": ".1f", "downlink_bytes_per_token": ".1f"}
            table(figures, {"system": "", "tokens_per_s": ".1f", "ttft_ms": ".0f", **per_token}, title=title)
            rows += figures
    return rows


def _write_all(
    bench: Bench,
    devices: Mapping[str, "_RemoteDevice"],
    pacings: Mapping[str, Pacing],
    rows: Mapping[str, LatencyRow],
    prompts: Sequence[Sequence[int]],
) -> None:
    def write(name: str, number: int) -> Timed:
        policy = policy_of(number).model_copy(update={"mode": SYSTEMS[name].mode})
        limits = {"tokens": bench.options.tokens, "limit_s": bench.options.limit}
        return devices[name].write(pacings[name], prompts[number], policy=policy, **limits)

    for name in rows:
        if SYSTEMS[name].learns:
            write(name, 0)
    for number in range(len(prompts)):
        for name, row in rows.items():
            row.texts.append(write(name, number))


class _RemoteDevice:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def write(
        self, pacing: Pacing, prompt: Sequence[int], *, policy: SamplingPolicy, tokens: int, limit_s: float
    ) -> Timed:
        """Run a request; it is cut off after `limit_s` seconds."""
        pieces: list[tuple[float, int]] = []
        self._agent.pacing = pacing
        started = time.monotonic()

        def take(new: Sequence[int]) -> bool:
            pieces.append((time.monotonic(), len(new)))
            return time.monotonic() - started > limit_s

        done = self._agent.generate(
            GenerateRequest(tuple(prompt), policy=policy, max_new_tokens=tokens), RequestContext(on_tokens=take)
        )
        (first_at, head), (last_at, _) = pieces[0], pieces[-1]
        return Timed(
            text=done.tokens,
            first_s=first_at - started,
            seconds=last_at - first_at,
            after=len(done.tokens) - head,
            up_bytes=done.counters.uplink_bytes,
            down_bytes=done.counters.downlink_bytes,
        )


@contextmanager
def _device(
    bench: Bench, port: int, drafter: LlamaCppDrafter, name: str, rtt_ms: float, mbit_s: float
) -> Iterator[_RemoteDevice]:
    with Relay(port, round_trip_s=rtt_ms / 1e3, bytes_per_s=mbit_s * 1e6 / 8) as relay:
        link = link_to(relay.port, bench.fleet, name)
        agent = Agent(link, bench.fleet, name, drafter, FixedPacing(), time.monotonic)
        agent.attach()
        link.start(timeout_s=_START_S)
        try:
            yield _RemoteDevice(agent)
        finally:
            link.stop()


def _draw(rows: Sequence[Mapping[str, Any]]) -> Any:  # noqa: ANN401 - matplotlib's
    """Draw tokens per second over distance at the widest line: a panel per cost and draft model, a line per system."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import
    from matplotlib.ticker import LogLocator, NullLocator  # noqa: PLC0415

    figure = Figure(layout="constrained")
    panels = sorted({(row["cost"], row["draft"]) for row in rows})
    width = max(row["mbit_s"] for row in rows)
    figure.set_size_inches(4.8 * len(panels) + 1.8, 4.2)
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        here = [row for row in rows if (row["cost"], row["draft"], row["mbit_s"]) == (*panel, width)]
        for system in dict.fromkeys(row["system"] for row in rows):
            points = sorted((row["rtt_ms"], row["tokens_per_s"]) for row in here if row["system"] == system)
            if points:
                width_of_line = 3 if system == "ours-auto" else 1.5
                axes.plot(*zip(*points, strict=True), marker="o", label=system, linewidth=width_of_line)
        axes.set_title(f"target of {panel[0]} times the cost, draft {panel[1]}")
        axes.set_xlabel(f"round trip, ms (line of {width:g} Mbit/s)")
        axes.set_ylabel("tokens a second")
        axes.set_yscale("log")  # ratios are what is claimed
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    return figure

"""Observability benchmark: what the session log, metrics and a dashboard cost an edge, in tokens a second.

Two edges over the same model have one core, in turns: one with a session log in SQLite of every round, metrics that are
scraped each second, and a dashboard within its own process whose pages somebody turns; the other with none of these.
The same devices have the same drafts verified by either; the broker and they have another core. Coupled texts are the
same each time, so that both edges compute the same. Rounds alternate in pairs, and the ratio is the pairs' geometric
mean; their spread says what it is worth.
"""

import argparse
import itertools
import json
import os
import socket
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.shared.conditions import conditions
from benchmarks.shared.ending import ending_cleanly
from benchmarks.shared.fleet_load import FleetLoad
from benchmarks.shared.laws import record_laws
from benchmarks.shared.processes import Cores, Program, on_cores
from benchmarks.shared.viewer import Viewer
from broker_config.broker import Broker
from broker_config.errors import BrokerError
from broker_config.processes.runner import MosquittoProcess
from fleet_admin.dashboard.services import open_services
from fleet_admin.dashboard.settings import DashboardSettings
from fleet_cli.prompts import built_in, some
from fleet_device.drafters.gguf import GgufModel
from fleet_device.pacing.contract import STREAMED, FixedPacing, Pacing
from fleet_runtime.events import Event
from schemas.errors import FleetError
from tests.support.edge_process import edge_process
from tests.support.recorded_drafter import RecordedText

__all__ = ["main"]

FLEET: Final = "observability"
GOAL: Final = 0.97
_DRAFT: Final = 4
_TOKENS: Final = 64
_TEXTS: Final = 6
_SCRAPE_S: Final = 1.0
_PAGES: Final = ("/", "/devices", "/sessions", "/edges", "/usage", "/alerts")
_PAGE_S: Final = 2.0
_START_S: Final = 120.0


@dataclass(slots=True)
class Reader:
    """Asks addresses over and over, on a thread of its own.

    Attributes:
        ask: Asks once.
        every_s: And so often.
        answered: How often it was answered.
    """

    ask: Callable[[], object]
    every_s: float
    answered: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Ask until the context is left."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self.every_s):
            self.ask()
            self.answered += 1


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return 0 if the goal is reached, 1 if not, 2 on errors."""
    parser = argparse.ArgumentParser(prog="benchmarks observability", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--draft", default="Q4_0", help="(default: %(default)s)")
    parser.add_argument("--devices", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=8, help="of rounds, for each plan (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.devices < 1 or arguments.pairs < 2:
        parser.error("there must be a device and two pairs at least")
    cores = Cores.choose(os.sched_getaffinity(0), apart=True)
    try:
        with ending_cleanly(), on_cores(cores.others):
            rows = _measure(arguments, cores)
    except (FleetError, BrokerError) as error:
        print(error, file=sys.stderr)
        return 2
    reached = all(row["ratio"] >= GOAL for row in rows)
    print(f"goal: {GOAL} of the tokens a second without log, metrics and dashboard: {'hit' if reached else 'missed'}")
    if arguments.json:
        report = {**conditions("llama-cpp-python", "sqlalchemy", "starlette", broker=True), "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if reached else 1


def _measure(arguments: argparse.Namespace, cores: Cores) -> list[dict[str, Any]]:
    target = arguments.models / "target-Q8_0.gguf"
    laws = record_laws(
        target,
        arguments.models / f"{arguments.draft}.gguf",
        some(built_in(), -(-_TEXTS // 6)),
        tokens=_TOKENS,
        cache=arguments.models / "recordings",
        on_progress=_say,
    )
    texts = [laws.laws[n % len(laws.laws)].written(n % len(laws.laws)) for n in range(arguments.devices)]
    codec = GgufModel(target, vocabulary_only=True)
    plans: dict[str, Pacing] = {"draft": FixedPacing(_DRAFT), "stream": FixedPacing(STREAMED, stream=True)}
    with closing(codec), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-observability-")))
        brokers = [stack.enter_context(MosquittoProcess(Broker(fleet=FLEET))) for _ in range(2)]
        _say("starting two edges")
        stack.enter_context(_unobserved(brokers[0].port, folder, target, cores))
        readers = stack.enter_context(_observed(brokers[1].port, folder, target, cores))
        without, observed = (
            stack.enter_context(
                FleetLoad(broker.port, FLEET, codec, codec.vocabulary, devices=arguments.devices, token_s=0.0)
            )
            for broker in brokers
        )
        rows = [_compare(plan, pacing, without, observed, texts, arguments.pairs) for plan, pacing in plans.items()]
        for row in rows:
            row |= {f"{name}_answered": reader.answered for name, reader in readers.items()}
    return rows


def _compare(
    plan: str, pacing: Pacing, without: FleetLoad, observed: FleetLoad, texts: Sequence[RecordedText], pairs: int
) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"without": [], "observed": []}
    loads = {"without": without, "observed": observed}
    for load in loads.values():
        load.pace([pacing for _ in texts])
        load.write(texts)  # prompts are computed once
    for number in range(pairs):
        for name in sorted(loads, reverse=bool(number % 2)):
            _say(f"{plan}, pair {number + 1} of {pairs}, {name}")
            rates[name].append(loads[name].write(texts).tokens_per_s)
    logs = np.log(np.array(rates["observed"]) / np.array(rates["without"]))
    ratio, error = float(np.exp(logs.mean())), float(logs.std(ddof=1) / np.sqrt(pairs))
    print(
        f"{plan}: {np.mean(rates['without']):.1f} tokens/s without, {np.mean(rates['observed']):.1f} observed, "
        f"ratio {ratio:.3f} (standard error {error:.3f}, {pairs} pairs)",
        flush=True,
    )
    return {
        "plan": plan,
        "devices": len(texts),
        "tokens_per_s": rates,
        "ratio": ratio,
        "standard_error": error,
        "pairs": pairs,
    }


@contextmanager
def _unobserved(port: int, folder: Path, target: Path, cores: Cores) -> Iterator[None]:
    (folder / "without").mkdir()
    edge = Program(
        "benchmarks.shared.metered_edge",
        [
            "--fleet", FLEET, "--port", str(port), "--folder", str(folder / "without"), "--engine", "llama.cpp",
            "--target", str(target), "--step-ms", "0", "--session-ms", "0", "--threads", str(len(cores.edge)),
            "--no-log",
        ],
        cores=cores.edge,
        log=folder / "without.log",
    )  # fmt: skip
    try:
        edge.wait_for(Event.ONLINE, timeout_s=_START_S)
        yield
    finally:
        edge.end()


@contextmanager
def _observed(port: int, folder: Path, target: Path, cores: Cores) -> Iterator[dict[str, Reader]]:
    db, metrics, dashboard = f"sqlite:///{folder}/log.sqlite3", _free_address(), _free_address()
    settings = folder / "edge.toml"
    settings.write_text(
        f"""fleet = "{FLEET}"
target = "{target.resolve()}"
engine = "llama.cpp"
threads = {len(cores.edge)}
db = "{db}"
spool = "{folder}/spool"
dashboard = "{dashboard}"
[broker]
port = {port}
[metrics]
listen = "{metrics}"
""",
        encoding="utf-8",
    )
    with ExitStack() as stack:
        with on_cores(cores.edge):
            stack.enter_context(edge_process(["--config", str(settings)]))
        viewer = Viewer(f"http://{dashboard}", open_services(DashboardSettings(db=db)))
        paths = itertools.cycle(_PAGES)
        readers = {
            "metrics": Reader(lambda: _scrape(f"http://{metrics}/metrics"), _SCRAPE_S),
            "pages": Reader(lambda: viewer.look(next(paths)), _PAGE_S),
        }
        for reader in readers.values():
            stack.enter_context(reader.reading())
        yield readers


def _scrape(address: str) -> None:
    with urllib.request.urlopen(address) as response:  # noqa: S310 - on loopback
        response.read()


def _free_address() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{one.getsockname()[1]}"


def _say(what: str) -> None:
    print(f"{what} …", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Harness of the benchmarks: what a suite starts, prepares, prints and keeps.

A suite is a module with a docstring (what it compares, in which units, how long it takes), `add_options(parser)` and
`run(bench)`, which returns a `SuiteReport`. The harness parses the options, makes missing models, ends child processes
at Ctrl-C or SIGTERM, prints the goals, and writes JSON where it is asked for.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, Final, TypeVar
from unittest.mock import patch

import psutil

from benchmarks.processes import BenchError, Cores
from broker_config.broker import Broker, BrokerError
from broker_config.mosquitto import installed_version
from broker_config.processes import MosquittoProcess, find_mosquitto
from broker_config.site import make_local_broker
from fleet_admin.models.smollm2 import make_missing
from fleet_common.mqtt.errors import LinkError
from fleet_common.mqtt.paho_link import PahoLink
from fleet_common.mqtt.settings import BrokerSettings
from fleet_device.client.agent import Agent
from fleet_device.drafters.contract import Drafter
from fleet_device.pacing.contract import EDGE_ONLY_TOKENS, FixedPacing, Pacing
from schemas.errors import FleetError
from schemas.names import VERSION
from tests.support.local_broker import LocalBroker
from tests.support.played_steps import CURVE
from tests.support.processes import EDGE_PROGRAM, Program, edge_process, on_cores

MODELS: Final = Path("models/smollm2-135m")
_START_S: Final = 30.0
_GIT_S: Final = 10.0
_PACKAGES: Final = (
    "torch", "transformers", "llama-cpp-python", "llguidance", "paho-mqtt", "cbor2", "numpy", "sqlalchemy", "psycopg",
)  # fmt: skip
_NOTABLE: Final = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimddp", "sve")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class BenchGoal:
    what: str
    value: float
    bound: float
    reached: bool

    def __str__(self) -> str:
        return f"{self.what}: {self.value:,.2f} (goal {self.bound:,g}): {'reached' if self.reached else 'MISSED'}"


def at_most(what: str, value: float, bound: float) -> BenchGoal:
    return BenchGoal(what, value, bound, value <= bound)


def at_least(what: str, value: float, bound: float) -> BenchGoal:
    return BenchGoal(what, value, bound, value >= bound)


@dataclass(slots=True)
class SuiteReport:
    """What a suite found.

    Attributes:
        rows: One for each measurement, as JSON values.
        goals: Printed at the end; the exit code is 1 if one is missed.
        more: Other JSON values to keep.
        wrong: Descriptions of errors; the exit code is 1 if there are any.
    """

    rows: Sequence[Mapping[str, Any]]
    goals: Sequence[BenchGoal] = ()
    more: Mapping[str, Any] = field(default_factory=dict)
    wrong: Sequence[str] = ()

    @property
    def sound(self) -> bool:
        return all(goal.reached for goal in self.goals) and not self.wrong


def run_suite(name: str, suite: Any, words: Sequence[str]) -> int:  # noqa: ANN401 - a module
    """Run a suite; return 0 if its goals are reached, 1 if not, 2 if it cannot be run."""
    parser = argparse.ArgumentParser(
        prog=f"benchmarks {name}", description=suite.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of models (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    suite.add_options(parser)
    options = parser.parse_args(words)
    # Programs get their settings by the environment, which is this process's own again at the end.
    curve = {} if getattr(options, "curve", None) is None else {CURVE: str(options.curve.resolve())}
    try:
        with (
            _ending_cleanly(),
            patch.dict(os.environ, curve),
            tempfile.TemporaryDirectory(prefix="fleet-bench-") as folder,
        ):
            bench = Bench(options, Path(folder), fleet=name.replace(" ", "-"))
            with on_cores(bench.cores.others):
                report = suite.run(bench)
    except (FleetError, BrokerError, LinkError, TimeoutError) as error:
        print(error, file=sys.stderr)
        return 2
    for line in (*report.goals, *report.wrong):
        print(line)
    if options.json:
        settings = {key: str(value) for key, value in vars(options).items() if key != "json"}
        found = {**conditions(), "settings": settings, "goals": [asdict(goal) for goal in report.goals]}
        content = {**found, **report.more, "wrong": list(report.wrong), "rows": list(report.rows)}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0 if report.sound else 1


def number_of(kind: type[int] | type[float], least: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more")
        return value

    return parse


def say(what: str) -> None:
    """Report progress on standard error."""
    print(f"{what} …", file=sys.stderr, flush=True)


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], *, title: str = "") -> None:
    """Print rows; a missing value, or None, is printed as "-".

    `columns` has the format by name of the value, such as `.1f`; the name, with blanks for underscores, is the head.
    """
    cells = [[name.replace("_", " ") for name in columns]]
    for row in rows:
        values = [row.get(name) for name in columns]
        cells.append(
            [
                "-" if value is None else format(value, form)
                for value, form in zip(values, columns.values(), strict=True)
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = [not form for form in columns.values()]
    if title:
        print(title)
    for line in cells:
        padded = [cell.ljust(w) if text else cell.rjust(w) for cell, w, text in zip(line, widths, left, strict=True)]
        print("  ".join(padded).rstrip())
    sys.stdout.flush()


@dataclass(frozen=True, slots=True)
class ServedEdge:
    """A running edge: its process, and the URL of its session log."""

    pid: int
    log: str


@dataclass(frozen=True, slots=True)
class ServedDevice:
    """A running device: its process, and the URL of its API."""

    pid: int
    url: str


ENGINES: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {name: {"engine": name} for name in ("blocks", "llama.cpp", "torch")}
)
"""Settings of an edge by the names that suites give its engines."""


def add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=("blocks", "llama.cpp"), default="blocks", help="(default: %(default)s)")


def add_curve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--curve", type=Path, metavar="FILE", help="play step times of another target, as in fleet_admin/curves"
    )


class Bench:
    def __init__(self, options: argparse.Namespace, folder: Path, *, fleet: str) -> None:
        self.options = options
        self.folder = folder
        self.fleet = fleet
        self.cores = Cores.choose(os.sched_getaffinity(0))
        self._folders = 0

    def share_cores(self) -> None:
        """Let the edge and all other programs use all cores: simulated devices only wait."""
        cores = self.cores.edge | self.cores.others
        self.cores = Cores(cores, cores)
        os.sched_setaffinity(0, cores)

    def model(self, name: str) -> Path:
        """Return a model such as `Q4_0.gguf` or `target`, and make it if it is missing."""
        path: Path = self.options.models / name
        if self.options.models == MODELS:
            make_missing(
                MODELS.parent, [name.removesuffix(".gguf")], say=lambda sentence: print(sentence, file=sys.stderr)
            )
        elif not path.exists():
            raise BenchError(f"There is no {path}; correct --models.")
        return path

    def target(self, cost: int = 1) -> Path:
        """Return the GGUF of the target, or of one that costs several times as much."""
        return self.model("target-Q8_0.gguf" if cost == 1 else f"target-Q8_0-cost{cost}.gguf")

    @property
    def engine(self) -> Mapping[str, str]:
        """The engine that the options name, as settings; llama.cpp in suites that have no such option."""
        return ENGINES[getattr(self.options, "engine", "llama.cpp")]

    @property
    def edge_program(self) -> str:
        """The module that runs an edge; with `--curve`, one whose steps are played."""
        return EDGE_PROGRAM if getattr(self.options, "curve", None) is None else "benchmarks.played_edge"

    def new_folder(self) -> Path:
        self._folders += 1
        folder = self.folder / str(self._folders)
        folder.mkdir()
        return folder

    def broker(self, *edges: str) -> MosquittoProcess:
        """Return a mosquitto on a free port, as a context manager."""
        return MosquittoProcess(Broker(fleet=self.fleet, edges=edges) if edges else Broker(fleet=self.fleet))

    @contextmanager
    def edge(
        self, port: int, target: Path, *, engine: str = "", module: str = "", **settings: object
    ) -> Iterator[ServedEdge]:
        """Run `fleet edge run` on the edge's cores, without quotas; on entry it is online."""
        folder = self.new_folder()
        chosen = ENGINES.get(engine, {"engine": engine}) if engine else self.engine
        log = f"sqlite:///{folder}/log.sqlite3"
        settings = {**chosen, "threads": len(self.cores.edge), **settings}
        given = {"fleet": self.fleet, "port": port, "target": target, "db": log, "spool": f"{folder}/spool"}
        with edge_process(
            _flags(given | settings), module=module or self.edge_program, cores=self.cores.edge
        ) as process:
            yield ServedEdge(process.pid, log)

    @contextmanager
    def device(
        self,
        port: int,
        number: int = 0,
        *,
        module: str = EDGE_PROGRAM,
        environment: Mapping[str, str] | None = None,
        **settings: object,
    ) -> Iterator[ServedDevice]:
        """Run `fleet device run` on the other cores; on entry an edge is online."""
        address = free_address()
        given = {"fleet": self.fleet, "device": f"device-{number}", "port": port}
        if "model" not in settings:
            given["model"] = self.model("Q4_0.gguf")
        words = ["device", "run", "--events", *_flags(given | {"api_listen": address} | settings)]
        log = self.new_folder() / f"device-{number}"
        with Program(module, words, cores=self.cores.others, log=log, environment=environment) as program:
            program.wait_for('"online"', timeout_s=_START_S)
            yield ServedDevice(program.pid, f"http://{address}/v1")


def _flags(settings: Mapping[str, object]) -> list[str]:
    flags: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        flags += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return flags


@contextmanager
def tls_broker(folder: Path, fleet: str, edges: Sequence[str], devices: Sequence[str]) -> Iterator[LocalBroker]:
    """Run a mosquitto over mutual TLS; it knows the certificates of its clients."""
    make_local_broker(folder, fleet=fleet, edges=list(edges), devices=list(devices), port=1)
    with LocalBroker(folder, port=0) as local:
        yield local


def link_to(port: int, fleet: str, name: str) -> PahoLink:
    """Return a link to a broker without TLS, not yet started."""
    return PahoLink(BrokerSettings(port=port).link(fleet, name, will=None))


def edge_only_pacing() -> Pacing:
    return FixedPacing(EDGE_ONLY_TOKENS, edge_only=True)


@contextmanager
def connected(
    port: int,
    fleet: str,
    drafters: Sequence[Drafter],
    *,
    pacing: Callable[[], Pacing] = edge_only_pacing,
    name: str = "device",
) -> Iterator[list[Agent]]:
    """Connect a device for each draft model; they are named `device-0` and so on."""
    agents, links = [], []
    try:
        for number, drafter in enumerate(drafters):
            link = link_to(port, fleet, f"{name}-{number}")
            agent = Agent(link, fleet, f"{name}-{number}", drafter, pacing(), time.monotonic)
            agent.attach()
            link.start(timeout_s=_START_S)
            links.append(link)
            agents.append(agent)
        yield agents
    finally:
        for link in links:
            link.stop()


def together(calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """Run calls concurrently, each on a thread; return their results, or raise the first error."""
    results: dict[int, Result] = {}
    errors: list[BaseException] = []
    gate = threading.Barrier(len(calls))

    def run(number: int) -> None:
        gate.wait()
        try:
            results[number] = calls[number]()
        except BaseException as error:  # noqa: BLE001 - raised below, on the caller's thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(calls))]


@contextmanager
def _ending_cleanly() -> Iterator[None]:
    """Handle SIGTERM, by which schedulers and `timeout` end a program, like Ctrl-C: child processes end too."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def free_address() -> str:
    """Return a loopback address whose port was free a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{one.getsockname()[1]}"


def conditions() -> dict[str, Any]:
    """Return commit, versions, machine, load and time, as JSON values."""
    found = {"dssd-fleet": VERSION, "python": platform.python_version()}
    with contextlib.suppress(BrokerError):
        found["mosquitto"] = str(installed_version(find_mosquitto()))
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return {
        "commit": commit(),
        "versions": found,
        "machine": {
            "platform": platform.platform(),
            "cpu": _cpu_info("model name") or platform.processor() or platform.machine(),
            "instructions": [
                name for name in _NOTABLE if name in (_cpu_info("flags") or _cpu_info("Features")).split()
            ],
            "cores": psutil.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
            "load": round(os.getloadavg()[0], 1),
        },
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit() -> str | None:
    """Return the commit of this checkout, with "-dirty" appended if files differ; None without a repository."""
    command, folder = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"], Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_GIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_info(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""

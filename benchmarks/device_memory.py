"""Device memory benchmark: what a device process holds while it answers a thousand requests, beside its model's file.

A real `fleet device run` with its HTTP API, over a real mosquitto and a real edge. Applications ask it for short chats,
two at once, with prompts of all lengths up to most of the context. The resident memory of the process is read now and
then, pages that are mapped from the model's file included. `--picture` draws it.
"""

import argparse
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final

from benchmarks.bytes.picture import figure_class
from benchmarks.memory import Resident, resident
from benchmarks.shared.conditions import conditions
from benchmarks.shared.ending import ending_cleanly
from benchmarks.shared.slope import robust_slope
from broker_config.broker import Broker
from broker_config.errors import BrokerError
from broker_config.processes.runner import MosquittoProcess
from fleet_runtime.events import Event, wait_for_event
from schemas.errors import FleetError
from tests.support.edge_process import edge_process

__all__ = ["main"]

FLEET: Final = "device-memory"
_MB: Final = 1e6
_ALLOWED_MB: Final = 250
_GROWTH_MB: Final = 5.0
_SAMPLES: Final = 100
_STOP_S: Final = 30.0
_ANSWER_S: Final = 300.0
_WORDS: Final = ("pump", "valve", "pressure", "reading", "operator", "alarm", "shift", "water", "motor", "report")
_TOKENS_A_WORD: Final = 1.2


def main(argv: Sequence[str] | None = None) -> int:
    """Ask, and print what the device holds; return 1 if that is too much, or grows."""
    parser = argparse.ArgumentParser(prog="benchmarks device-memory", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--draft", default="Q4_0", help="quantization of the draft model (default: %(default)s)")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--memory-mb", default="auto", help="the device's setting (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=2, help="applications, and texts at once (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=256, help="most tokens of a prompt, about (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8, help="of an answer (default: %(default)s)")
    parser.add_argument("--suffix", action="store_true", help="let the device draft from earlier text too")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    try:
        with ending_cleanly():
            samples = _measure(arguments)
    except (FleetError, BrokerError) as error:
        print(error, file=sys.stderr)
        return 2
    file_mb = _draft(arguments).stat().st_size / _MB
    allowed, most = file_mb + _ALLOWED_MB, max(sample.all for sample in samples)
    later = [sample for sample in samples if sample.texts >= arguments.requests / 2]
    slope = robust_slope([(sample.texts / 1000, sample.all) for sample in later])
    for sample in samples[:: max(1, len(samples) // 10)]:
        print(f"{sample.texts:6} requests {sample.all:8.1f} MB, {sample.own:8.1f} of it its own")
    print(
        f"{most:.0f} MB at most at a context of {arguments.context}; the model's file {file_mb:.0f} + {_ALLOWED_MB} = "
        f"{allowed:.0f} MB"
    )
    grows = slope is not None and slope.low > _GROWTH_MB
    if slope is not None:
        print(f"in the second half {slope.value:+.2f} MB a thousand requests ({slope.low:+.2f} to {slope.high:+.2f})")
    if arguments.json:
        found = {
            **conditions("llama-cpp-python", "paho-mqtt", broker=True),
            "settings": {
                name: str(value) for name, value in vars(arguments).items() if name not in ("json", "picture")
            },
            "file_mb": file_mb,
            "allowed_mb": allowed,
            "most_mb": most,
            "slope_mb_per_thousand": slope and asdict(slope),
            "samples": [asdict(sample) for sample in samples],
        }
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if arguments.picture:
        _draw(samples, allowed, file_mb, arguments.picture)
    return 1 if most > allowed or grows else 0


def _draft(arguments: argparse.Namespace) -> Path:
    path: Path = arguments.models / f"{arguments.draft}.gguf"
    return path


def _measure(arguments: argparse.Namespace) -> list[Resident]:
    with MosquittoProcess(Broker(fleet=FLEET)) as broker, tempfile.TemporaryDirectory() as folder:
        edge = [
            "--fleet", FLEET, "--port", str(broker.port),
            "--target", str(arguments.models / "target-Q8_0.gguf"), "--engine", "llama.cpp",
            "--db", f"sqlite:///{folder}/log.sqlite3", "--spool", f"{folder}/spool",
        ]  # fmt: skip
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        device = [
            "--fleet", FLEET, "--port", str(broker.port), "--model", str(_draft(arguments)),
            "--context", str(arguments.context), "--memory-mb", arguments.memory_mb, "--api-port", str(port),
            "--texts-at-once", str(arguments.at_once), "--history-dir", f"{folder}/history", "--truncate", "start",
            "--suffix" if arguments.suffix else "--no-suffix",
        ]  # fmt: skip
        with edge_process(edge), _device_process(device) as pid:
            return _ask(arguments, port, pid)


@contextmanager
def _device_process(arguments: Sequence[str]) -> Iterator[int]:
    """Run `fleet device run`; yield its process id once it serves."""
    command = [sys.executable, "-m", "fleet_cli.main", "device", "run", "--events", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if wait_for_event(process.stdout, Event.SERVING) is None:
            raise FleetError("The device did not start; its complaint is above.")
        # What else it tells must not fill the pipe.
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield process.pid
    finally:
        process.terminate()
        process.wait(timeout=_STOP_S)


def _ask(arguments: argparse.Namespace, port: int, pid: int) -> list[Resident]:
    samples, lock, done = [resident(pid, 0)], threading.Lock(), 0

    def ask(number: int) -> None:
        nonlocal done
        answer(port, _body(arguments, number))
        with lock:
            done += 1
            if done % max(1, arguments.requests // _SAMPLES) == 0:
                samples.append(resident(pid, done))

    with ThreadPoolExecutor(arguments.at_once) as pool:
        for future in [pool.submit(ask, number) for number in range(arguments.requests)]:
            future.result()
    return samples


def _body(arguments: argparse.Namespace, number: int) -> dict[str, Any]:
    rng = random.Random(number)
    words = rng.choices(_WORDS, k=rng.randint(1, max(1, int(arguments.prompt / _TOKENS_A_WORD))))
    content = f"Number {number}: {' '.join(words)}."
    return {"messages": [{"role": "user", "content": content}], "max_tokens": arguments.tokens, "seed": number}


def answer(port: int, body: dict[str, Any]) -> None:
    """Ask for a chat completion.

    Raises:
        FleetError: The device answers with an error.
    """
    connection = HTTPConnection("127.0.0.1", port, timeout=_ANSWER_S)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        said = response.read()
        if response.status != 200:
            raise FleetError(f"The device answered {response.status}: {said.decode('utf-8', 'replace')[:300]}")
    finally:
        connection.close()


def _draw(samples: Sequence[Resident], allowed: float, file_mb: float, file: Path) -> None:
    figure = figure_class()(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    at = [sample.texts for sample in samples]
    axes.plot(at, [sample.all for sample in samples], label="resident")
    axes.plot(at, [sample.own for sample in samples], label="of it its own")
    axes.axhline(allowed, color="0.5", linestyle="--", label=f"model's file + {_ALLOWED_MB} MB")
    axes.axhline(file_mb, color="0.7", linestyle=":", label="model's file")
    axes.set_xlabel("requests")
    axes.set_ylabel("memory, MB")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    sys.exit(main())

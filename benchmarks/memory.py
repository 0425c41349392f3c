"""Memory benchmark: what an edge process holds after thousands of texts, beside its weights and its budget.

A real edge over a real mosquitto, and devices that have it write short texts, one after another, each from a prompt of
its own: what ended texts have computed fills the whole budget for keys and values. The resident memory that is all the
edge's own is read now and then: weights that are mapped from a file count once, as often as they are read.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from benchmarks.shared.conditions import conditions
from benchmarks.shared.slope import robust_slope
from broker_config.broker import Broker
from broker_config.processes.runner import MosquittoProcess
from fleet_device.client.agent import Agent
from fleet_device.drafters.gguf import GgufModel
from fleet_device.pacing.contract import STREAMED, FixedPacing
from fleet_link.paho_link import PahoLink
from fleet_link.settings import BrokerSettings
from schemas.policy import Mode, SamplingPolicy
from tests.support.edge_process import edge_process
from tests.support.replay_drafter import ReplayDrafter

__all__ = ["Resident", "main", "resident", "weight_bytes"]

FLEET: Final = "memory"
_MB: Final = 1e6
_ALLOWED_MB: Final = {"llama.cpp": 100, "torch": 300}
_SAMPLES: Final = 100
_START_S: Final = 10.0
_DTYPE_BYTES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_TORCH_BYTES: Final = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Resident:
    """Resident memory of a process, in megabytes (10⁶ bytes).

    Attributes:
        texts: Written before.
        all: Whole.
        own: Of it, what is not the content of a file: the heap and all that is allocated.
    """

    texts: int
    all: float
    own: float


def resident(pid: int, texts: int) -> Resident:
    """Read a process's resident memory, as Linux tells it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines[1:])}
    return Resident(texts, kib["Rss"] * 1024 / _MB, kib["Anonymous"] * 1024 / _MB)


def weight_bytes(target: Path, dtype: str) -> int:
    """Return what a target's weights take: of a GGUF its size, of a folder its tensors in a number format."""
    if target.is_file():
        return target.stat().st_size
    total = 0
    for file in sorted(target.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                total += (end - begin) // _DTYPE_BYTES[tensor["dtype"]] * _TORCH_BYTES[dtype]
    return total


def main(argv: Sequence[str] | None = None) -> int:
    """Let an edge write, and print what it holds; return 1 if that is more than weights, budget and the allowance."""
    parser = argparse.ArgumentParser(prog="benchmarks memory", description=__doc__)
    parser.add_argument("--engine", default="llama.cpp", choices=sorted(_ALLOWED_MB))
    parser.add_argument("--target", type=Path, help="(default: the prepared SmolLM2, as the engine takes it)")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(_TORCH_BYTES), help="of torch")
    parser.add_argument("--kv-bytes", type=int, default=256 << 20, help="the budget (default: %(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="of llama.cpp (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=5000)
    parser.add_argument("--devices", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=24, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4, help="of a text (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    models = Path("models/smollm2-135m")
    target = arguments.target or models / ("target" if arguments.engine == "torch" else "target-Q8_0.gguf")
    weights = weight_bytes(target, arguments.dtype) / _MB
    with MosquittoProcess(Broker(fleet=FLEET)) as broker, tempfile.TemporaryDirectory() as folder:
        command = [
            "--fleet", FLEET, "--port", str(broker.port), "--target", str(target),
            "--engine", arguments.engine, "--dtype", arguments.dtype, "--kv-bytes", str(arguments.kv_bytes),
            "--context", str(arguments.context), "--db", f"sqlite:///{folder}/log.sqlite3",
            "--spool", f"{folder}/spool",
        ]  # fmt: skip
        vocabulary = GgufModel(models / "Q4_1.gguf", vocabulary_only=True)
        with edge_process(command) as edge, closing(vocabulary) as codec:
            samples = _Load(arguments, broker.port, codec).run(edge.pid)
    allowed = weights + arguments.kv_bytes / _MB + _ALLOWED_MB[arguments.engine]
    most = max(sample.all for sample in samples)
    later = [sample for sample in samples if sample.texts >= arguments.texts / 2]
    slope = robust_slope([(sample.texts / 1000, sample.all) for sample in later])
    for sample in samples[:: max(1, len(samples) // 10)]:
        print(f"{sample.texts:6} texts {sample.all:8.1f} MB, {sample.own:8.1f} of it its own")
    print(
        f"{arguments.engine}: {most:.0f} MB at most; weights {weights:.0f} + budget {arguments.kv_bytes / _MB:.0f} + "
        f"{_ALLOWED_MB[arguments.engine]} = {allowed:.0f} MB; beside weights and budget "
        f"{most - allowed + _ALLOWED_MB[arguments.engine]:.0f} MB"
    )
    if slope is not None:
        print(f"in the second half {slope.value:+.2f} MB a thousand texts ({slope.low:+.2f} to {slope.high:+.2f})")
    if arguments.json:
        found = {
            **conditions("llama-cpp-python", "torch", "transformers", broker=True),
            "engine": arguments.engine,
            "weights_mb": weights,
            "budget_mb": arguments.kv_bytes / _MB,
            "allowed_mb": allowed,
            "most_mb": most,
            "samples": [asdict(sample) for sample in samples],
        }
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if most <= allowed else 1


class _Load:
    """Devices that have texts written, one after another each, until there are enough."""

    def __init__(self, arguments: argparse.Namespace, port: int, codec: GgufModel) -> None:
        self._arguments = arguments
        self._port = port
        self._codec = codec
        self._left = iter(range(arguments.texts))
        self._lock = threading.Lock()
        self._done = 0

    def run(self, pid: int) -> list[Resident]:
        """Write all texts; return samples of a process's memory, the first from before."""
        samples = [resident(pid, 0)]

        def count() -> None:
            with self._lock:
                self._done += 1
                if self._done % max(1, self._arguments.texts // _SAMPLES) == 0:
                    samples.append(resident(pid, self._done))

        with ThreadPoolExecutor(self._arguments.devices) as pool:
            for future in [pool.submit(self._serve, name, count) for name in range(self._arguments.devices)]:
                future.result()
        return samples

    def _serve(self, name: int, count: Callable[[], None]) -> None:
        link = PahoLink(BrokerSettings(port=self._port).link(f"device-{name}", will=None))
        drafter = ReplayDrafter(self._codec, self._codec.vocabulary, ())
        agent = Agent(link, FLEET, f"device-{name}", drafter, FixedPacing(STREAMED, stream=True), time.monotonic)
        agent.attach()
        link.start(timeout_s=_START_S)
        try:
            while (number := self._next()) is not None:
                prompt = random.Random(number).choices(range(self._codec.vocabulary.size), k=self._arguments.prompt)
                policy = SamplingPolicy(mode=Mode.COUPLED, seed=number)
                agent.generate(prompt, policy=policy, max_new_tokens=self._arguments.tokens)
                count()
        finally:
            link.stop()

    def _next(self) -> int | None:
        with self._lock:
            return next(self._left, None)


if __name__ == "__main__":
    sys.exit(main())

"""Local process: an engine and its clients in a process of their own, on the cores of an edge.

It reads what to do as one line of JSON, and answers with one: what clients got.
"""

import json
import sys
from pathlib import Path
from typing import Any, Final

from benchmarks.capacity.arrivals import Arrival, Arrivals
from benchmarks.capacity.serving import Engine, Prompt, serve
from benchmarks.capacity.timing import Timing
from benchmarks.capacity.together import Together
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import Verifier
from fleet_edge.verifiers.registry import load_verifier
from schemas.policy import SamplingPolicy

__all__ = ["CELLS", "KV_BYTES", "main", "verifier_over"]

CELLS: Final = 256
"""Tokens of a prompt and its text, and one."""

KV_BYTES: Final = 4 << 30


def verifier_over(path: Path, *, threads: int, stable_rows: bool) -> Verifier:
    """Return the edge's own verifier over a GGUF."""
    return load_verifier(
        EdgeSettings(
            target=str(path),
            engine="llama.cpp",
            context=CELLS - 1,
            kv_bytes=KV_BYTES,
            threads=threads,
            stable_rows=stable_rows,
        )
    )


def main() -> None:
    """Run as a program."""
    asked = json.loads(sys.stdin.readline())
    timing = Timing.from_json(asked["timing"])
    prompts = [
        Prompt(tuple(each["tokens"]), SamplingPolicy.model_validate(each["policy"]), each["most"])
        for each in asked["prompts"]
    ]
    arrivals = [
        Arrival.of(client, prompts, Arrivals(asked["arrivals"]), pause_s=asked["pause_s"], seed=asked["seed"])
        for client in range(asked["devices"])
    ]
    engine = _engine(asked)
    clients, window = serve(engine, arrivals, timing)
    answer = {"begin": window.begin, "end": window.end, "clients": [client.json() for client in clients]}
    print(json.dumps(answer), flush=True)


def _engine(asked: dict[str, Any]) -> Engine:
    target, threads = Path(asked["target"]), asked["threads"]
    if asked["draft"] is None:
        from benchmarks.capacity.raw_engine import RawEngine  # noqa: PLC0415 - needs llama.cpp

        return RawEngine(target, slots=asked["devices"], cells=CELLS, threads=threads)
    return Together(
        verifier_over(target, threads=threads, stable_rows=False),
        verifier_over(Path(asked["draft"]), threads=threads, stable_rows=False),
        length=asked["length"],
    )


if __name__ == "__main__":
    main()

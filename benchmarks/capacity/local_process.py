"""Local process: an engine and its clients in a process of their own, on the cores of an edge.

It reads what to do as one line of JSON, and answers with one: what clients got.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.capacity.serving import CELLS, Arrival, Arrivals, CellTiming, Engine, Together, serve, verifier_over
from benchmarks.raw_llama import Prompt
from schemas.policy import SamplingPolicy


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    timing = CellTiming(**asked["timing"])
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
        from benchmarks.raw_llama import RawEngine  # noqa: PLC0415 - needs llama.cpp

        return RawEngine(target, slots=asked["devices"], cells=CELLS, threads=threads)
    return Together(
        verifier_over(target, threads=threads, batch_invariant=False, engine=asked["engine"]),
        verifier_over(Path(asked["draft"]), threads=threads, batch_invariant=False),
        length=asked["length"],
    )


if __name__ == "__main__":
    main()

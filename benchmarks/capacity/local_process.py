"""Local process: llama.cpp and its clients in a process of their own, on the cores of an edge.

It reads what to do as one line of JSON, and answers with one: what clients got.
"""

import json
import sys
from pathlib import Path

from benchmarks.capacity.serving import CELLS, CellTiming, serve, texts_of
from benchmarks.raw_llama import RawEngine, RawPrompt
from schemas.policy import SamplingPolicy


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    timing = CellTiming(**asked["timing"])
    prompts = [
        RawPrompt(tuple(each["tokens"]), SamplingPolicy.model_validate(each["policy"]), each["most"])
        for each in asked["prompts"]
    ]
    texts = [texts_of(client, prompts) for client in range(asked["devices"])]
    engine = RawEngine(Path(asked["target"]), slots=asked["devices"], cells=CELLS, threads=asked["threads"])
    clients, window = serve(engine, texts, timing)
    answer = {"begin": window.begin, "end": window.end, "clients": [client.json() for client in clients]}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

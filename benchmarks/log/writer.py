"""Writer beside a purge: a process that stores batches as an edge does, and tells how long each took."""

import json
import sys
import threading
import time
from datetime import UTC, datetime
from typing import Any

from fleet_edge.store.database import open_store
from fleet_edge.store.records.segments import SegmentProgress, segment_number
from fleet_edge.store.records.sessions import SessionOpened
from schemas.policy import Mode

__all__ = ["main"]

_EVERY_S = 0.05


def main() -> int:
    """Write until standard input ends; then print the times (ms) as JSON."""
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    taken: list[float] = []
    with open_store(sys.argv[1]) as store:
        number = 0
        while not ended.wait(_EVERY_S):
            records: list[Any] = []
            for _ in range(10):
                number += 1
                at = datetime.now(UTC)
                key: dict[str, Any] = {"session": f"{number:016x}", "segment": segment_number(at), "device": "writer"}
                records.append(_opened(key, at))
                records.append(SegmentProgress(**key, at=at, tokens=number % 50, rounds=10))
            begun = time.perf_counter()
            store.apply(records)
            taken.append(1000 * (time.perf_counter() - begun))
    print(json.dumps(taken))
    return 0


def _opened(key: dict[str, Any], at: datetime) -> SessionOpened:
    return SessionOpened(
        **key,
        edge="edge-0",
        draft_model="SmolLM2-135M",
        quantization="Q4_0",
        target="SmolLM2",
        mode=Mode.RESIDUAL,
        temperature=0.7,
        top_k=50,
        top_p=0.95,
        seed=7,
        prompt_tokens=100,
        max_new_tokens=256,
        resumed_tokens=0,
        open_bytes=150,
        at=at,
    )


if __name__ == "__main__":
    sys.exit(main())

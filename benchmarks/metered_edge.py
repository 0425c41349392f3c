"""Metered edge: a real edge whose verifier notes when it computes, in a process that reports it at its end.

It can also sample where processor time goes: every few milliseconds each thread's clock is read, and what it has taken
since is counted for the innermost function of its stack that belongs to a part of the program.
"""

import argparse
import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final
from unittest.mock import patch

from benchmarks.harness import Bench
from benchmarks.processes import Program
from fleet_common.host import use_one_heap
from fleet_common.logs import Event, EventStream
from fleet_common.mqtt.settings import BrokerSettings
from fleet_edge import verifiers  # noqa: F401 - before torch
from fleet_edge.edge import Edge
from fleet_edge.settings import EdgeSettings
from fleet_edge.store.writer import LogWriter
from fleet_edge.verifiers.contract import Item, Logits, Verifier
from fleet_edge.verifiers.registry import load_verifier
from fleet_edge.verifiers.scripted import ScriptedVerifier
from tests.support.edge_thread import NO_QUOTAS, NoLog
from tests.support.scripted_language import CONTEXT, LANGUAGE

_START_S: Final = 120.0

SLEEP: Final = "sleep"
"""Name of the engine that computes nothing and sleeps, leaving the processor to others."""


@dataclass(slots=True)
class MeteredVerifier:
    """`Verifier` that records the steps of another."""

    verifier: Verifier
    step_s: float = 0.0
    steps: list[tuple[float, float, int]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the verifier has
        return getattr(self.verifier, name)

    def score(self, items: Sequence[Item]) -> Logits:
        began = time.perf_counter()
        if self.step_s:
            time.sleep(self.step_s)
        logits = self.verifier.score(items)
        self.steps.append((began, time.perf_counter(), sum(item.rows > 0 for item in items)))
        return logits


@contextmanager
def metered_edge(
    bench: Bench, port: int, target: Path | None, *, log: bool = True, sample: dict[str, Any] | None = None
) -> Iterator[Program]:
    folder = bench.new_folder()
    engine = [SLEEP, "--target", "."] if target is None else ["llama.cpp", "--target", str(target)]
    edge = Program(
        "benchmarks.metered_edge",
        [
            "--fleet", bench.fleet, "--port", str(port), "--folder", str(folder), "--engine", *engine,
            "--threads", str(len(bench.cores.edge)),
            *([] if log else ["--no-log"]), *([] if sample is None else ["--sample"]),
        ],
        cores=bench.cores.edge,
        log=folder / "edge.log",
    )  # fmt: skip
    try:
        edge.wait_for(Event.ONLINE, timeout_s=_START_S)
        yield edge
    finally:
        lines = edge.end()
    if sample is not None:
        sample.update(json.loads(lines[-1]))


def main() -> None:
    """Serve until SIGTERM; writes the event `online` when ready, and `stopped` with the steps at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fleet", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for the session log")
    parser.add_argument("--engine", required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=0, help="of the engine")
    parser.add_argument("--no-log", action="store_true", help="drop what would be written to the session log")
    parser.add_argument("--sample", action="store_true", help="tell at the end where processor time went, by part")
    arguments = parser.parse_args()
    use_one_heap()
    own = {} if arguments.engine == SLEEP else {"engine": arguments.engine, "target": str(arguments.target)}
    settings = EdgeSettings.model_validate(
        {
            "fleet": arguments.fleet,
            "broker": BrokerSettings(port=arguments.port),
            "db": f"sqlite:///{arguments.folder}/log.sqlite3",
            "spool": arguments.folder / "spool",
            "quotas": NO_QUOTAS,
            "threads": arguments.threads,
            **own,
        }
    )
    if arguments.engine == SLEEP:
        scripted = ScriptedVerifier(LANGUAGE, LANGUAGE.words, context=CONTEXT, name="scripted")
        metered = MeteredVerifier(scripted)
    else:
        metered = MeteredVerifier(load_verifier(settings))
    events = EventStream(sys.stdout, outlives_reader=True)
    if arguments.no_log:
        patch.object(LogWriter, "put", NoLog.put).start()  # an edge has no setting for that
    edge = Edge(settings, verifier=metered)
    sampler = StackSampler()

    def online() -> None:
        if arguments.sample:
            sampler.start()
        events.write(Event.ONLINE, fleet=settings.fleet)

    edge.run(on_online=online)
    parts = sampler.stop() if arguments.sample else {}
    events.write(Event.STOPPED, steps=metered.steps, parts=parts)


_EVERY_S: Final = 0.003
_LINK_THREAD: Final = "link-"

PARTS: Final = (
    ("fleet_edge.verifiers", "engine"),
    ("benchmarks.metered_edge", "engine"),
    ("tests.support", "engine"),
    ("llama_cpp", "engine"),
    ("dssd", "judging"),
    ("fleet_edge.batching.judging", "judging"),
    ("fleet_edge.batching.shaping", "judging"),
    ("fleet_edge.batching.shaping", "judging"),
    ("fleet_edge.guard", "gate"),
    ("fleet_edge.answers.recorder", "record"),
    ("fleet_edge.answers.device_log", "record"),
    ("fleet_edge.session_log", "record"),
    ("fleet_edge.store", "record"),
    ("sqlalchemy", "record"),
    ("fleet_edge.intake", "decode"),
    ("fleet_edge.answers", "publish"),
    ("fleet_edge.sessions", "sessions"),
    ("fleet_edge.handlers", "sessions"),
    ("fleet_edge.batching", "scheduler"),
    ("fleet_edge.orchestrator", "scheduler"),
    ("fleet_edge.service", "scheduler"),
)
"""Module prefixes by part; the first match counts."""


def part_of(functions: Iterator[tuple[str, str]], thread: str) -> str:
    """Return the part of the program that a stack belongs to."""
    for module, function in functions:
        if module == "schemas.codec":
            if function.startswith("decode_"):
                return "decode"
            if function.startswith("encode_"):
                return "encode"
        elif module.startswith(("fleet_common.mqtt", "paho")):
            return "link" if thread.startswith(_LINK_THREAD) else "publish"
        else:
            for prefix, part in PARTS:
                if module.startswith(prefix):
                    return part
    return "other"


class StackSampler:
    """Samples this process on a thread of its own, which it leaves out."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._before: dict[int, float] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        self._take()
        self.seconds.clear()
        self._thread.start()

    def stop(self) -> dict[str, float]:
        """End; return the processor seconds by part, the greatest first."""
        self._stopping.set()
        self._thread.join()
        return dict(sorted(self.seconds.items(), key=lambda item: -item[1]))

    def _run(self) -> None:
        while not self._stopping.wait(_EVERY_S):
            self._take()

    def _take(self) -> None:
        frames = sys._current_frames()  # noqa: SLF001 - the interpreter's own name for it
        for thread in threading.enumerate():
            frame = frames.get(thread.ident or 0)
            if thread is self._thread or frame is None or thread.native_id is None:
                continue
            try:
                now = time.clock_gettime(_clock_of(thread.native_id))
            except OSError:  # it has just ended
                continue
            spent = now - self._before.get(thread.native_id, now)
            self._before[thread.native_id] = now
            if spent > 0.0:
                self.seconds[part_of(_functions(frame), thread.name)] += spent


def _clock_of(native_id: int) -> int:
    """Return Linux's clock number of a thread's processor time."""
    return (~native_id << 3) | 6


def _functions(frame: FrameType | None) -> Iterator[tuple[str, str]]:
    while frame is not None:
        yield frame.f_globals.get("__name__", ""), frame.f_code.co_name
        frame = frame.f_back


if __name__ == "__main__":
    main()

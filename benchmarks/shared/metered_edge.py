"""Metered edge: a real edge whose verifier notes when it computes, as a process that tells it at its end."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from benchmarks.shared.sampler import StackSampler
from fleet_edge import openmp  # noqa: F401 - before torch
from fleet_edge.edge import Edge
from fleet_edge.settings import EdgeSettings
from fleet_edge.store.writer import Writer
from fleet_edge.verifiers.contract import Item, Logits, Verifier
from fleet_edge.verifiers.registry import load_verifier
from fleet_edge.verifiers.scripted import ScriptedVerifier
from fleet_link.settings import BrokerSettings
from fleet_runtime.events import Event, EventStream
from fleet_runtime.memory import use_one_heap
from tests.support.edge_thread import NO_QUOTAS, NoLog
from tests.support.scripted_language import CONTEXT, LANGUAGE

__all__ = ["SLEEP", "main"]

SLEEP: Final = "sleep"
"""Name of the engine that computes nothing, and takes its time as one does that leaves the processor to others."""


@dataclass(slots=True)
class MeteredVerifier:
    """`Verifier` that notes the steps of another.

    Attributes:
        verifier: It.
        step_s: Slept in each step, for all else takes no time there.
        session_s: And for each of its sequences.
        steps: When each began and ended (seconds), and how many sequences it verified.
    """

    verifier: Verifier
    step_s: float = 0.0
    session_s: float = 0.0
    steps: list[tuple[float, float, int]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the verifier has
        return getattr(self.verifier, name)

    def score(self, items: Sequence[Item]) -> Logits:
        """Compute a step."""
        began = time.perf_counter()
        if self.step_s:
            time.sleep(self.step_s + self.session_s * len(items))
        logits = self.verifier.score(items)
        self.steps.append((began, time.perf_counter(), sum(item.rows > 0 for item in items)))
        return logits


def main() -> None:
    """Serve until SIGTERM; writes the event `online` when ready, and `stopped` with the steps at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fleet", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for the session log")
    parser.add_argument("--engine", required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--step-ms", type=float, required=True)
    parser.add_argument("--session-ms", type=float, required=True)
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
        metered = MeteredVerifier(scripted, arguments.step_ms / 1e3, arguments.session_ms / 1e3)
    else:
        metered = MeteredVerifier(load_verifier(settings))
    events = EventStream(sys.stdout, outlives_reader=True)
    if arguments.no_log:
        patch.object(Writer, "put", NoLog.put).start()  # an edge has no setting for that
    edge = Edge(settings, verifier=metered)
    sampler = StackSampler()

    def online() -> None:
        if arguments.sample:
            sampler.start()
        events.write(Event.ONLINE, fleet=settings.fleet)

    edge.run(on_online=online)
    parts = sampler.stop() if arguments.sample else {}
    events.write(Event.STOPPED, steps=metered.steps, parts=parts)


if __name__ == "__main__":
    main()

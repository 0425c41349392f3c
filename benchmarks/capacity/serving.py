"""Serving without a network: clients in the same process as an engine, which chooses what a step computes."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from benchmarks.capacity.devices import Arrival, Timing, Warming
from fleet_admin.planning.service_level import Client, TimedRequest, TimeWindow
from fleet_edge.settings import EdgeSettings
from fleet_edge.verifiers.contract import Verifier
from fleet_edge.verifiers.registry import load_verifier
from schemas.policy import SamplingPolicy

STEP = 512
CHUNK = 128
"""Most new tokens of a step, and most of prompts in one that writes as well: as an edge's settings have it."""

_IDLE_S = 0.001


CELLS: Final = 256
"""Tokens of a prompt and its text, and one."""

KV_BYTES: Final = 4 << 30


def verifier_over(path: Path, *, threads: int, batch_invariant: bool) -> Verifier:
    """Return the edge's own verifier over a GGUF."""
    return load_verifier(
        EdgeSettings(
            target=str(path),
            engine="llama.cpp",
            context=CELLS - 1,
            kv_bytes=KV_BYTES,
            threads=threads,
            batch_invariant=batch_invariant,
        )
    )


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked for."""

    tokens: tuple[int, ...]
    policy: SamplingPolicy
    most: int


@dataclass(frozen=True, slots=True)
class Written:
    """What a step has brought one client."""

    new: tuple[int, ...]
    ended: bool


class Engine(Protocol):
    """What writes texts in slots, one for each client."""

    def begin(self, slot: int, prompt: Prompt) -> None:
        """Begin a text in a slot that has none."""

    def step(self) -> Mapping[int, Written]:
        """Compute once for all slots; return what each got, those that got nothing left out."""


def serve(
    engine: Engine,
    arrivals: Sequence[Iterator[Arrival[Prompt]]],
    timing: Timing,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[list[Client], TimeWindow]:
    """Serve clients until the window is over; return them, and the window.

    Args:
        engine: With as many slots as there are clients.
        arrivals: What each asks for.
        timing: How long.
        clock: Monotonic seconds.
        sleep: Waits.
    """
    started = clock()
    clients = [Client() for _ in arrivals]
    waiting = {slot: next(asked) for slot, asked in enumerate(arrivals)}
    due = {slot: started + arrival.pause_s for slot, arrival in waiting.items()}
    warming = Warming(timing, clients, started)
    while not warming.over(clock()):
        now = clock()
        for slot in [slot for slot, at in due.items() if at <= now]:
            clients[slot].texts.append(TimedRequest(max(due.pop(slot), started)))
            engine.begin(slot, waiting.pop(slot).text)
        if len(due) == len(clients):
            sleep(_IDLE_S)
            continue
        for slot, written in engine.step().items():
            at, text = clock(), clients[slot].texts[-1]
            text.pieces.append((at, len(written.new)))
            if written.ended:
                text.ended_at = at
                waiting[slot] = next(arrivals[slot])
                due[slot] = at + waiting[slot].pause_s
    window = warming.window(clock())
    assert window is not None
    return clients, window

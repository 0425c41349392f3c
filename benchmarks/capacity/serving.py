"""Serving: clients that ask for text after text while they are counted, of an edge or of an engine in their process."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, Final, TypeVar

from benchmarks.capacity.service_level import Client, TimedRequest, TimeWindow
from benchmarks.fleet_load import FleetLoad
from benchmarks.raw_llama import RawPrompt
from fleet_device.requests.generate import Cancellation, GenerateRequest, Generation, RequestContext
from schemas.errors import FleetError
from schemas.policy import Mode
from schemas.reasons import EndReason
from tests.support.recorded_drafter import RecordedText

_END_S: Final = 60.0
_LOOK_S: Final = 0.02
_AFTER_FAILURE_S: Final = 0.5
_DEVICE_S: Final = 0.3


@dataclass(frozen=True, slots=True)
class CellTiming:
    seconds: float
    settle_s: float
    patience_s: float
    tokens: int = 1

    def patience_of(self, devices: int) -> float:
        """Return the wait for a number of devices: an edge computes their prompts one after another."""
        return self.patience_s + _DEVICE_S * devices


class Warming:
    def __init__(self, timing: CellTiming, clients: Sequence[Client], started: float) -> None:
        self._timing = timing
        self._clients = clients
        self._latest = started + timing.patience_of(len(clients))
        self._window: TimeWindow | None = None

    def window(self, now: float) -> TimeWindow | None:
        """Return the window once it is known; poll it."""
        if self._window is None:
            least = self._timing.tokens
            served = all(sum(text.tokens for text in client.texts[:least]) >= least for client in self._clients)
            if served or now >= self._latest:
                begin = now + self._timing.settle_s if served else now
                self._window = TimeWindow(begin, begin + self._timing.seconds)
        return self._window

    def over(self, now: float) -> bool:
        window = self.window(now)
        return window is not None and now >= window.end


Thing = TypeVar("Thing")


def texts_of(client: int, texts: Sequence[Thing]) -> Iterator[Thing]:
    """Yield a client's texts without end; each client begins with another."""
    return islice(cycle(texts), client, None)


@dataclass(slots=True)
class Measured:
    clients: list[Client]
    window: TimeWindow
    generations: list[Generation] = field(default_factory=list)
    as_recorded: list[bool] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)

    def bytes_per_token(self) -> tuple[float, float]:
        tokens = max(1, sum(len(each.tokens) for each in self.generations))
        up = sum(each.counters.uplink_bytes for each in self.generations)
        return up / tokens, sum(each.counters.downlink_bytes for each in self.generations) / tokens


class Devices(FleetLoad):
    """Devices that run one request after another; their pacings keep learning.

    A replayed request that leaves the recorded output ends there, because the record does not say how it continues.
    """

    def measure(
        self,
        texts: Sequence[Iterator[RecordedText]],
        timing: CellTiming,
        *,
        mode: Mode,
        replayed: bool = True,
        on_window: Callable[[], None] = lambda: None,
    ) -> Measured:
        """Let all devices generate until the window is over; running requests are cancelled then."""
        clients = [Client() for _ in self._agents]
        measured = Measured(clients, TimeWindow(0.0, 0.0))
        over = threading.Event()
        cancellations = [Cancellation() for _ in self._agents]
        threads = [
            threading.Thread(
                target=self._go_on, args=(n, texts[n], mode, replayed, cancellations[n], over, measured), daemon=True
            )
            for n in range(len(self._agents))
        ]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        warming = Warming(timing, clients, started)
        while (window := warming.window(time.monotonic())) is None or time.monotonic() < window.begin:
            time.sleep(_LOOK_S)
        on_window()
        time.sleep(max(0.0, window.end - time.monotonic()))
        on_window()
        over.set()
        for cancellation in cancellations:
            cancellation.cancel()
        deadline = time.monotonic() + _END_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        measured.window = window
        if stuck := sum(thread.is_alive() for thread in threads):
            measured.failed[f"not ended within {_END_S:.0f} s"] += stuck
        return measured

    def _go_on(
        self,
        number: int,
        texts: Iterator[RecordedText],
        mode: Mode,
        replayed: bool,
        cancellation: Cancellation,
        over: threading.Event,
        measured: Measured,
    ) -> None:
        agent, drafter = self._agents[number], self._drafters[number]
        for recorded in texts:
            if over.is_set():
                return
            text = TimedRequest(time.monotonic())
            measured.clients[number].texts.append(text)
            drafter.play(recorded)
            received: list[int] = []

            def take(
                new: Sequence[int],
                text: TimedRequest = text,
                received: list[int] = received,
                tokens: Sequence[int] = recorded.tokens,
            ) -> bool:
                text.pieces.append((time.monotonic(), len(new)))
                received.extend(new)
                return replayed and tuple(received) != tokens[: len(received)]

            try:
                done = agent.generate(
                    GenerateRequest(
                        recorded.prompt,
                        policy=recorded.policy.model_copy(update={"mode": mode}),
                        max_new_tokens=len(recorded.tokens),
                    ),
                    RequestContext(on_tokens=take, cancellation=cancellation),
                )
            except FleetError as error:
                measured.failed[f"{type(error).__name__}: {error}"] += not over.is_set()
                over.wait(_AFTER_FAILURE_S)
                continue
            if not over.is_set():
                text.ended_at = time.monotonic()
            measured.generations.append(done)
            if done.reason in (EndReason.STOP, EndReason.LENGTH):
                measured.as_recorded.append(done.tokens == recorded.tokens)


CELLS: Final = 256
"""Tokens of a prompt and its output, plus one."""

KV_BYTES: Final = 4 << 30


def serve(
    engine: Any,  # noqa: ANN401 - a `RawEngine`
    texts: Sequence[Iterator[RawPrompt]],
    timing: CellTiming,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[list[Client], TimeWindow]:
    """Serve clients until the window is over; return them, and the window."""
    started = clock()
    clients = [Client() for _ in texts]
    warming = Warming(timing, clients, started)

    def ask(slot: int, at: float) -> None:
        clients[slot].texts.append(TimedRequest(at))
        engine.begin(slot, next(texts[slot]))

    for slot in range(len(clients)):
        ask(slot, started)
    while not warming.over(clock()):
        for slot, written in engine.step().items():
            at, text = clock(), clients[slot].texts[-1]
            text.pieces.append((at, len(written.new)))
            if written.ended:
                text.ended_at = at
                ask(slot, at)
    window = warming.window(clock())
    assert window is not None
    return clients, window

"""Devices of one process that write text after text against a real edge, their draft models replayed."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

from benchmarks.harness import connected
from fleet_admin.planning.service_level import Client, TimedRequest, TimeWindow
from fleet_device.drafters.contract import TextCodec
from fleet_device.pacing.contract import Pacing
from fleet_device.requests.generate import Cancellation, GenerateRequest, Generation, RequestContext
from schemas.errors import FleetError
from schemas.policy import Mode
from schemas.reasons import EndReason
from schemas.vocabulary import Vocabulary
from tests.support.recorded_drafter import RecordedDrafter, RecordedText

_END_S: Final = 60.0
_LOOK_S: Final = 0.02
_AFTER_FAILURE_S: Final = 0.5
_DEVICE_S: Final = 0.3


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a cell takes (seconds).

    Attributes:
        seconds: Of the window that is counted.
        settle_s: Between the moment at which every client has had its first tokens and the window.
        patience_s: After which, and some more for each device, the window begins at the latest.
        tokens: How many first tokens that are.
    """

    seconds: float
    settle_s: float
    patience_s: float
    tokens: int = 1

    def patience_of(self, devices: int) -> float:
        """Return how long to wait for a number of devices: an edge computes their prompts one after another."""
        return self.patience_s + _DEVICE_S * devices


class Warming:
    """Finds the window of a measurement."""

    def __init__(self, timing: Timing, clients: Sequence[Client], started: float) -> None:
        self._timing = timing
        self._clients = clients
        self._latest = started + timing.patience_of(len(clients))
        self._window: TimeWindow | None = None

    def window(self, now: float) -> TimeWindow | None:
        """Return the window once it is known; to be asked now and then."""
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


class Arrivals(StrEnum):
    """How clients ask. Each has one text at a time.

    Attributes:
        AT_ONCE: All at the same moment, and for the next text as soon as one has ended.
        POISSON: Each after a pause that is exponentially distributed, as in a Poisson process.
    """

    AT_ONCE = "at-once"
    POISSON = "poisson"


@dataclass(frozen=True, slots=True)
class Arrival(Generic[Thing]):
    """A request.

    Attributes:
        pause_s: How long after the client's last text, or the beginning.
        text: What is asked for.
    """

    pause_s: float
    text: Thing

    @classmethod
    def of(
        cls, client: int, texts: Sequence[Thing], how: Arrivals, *, pause_s: float, seed: int
    ) -> "Iterator[Arrival[Thing]]":
        """Return the requests of a client, without end; the same for the same arguments.

        Args:
            client: Its number: it begins with that text, so that no two have the same one while there are enough.
            texts: What is asked for, in turn.
            how: When.
            pause_s: Mean pause (seconds); 0 where all ask at once.
            seed: Of the pauses.
        """
        rng = random.Random(f"{seed} {client}")
        place = client
        while True:
            pause = rng.expovariate(1.0 / pause_s) if how is Arrivals.POISSON and pause_s > 0.0 else 0.0
            yield cls(pause, texts[place % len(texts)])
            place += 1


@dataclass(slots=True)
class Measured:
    """What devices wrote.

    Attributes:
        clients: One for each device.
        window: In which it counts.
        generations: All texts, those that the end cut off too.
        as_recorded: Texts that came to their end, and of them those that are the recorded ones.
        failed: Texts that were not written, by reason.
    """

    clients: list[Client]
    window: TimeWindow
    generations: list[Generation] = field(default_factory=list)
    as_recorded: list[bool] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)

    def share(self, of: Callable[[Any], int], to: Callable[[Any], int]) -> float | None:
        """Return the ratio of two counters of the devices' over all texts; None if nothing was counted below."""
        below = sum(to(each.counters) for each in self.generations)
        return sum(of(each.counters) for each in self.generations) / below if below else None

    def bytes_per_token(self) -> tuple[float, float]:
        """Return the payload bytes up and down for each token that was written."""
        tokens = max(1, sum(len(each.tokens) for each in self.generations))
        up = sum(each.counters.uplink_bytes for each in self.generations)
        return up / tokens, sum(each.counters.downlink_bytes for each in self.generations) / tokens


class Follower:
    """Tells whether a text goes as a recorded one does.

    Args:
        tokens: The recorded one; none follows anything.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tuple(tokens)
        self._length = 0

    def take(self, new: Sequence[int]) -> bool:
        """Return whether the text still does with these tokens behind it."""
        expected = self._tokens[self._length : self._length + len(new)]
        self._length += len(new)
        return not self._tokens or tuple(new) == expected


class Devices(AbstractContextManager["Devices"]):
    """Devices, connected.

    Args:
        port: The broker's, or a relay's.
        fleet: Topic level.
        codec: Text side of the vocabulary.
        vocabulary: The target's.
        token_s: Time of a draft token (seconds).
        draft: Quantization of the draft model that was recorded.
        pacings: One for each device; they go on learning from one text to the next.
        mode: Of verification.
        replayed: Whether drafts are replayed: a text that takes another turn than the recorded one ends there, since
            what was recorded says nothing of how it goes on.
    """

    def __init__(
        self,
        port: int,
        fleet: str,
        codec: TextCodec,
        vocabulary: Vocabulary,
        *,
        token_s: float,
        draft: str,
        pacings: Sequence[Pacing],
        mode: Mode,
        replayed: bool = True,
    ) -> None:
        self._mode = mode
        self._replayed = replayed
        self._drafters = [RecordedDrafter(codec, vocabulary, token_s=token_s, quantization=draft) for _ in pacings]
        self._connect = partial(connected, port, fleet, self._drafters, pacing=iter(pacings).__next__)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._agents = self._stack.enter_context(self._connect())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def measure(
        self,
        arrivals: Sequence[Iterator[Arrival[RecordedText]]],
        timing: Timing,
        *,
        on_window: Callable[[], None] = lambda: None,
    ) -> Measured:
        """Have all devices write until the window is over; texts that are under way then are cancelled."""
        clients = [Client() for _ in self._agents]
        measured = Measured(clients, TimeWindow(0.0, 0.0))
        over = threading.Event()
        cancellations = [Cancellation() for _ in self._agents]
        threads = [
            threading.Thread(target=self._write, args=(n, arrivals[n], cancellations[n], over, measured), daemon=True)
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

    def _write(
        self,
        number: int,
        arrivals: Iterator[Arrival[RecordedText]],
        cancellation: Cancellation,
        over: threading.Event,
        measured: Measured,
    ) -> None:
        agent, drafter = self._agents[number], self._drafters[number]
        for arrival in arrivals:
            if over.wait(arrival.pause_s) or over.is_set():
                return
            text, recorded = TimedRequest(time.monotonic()), arrival.text
            measured.clients[number].texts.append(text)
            drafter.play(recorded)
            follows = Follower(recorded.tokens if self._replayed else ())

            def take(new: Sequence[int], text: TimedRequest = text, follows: Follower = follows) -> bool:
                text.pieces.append((time.monotonic(), len(new)))
                return not follows.take(new)

            try:
                done = agent.generate(
                    GenerateRequest(
                        recorded.prompt,
                        policy=recorded.policy.model_copy(update={"mode": self._mode}),
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

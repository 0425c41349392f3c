"""Measures of an edge under played sessions: time of an answer beside a bare echo, and what it holds at saturation."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, Final, Self

import numpy as np
import psutil

from benchmarks.overhead.played import PlayedSession
from benchmarks.overhead.player import Connection, Echoed, Played, Player, Tally

__all__ = ["Answers", "Saturation", "answer_times", "saturate"]

_BLOCK: Final = 100
_WARM_UP: Final = 50
_SETTLE_S: Final = 2.0
_names = count()


@dataclass(frozen=True, slots=True)
class Answers:
    """Times of answers, one after another.

    Attributes:
        of: What answered.
        number: Answers.
        p50_ms: Median.
        p99_ms: 99th percentile.
    """

    of: str
    number: int
    p50_ms: float
    p99_ms: float

    @classmethod
    def from_times(cls, of: str, times_s: Sequence[float]) -> Self:
        """Sum up."""
        p50, p99 = np.percentile(times_s, [50, 99]) * 1e3
        return cls(of, len(times_s), float(p50), float(p99))


@dataclass(frozen=True, slots=True)
class Saturation:
    """Many devices, each with a draft under way.

    Attributes:
        mode: Of verification.
        devices: How many.
        seconds: Counted.
        verdicts: In that time.
        p50_ms: Median of the time of a verdict.
        p99_ms: 99th percentile.
        edge: Share of one core that the edge took.
        broker: Likewise the broker.
        load: Likewise the devices.
        wrong: Verdicts that were not as recorded.
    """

    mode: str
    devices: int
    seconds: float
    verdicts: int
    p50_ms: float
    p99_ms: float
    edge: float
    broker: float
    load: float
    wrong: int

    @property
    def per_s(self) -> float:
        """Verdicts a second."""
        return self.verdicts / self.seconds

    @property
    def cpu_us(self) -> float:
        """The edge's processor time for a verdict."""
        return self.edge * self.seconds / max(1, self.verdicts) * 1e6

    @property
    def limit(self) -> str:
        """What limits: whoever has a core for itself and all of it, or nobody."""
        if self.edge >= 0.9:
            return "the edge's core"
        if self.broker + self.load >= 0.9:
            return "the core of broker and devices"
        return "neither core: the machine is busy with other work"

    def json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "verdicts_per_s": self.per_s, "edge_cpu_us": self.cpu_us, "limit": self.limit}


def answer_times(
    port: int, fleet: str, *, edge: str, echo: str, sessions: dict[str, Sequence[PlayedSession]], number: int
) -> list[Answers]:
    """Time answers of the edge in each mode, and of an echo, in turns; each by one device.

    Args:
        port: The broker's.
        fleet: Topic level.
        edge: The edge's name.
        echo: The echo's.
        sessions: By mode.
        number: Answers of each.
    """
    tallies = {name: Tally() for name in ("echo", *sessions)}
    connections: dict[str, Connection] = {"echo": Echoed(port, fleet, _name(), echo, tallies["echo"])}
    for mode, played in sessions.items():
        connections[mode] = Played(port, fleet, _name(), edge, tallies[mode], sessions=played, first=0)
    players = {name: Player([connection]) for name, connection in connections.items()}
    times: dict[str, list[float]] = {name: [] for name in players}
    try:
        for name, player in players.items():
            _serve(player, tallies[name], _WARM_UP)
        for _ in range(-(-number // _BLOCK)):
            for name, player in players.items():
                times[name] += _serve(player, tallies[name], _BLOCK)
    finally:
        for player in players.values():
            player.__exit__(None, None, None)
    return [Answers.from_times(name, found) for name, found in times.items()]


def saturate(
    port: int,
    fleet: str,
    *,
    edge: str,
    mode: str,
    sessions: Sequence[PlayedSession],
    devices: int,
    seconds: float,
    pids: tuple[int, int],
) -> Saturation:
    """Have devices send as fast as they are answered.

    Args:
        port: The broker's.
        fleet: Topic level.
        edge: The edge's name.
        mode: Of the sessions.
        sessions: What is played.
        devices: How many.
        seconds: Counted, after as many as it takes to settle.
        pids: Of the edge's process, and of the broker's.
    """
    tally = Tally()
    connections = [Played(port, fleet, _name(), edge, tally, sessions=sessions, first=n) for n in range(devices)]
    processes = [*(psutil.Process(pid) for pid in pids), psutil.Process()]
    with Player(connections) as player:
        player.serve(_SETTLE_S)
        first, before, began = len(tally.times_s), [_cpu_s(each) for each in processes], time.perf_counter()
        player.serve(seconds)
        took = time.perf_counter() - began
        edge_share, broker_share, load_share = (
            (_cpu_s(each) - then) / took for each, then in zip(processes, before, strict=True)
        )
        times = tally.times_s[first:]
    p50, p99 = np.percentile(times, [50, 99]) * 1e3
    shares = (edge_share, broker_share, load_share)
    return Saturation(mode, devices, took, len(times), float(p50), float(p99), *shares, tally.wrong)


def _serve(player: Player, tally: Tally, number: int) -> list[float]:
    """Return so many times; an answer that has waited since the last turn is left out."""
    first = len(tally.times_s) + 1
    player.until(lambda: len(tally.times_s) >= first + number)
    return tally.times_s[first:]


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _name() -> str:
    return f"device-{next(_names)}"

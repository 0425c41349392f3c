"""Kinds of faults: what is done to a fleet, for how long, and how it ends."""

import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from benchmarks.faults.fleet import EDGE, DisturbedFleet

Act = Callable[[DisturbedFleet, random.Random], contextlib.AbstractContextManager[None]]
"""Begins a fault on entry and ends it on exit, when the fleet may go on: an edge is online, a broker listens."""

_HOUR_S: Final = 3600.0
_FAR_S: Final = 2.0
_LOSS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind.

    Attributes:
        name: On the command line and in reports.
        summary: What is done.
        seconds: Between these two it lasts, the time that its end takes left out.
        quick: The same for a quick run.
        act: Does it.
    """

    name: str
    summary: str
    seconds: tuple[float, float]
    act: Act
    quick: tuple[float, float] | None = None

    def duration_s(self, rng: random.Random, *, quick: bool) -> float:
        """Return how long it lasts this time."""
        return rng.uniform(*(self.quick if quick and self.quick else self.seconds))


@contextlib.contextmanager
def _edge_kill(fleet: DisturbedFleet, _rng: random.Random) -> Iterator[None]:
    fleet.kill_edge()
    yield
    fleet.start_edge()


@contextlib.contextmanager
def _edge_stop(fleet: DisturbedFleet, _rng: random.Random) -> Iterator[None]:
    fleet.signal_edge(signal.SIGSTOP)
    try:
        yield
    finally:
        fleet.signal_edge(signal.SIGCONT)


@contextlib.contextmanager
def _broker_kill(fleet: DisturbedFleet, _rng: random.Random) -> Iterator[None]:
    fleet.broker.kill()
    yield
    fleet.broker.start()


@contextlib.contextmanager
def _broker_restart(fleet: DisturbedFleet, _rng: random.Random) -> Iterator[None]:
    fleet.broker.stop()
    yield
    fleet.forget_retained()
    fleet.broker.start()


@contextlib.contextmanager
def _device_kill(fleet: DisturbedFleet, rng: random.Random) -> Iterator[None]:
    name = rng.choice(fleet.names)
    fleet.kill_device(name)
    yield
    fleet.start_devices([name])


def _clients_of(fleet: DisturbedFleet, rng: random.Random) -> list[str]:
    """Choose whose line is concerned: the edge's, a device's, several devices', everybody's."""
    several = rng.sample(fleet.names, k=max(2, len(fleet.names) // 2)) if len(fleet.names) > 1 else list(fleet.names)
    return rng.choice([[EDGE], [rng.choice(fleet.names)], several, [EDGE, *fleet.names]])


@contextlib.contextmanager
def _link_cut(fleet: DisturbedFleet, rng: random.Random) -> Iterator[None]:
    relays = [fleet.relays[name] for name in _clients_of(fleet, rng)]
    for relay in relays:
        relay.isolate()
    yield
    for relay in relays:
        relay.reunite()


@contextlib.contextmanager
def _link_stall(fleet: DisturbedFleet, rng: random.Random) -> Iterator[None]:
    relays = [fleet.relays[name] for name in _clients_of(fleet, rng)]
    for relay in relays:
        relay.stall()
    try:
        yield
    finally:
        for relay in relays:
            relay.release()


@contextlib.contextmanager
def _link_loss(fleet: DisturbedFleet, rng: random.Random) -> Iterator[None]:
    names = _clients_of(fleet, rng)
    for name in names:
        fleet.relays[name].loss = _LOSS
    yield
    for name in names:
        fleet.relays[name].cut()
        fleet.relays[name].loss = 0.0


@contextlib.contextmanager
def _link_far(fleet: DisturbedFleet, rng: random.Random) -> Iterator[None]:
    relays = [fleet.relays[name] for name in _clients_of(fleet, rng)]
    for relay in relays:
        relay.round_trip_s = _FAR_S
    yield
    for relay in relays:
        relay.round_trip_s = 0.0


@contextlib.contextmanager
def _database_away(fleet: DisturbedFleet, _rng: random.Random) -> Iterator[None]:
    with fleet.locked_database():
        yield


@contextlib.contextmanager
def _disk_full(fleet: DisturbedFleet, _rng: random.Random) -> Iterator[None]:
    pid = fleet.edge_pid
    fleet.disk.fill(pid)
    try:
        yield
    finally:
        fleet.disk.free(pid)


@contextlib.contextmanager
def _clock_jump(fleet: DisturbedFleet, rng: random.Random) -> Iterator[None]:
    fleet.clock.set(rng.choice((-_HOUR_S, _HOUR_S)))
    yield
    fleet.clock.set(0.0)


@contextlib.contextmanager
def _clock_and_restart(fleet: DisturbedFleet, rng: random.Random) -> Iterator[None]:
    fleet.clock.set(rng.choice((-_HOUR_S, _HOUR_S)))
    time.sleep(rng.uniform(0.2, 1.0))
    fleet.kill_edge()
    yield
    fleet.clock.set(0.0)
    fleet.start_edge()


@contextlib.contextmanager
def _certificates(fleet: DisturbedFleet, rng: random.Random) -> Iterator[None]:
    fleet.renew_certificates(_clients_of(fleet, rng))
    yield


_SHORT: Final = (0.1, 2.0)
_LINE: Final = (1.0, 8.0)

_ALL: Final = (
    Fault("edge-kill", "SIGKILL of the edge, which is started again", _SHORT, _edge_kill),
    Fault("edge-stop", "SIGSTOP of the edge for 40 s, then SIGCONT", (40.0, 40.0), _edge_stop, (5.0, 12.0)),
    Fault("broker-kill", "SIGKILL of the broker, which is started again", _SHORT, _broker_kill),
    Fault("broker-restart", "the broker stops and starts without anything that it has kept", _SHORT, _broker_restart),
    Fault("device-kill", "SIGKILL of a device, which is started again", _SHORT, _device_kill),
    Fault("link-cut", "connections of some end, and new ones as they come", (0.1, 4.0), _link_cut),
    Fault("link-stall", "lines of some pass nothing, and no end is notified", _LINE, _link_stall),
    Fault("link-loss", "lines of some lose one segment in ten, and are reset at the end", (2.0, 6.0), _link_loss),
    Fault("link-far", "lines of some take 2 s there and back", (4.0, 10.0), _link_far),
    Fault("database-away", "the database is locked for 60 s", (60.0, 60.0), _database_away, (6.0, 12.0)),
    Fault("disk-full", "no room for the database nor for the spool", (2.0, 12.0), _disk_full),
    Fault("clock-jump", "the clocks of edge and devices jump by an hour, and back", (0.5, 3.0), _clock_jump),
    Fault("clock-restart", "they jump, the edge is killed, they jump back, it is started", _SHORT, _clock_and_restart),
    Fault("certificates", "certificates of some are renewed", _SHORT, _certificates),
)

FAULTS: Final[Mapping[str, Fault]] = {fault.name: fault for fault in _ALL}

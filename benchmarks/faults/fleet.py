"""Fleet that can be disturbed: a mosquitto with certificates, one edge, writers, and a relay before each client."""

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.client_process import Identity
from benchmarks.faults.disk import Disk
from benchmarks.faults.tally import Tally
from benchmarks.faults.writer import Task
from benchmarks.processes import BenchError, Program
from broker_config.processes import LocalBroker
from broker_config.site import AUTHORITY, make_local_broker
from fleet_common.identity.authority import Authority
from fleet_common.identity.files import write_atomically
from tests.support.offset_clock import VARIABLE, OffsetClock
from tests.support.relay import Relay

FLEET: Final = "home"
EDGE: Final = "edge-1"
_ONLINE_S: Final = 60.0
_READY_S: Final = 120.0
_SETTLED_S: Final = 90.0  # a lease, and then some
_WRITTEN_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class Load:
    """What the devices write."""

    devices: int = 8
    shortest: int = 40
    longest: int = 160
    token_s: float = 0.02
    pause_s: float = 0.1
    kv_tokens: int = 1 << 20


@dataclass(slots=True)
class DisturbedFleet:
    """A fleet, running, and what can be done to it. Use `run` to have one."""

    folder: Path
    load: Load
    seed: int
    tally: Tally
    broker: LocalBroker
    disk: Disk
    clock: OffsetClock
    relays: dict[str, Relay]
    devices: dict[str, Program] = field(default_factory=dict)
    edge: Program | None = None
    _starts: int = 0

    @classmethod
    @contextlib.contextmanager
    def run(cls, folder: Path, load: Load, *, seed: int) -> Iterator["DisturbedFleet"]:
        """Make a fleet in a folder, start it, and have its devices write.

        Raises:
            BenchError: It does not start, or a device does not write.
        """
        names = [f"device-{number}" for number in range(1, load.devices + 1)]
        folder.mkdir(parents=True, exist_ok=True)
        home = folder / "broker"
        make_local_broker(home, fleet=FLEET, edges=(EDGE,), devices=names, port=8883)
        clock_file = folder / "clock"
        with contextlib.ExitStack() as stack:
            broker = stack.enter_context(LocalBroker(home, port=0))
            disk = stack.enter_context(Disk(folder / "disk"))
            relays = {
                name: stack.enter_context(Relay(broker.port, rng=random.Random(f"{seed}-{name}")))
                for name in (EDGE, *names)
            }
            fleet = cls(folder, load, seed, Tally(), broker, disk, OffsetClock(clock_file), relays)
            stack.callback(fleet._end)
            fleet.start_edge()
            fleet.start_devices(names)
            yield fleet

    @property
    def database(self) -> Path:
        return self.disk.folder / "log.sqlite3"

    @property
    def names(self) -> Sequence[str]:
        return [name for name in self.relays if name != EDGE]

    # The edge

    def start_edge(self) -> None:
        """Start an edge, and return when it is online; what it knew is in the session log alone.

        Raises:
            BenchError: It does not start.
        """
        config = self.folder / "edge.toml"
        settings = {
            "fleet": FLEET,
            "edge": EDGE,
            "db": f"sqlite:///{self.database}",
            "spool": str(self.disk.folder / "spool"),
            "threads": 1,
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        lines += ["", "[broker]"]
        lines += [
            f"{key} = {json.dumps(str(value) if isinstance(value, Path) else value)}"
            for key, value in self._identity(EDGE).settings().items()
        ]
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.edge = self._program(
            "tests.support.scripted_edge_process", [str(config), "--kv-tokens", str(self.load.kv_tokens)], log="edge"
        )
        self.edge.wait_for('"online"', timeout_s=_ONLINE_S)

    def kill_edge(self) -> None:
        """End the edge without a word."""
        if self.edge is not None:
            self.edge.kill()
            self.edge.end()
            self.edge = None
            self.tally.edge_kills += 1

    def signal_edge(self, number: int) -> None:
        if self.edge is not None:
            self.edge.send_signal(number)

    @property
    def edge_pid(self) -> int:
        """Process id of the edge.

        Raises:
            BenchError: There is none.
        """
        if self.edge is None or not self.edge.lives:
            raise BenchError(f"The edge has ended unasked; see {self.folder}/edge.log.")
        return self.edge.pid

    # Devices

    def start_devices(self, names: Sequence[str]) -> None:
        """Start writers, and return when they are.

        Raises:
            BenchError: One does not start.
        """
        for name in names:
            self._starts += 1
            task = Task(
                fleet=FLEET,
                identity=self._identity(name),
                seed=f"{self.seed}-{name}-{self._starts}",
                shortest=self.load.shortest,
                longest=self.load.longest,
                token_s=self.load.token_s,
                pause_s=self.load.pause_s,
            )
            device = self._program("benchmarks.faults.writer", [], log=name, on_line=partial(self.tally.take, name))
            device.tell(task.to_json())
            self.devices[name] = device
        for name in names:
            self.devices[name].wait_for('"ready"', timeout_s=_READY_S)

    def kill_device(self, name: str) -> None:
        """End a writer without a word."""
        self.devices[name].kill()
        self.devices[name].end()
        self.tally.killed[name] += 1

    # Broker, line and files

    def forget_retained(self) -> None:
        """Remove what a stopped broker has kept."""
        for kept in (self.folder / "broker" / "retained").glob("*"):
            kept.unlink()

    def renew_certificates(self, names: Sequence[str]) -> None:
        """Do what an operator's rollout does: new certificates in the places of the old ones."""
        authority = Authority.open(self.folder / "broker" / AUTHORITY, actor="bench")
        for name in names:
            certificate = self.broker.identity(name).certificate
            write_atomically(certificate, authority.renew(name, early=True).pem.encode(), mode=0o644)

    @contextlib.contextmanager
    def locked_database(self) -> Iterator[None]:
        """Hold the database's lock, as a backup or another program may: writers wait, and then go on without it."""
        with contextlib.closing(sqlite3.connect(self.database, timeout=30.0, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            finally:
                connection.execute("ROLLBACK")

    # The end

    def stop(self) -> None:
        """Have every device end its text, wait until the log has nothing open, and end the edge.

        Raises:
            BenchError: A device or the edge has ended unasked.
        """
        for name, device in self.devices.items():
            if not device.lives:
                raise BenchError(f"{name} has ended unasked; see {device.log}.")
        for device in self.devices.values():
            device.ask_to_end()
        for device in self.devices.values():
            device.end()
        self._wait_until_settled()
        assert self.edge_pid
        if self.edge is not None:
            self.edge.end()
            self.edge = None
        shutil.copy(self.database, self.folder)  # its own folder may be in memory

    def _wait_until_settled(self) -> None:
        """Wait until no session is open, which takes a lease where a device was killed."""
        deadline = time.monotonic() + _SETTLED_S
        time.sleep(_WRITTEN_S)
        while time.monotonic() < deadline:
            with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
                (left,) = connection.execute("SELECT count(*) FROM sessions WHERE reason IS NULL").fetchone()
            if not left:
                return
            time.sleep(0.5)

    def _end(self) -> None:
        for relay in self.relays.values():
            relay.release()
        for device in self.devices.values():
            device.send_signal(signal.SIGCONT)
            device.ask_to_end()
        for device in self.devices.values():
            device.end()
        if self.edge is not None:
            self.edge.send_signal(signal.SIGCONT)
            self.edge.end()

    def _identity(self, name: str) -> Identity:
        files = self.broker.identity(name)
        port = self.relays[name].port
        return Identity(name, "127.0.0.1", port, str(files.ca), str(files.certificate), str(files.key))

    def _program(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        log: str,
        on_line: Callable[[dict[str, Any]], None] | None = None,
    ) -> Program:
        return Program(
            module,
            arguments,
            cores=os.sched_getaffinity(0),
            log=self.folder / f"{log}.log",
            on_line=on_line or (lambda _line: None),
            environment={VARIABLE: str(self.folder / "clock"), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )

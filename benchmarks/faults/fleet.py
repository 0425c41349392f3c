"""A fleet with faults: a mosquitto with certificates, one edge, writers, and a relay before each client."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

from benchmarks.faults.writer import Load
from benchmarks.processes import BenchError
from broker_config.site import AUTHORITY, make_local_broker
from fleet_common.identity.authority import Authority
from fleet_common.identity.files import write_atomically
from schemas.reasons import EndReason
from tests.support.local_broker import LocalBroker
from tests.support.offset_clock import VARIABLE, OffsetClock
from tests.support.processes import BrokerClient, Program, scripted_edge
from tests.support.relay import Relay

_BYTES: Final = 64 << 20
_CHUNK: Final = 64 << 10


class Disk:
    """A small file system in memory, if it can be mounted; else a folder, and a limit on the edge's files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.how = ""
        self._mounted = False

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            command = ["/bin/mount", "-t", "tmpfs", "-o", f"size={_BYTES}", "fleet-bench", str(self.folder)]
            with contextlib.suppress(OSError):
                self._mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
        self.how = "a tmpfs is filled" if self._mounted else "RLIMIT_FSIZE of the edge is 0"
        return self

    def __exit__(self, *_: object) -> None:
        if self._mounted:
            subprocess.run(["/bin/umount", "--lazy", str(self.folder)], check=False)

    def fill(self, pid: int) -> None:
        if not self._mounted:
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
            return
        chunk = bytes(_CHUNK)
        with contextlib.suppress(OSError), self._ballast.open("wb", buffering=0) as file:
            while file.write(chunk):
                pass

    def free(self, pid: int) -> None:
        if not self._mounted:
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
            return
        self._ballast.unlink(missing_ok=True)

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"


@dataclass(frozen=True, slots=True)
class EndedText:
    """A request that its device has ended, complete or cancelled."""

    device: str
    reason: str
    tokens: int


@dataclass(slots=True)
class FaultTally:
    """What the devices report.

    Attributes:
        running: Tokens of each device's present request so far.
        unconfirmed: Sessions whose Close no edge had confirmed in time; the device repeats it while it runs.
        left: Those of the requests of each device that was killed: it may have ended one and not reported it.
    """

    texts: dict[str, EndedText] = field(default_factory=dict)
    by_mode: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)
    broken_off: list[str] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    killed: Counter[str] = field(default_factory=Counter)
    running: Counter[str] = field(default_factory=Counter)
    left: dict[str, list[int]] = field(default_factory=dict)
    edge_kills: int = 0
    resumes: int = 0
    unconfirmed: set[str] = field(default_factory=set)
    _commits: dict[str, list[float]] = field(default_factory=dict)
    _heard: threading.Condition = field(default_factory=threading.Condition)

    def take(self, device: str, event: dict[str, Any]) -> None:
        """Take an event of a writer's process. Thread-safe."""
        with self._heard:
            match event:
                case {"event": "tokens", "at": at, "number": number}:
                    self.tokens += number
                    self.running[device] += number
                    self._commits.setdefault(device, []).append(at)
                    self._heard.notify_all()
                case {"event": "text", "session": session, "reason": reason, "written": written}:
                    self.texts[session] = EndedText(device, reason, written)
                    self.running[device] = 0
                    self.by_mode[event["mode"]] += 1
                    self.resumes += event["resumes"]
                    if not event["confirmed"]:
                        self.unconfirmed.add(session)
                    self._wrong(event)
                case {"event": "failed", "sentence": sentence, "written": written}:
                    (self.broken_off if written else self.refused).append(sentence)
                    self.failed[device] += 1
                    self.running[device] = 0
                    self._wrong(event)

    def kill(self, device: str) -> None:
        """Note that a device was killed, once all that it has reported is here."""
        with self._heard:
            self.killed[device] += 1
            self.left.setdefault(device, []).append(self.running.pop(device, 0))

    def forget_moments(self) -> None:
        with self._heard:
            self._commits.clear()

    def wait_for_all(self, devices: int, *, since: float, timeout_s: float) -> dict[str, float]:
        """Wait until `devices` devices have committed a token after `since` (monotonic), or for `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        with self._heard:
            while len(found := self._firsts(since)) < devices and (left := deadline - time.monotonic()) > 0:
                self._heard.wait(min(left, 0.5))
            return found

    def _firsts(self, since: float) -> dict[str, float]:
        return {
            device: first - since
            for device, moments in self._commits.items()
            if (first := next((at for at in moments if at > since), None)) is not None
        }

    def _wrong(self, event: dict[str, Any]) -> None:
        if event["wrong"] is not None:
            self.wrong[event["wrong"]] += 1


FLEET: Final = "home"
EDGE: Final = "edge-1"
_READY_S: Final = 120.0
_ENDED_S: Final = 300.0
_SETTLED_S: Final = 90.0  # a lease, and then some
_WRITTEN_S: Final = 3.0


@dataclass(slots=True)
class DisturbedFleet:
    """A running fleet, and the faults that can be injected. Use `run` to make one."""

    folder: Path
    load: Load
    seed: int
    tally: FaultTally
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
        """Make a fleet in a folder, start it, and let its devices generate."""
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
            fleet = cls(folder, load, seed, FaultTally(), broker, disk, OffsetClock(clock_file), relays)
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

    def start_edge(self) -> None:
        """Start an edge, and return when it is online; its state comes from the session log alone."""
        self.edge = scripted_edge(
            self._identity(EDGE),
            fleet=FLEET,
            folder=self.folder,
            data=self.disk.folder,
            cores=os.sched_getaffinity(0),
            words=["--kv-tokens", str(self.load.kv_tokens), *["--letters"] * self.load.structured],
            environment=self._environment,
            threads=1,
        )

    def kill_edge(self) -> None:
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
        if self.edge is None or not self.edge.lives:
            raise BenchError(f"The edge has ended unasked; see {self.folder}/edge.log.")
        return self.edge.pid

    def start_devices(self, names: Sequence[str]) -> None:
        for name in names:
            self._starts += 1
            identity, seed = asdict(self._identity(name)), f"{self.seed}-{name}-{self._starts}"
            task = {"fleet": FLEET, "identity": identity, "seed": seed, "load": asdict(self.load)}
            device = Program(
                "benchmarks.faults.writer",
                cores=os.sched_getaffinity(0),
                log=self.folder / f"{name}.log",
                on_line=partial(self.tally.take, name),
                environment=self._environment,
            )
            device.tell(json.dumps(task))
            self.devices[name] = device
        for name in names:
            self.devices[name].wait_for('"ready"', timeout_s=_READY_S)

    def kill_device(self, name: str) -> None:
        self.devices[name].kill()
        self.devices[name].end()
        self.tally.kill(name)

    def forget_retained(self) -> None:
        """Remove the retained messages of a stopped broker."""
        for kept in (self.folder / "broker" / "retained").glob("*"):
            kept.unlink()

    def renew_certificates(self, names: Sequence[str]) -> None:
        """Replace certificates as an operator's rollout does."""
        authority = Authority.open(self.folder / "broker" / AUTHORITY, actor="bench")
        for name in names:
            certificate = self.broker.identity(name).certificate
            write_atomically(certificate, authority.renew(name, early=True).pem.encode(), mode=0o644)

    @contextlib.contextmanager
    def locked_database(self) -> Iterator[None]:
        """Hold the database's lock, as a backup may: writers wait, and then continue without it."""
        with contextlib.closing(sqlite3.connect(self.database, timeout=30.0, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            finally:
                connection.execute("ROLLBACK")

    def stop(self) -> None:
        """Let every device end its request, wait until the log has nothing open, and end the edge."""
        for name, device in self.devices.items():
            if not device.lives:
                raise BenchError(f"{name} has ended unasked; see {device.log}.")
        for device in self.devices.values():
            device.ask_to_end()
        for device in self.devices.values():
            device.wait_to_end(timeout_s=_ENDED_S)
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

    def _identity(self, name: str) -> BrokerClient:
        return BrokerClient.at(self.broker, name, port=self.relays[name].port)

    @property
    def _environment(self) -> Mapping[str, str]:
        return {VARIABLE: str(self.folder / "clock"), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


_NOT_WHOLE: Final = (EndReason.LOST.value, EndReason.FAILED.value, EndReason.CANCELLED.value)


def disagreements(database: Path, tally: FaultTally) -> list[str]:
    """Return a message for each session on which the log and its device disagree.

    What a device has ended must be in the log with its reason and its number of tokens. Other sessions in the log must
    be marked incomplete, and there may be no more of them than failed requests and killed processes. A device that was
    killed may have ended its last request and not reported it: then the log has all tokens of that. Or it has ended one
    whose Close no edge had confirmed, which it repeats until it is killed, or ends: then its lease ends it. Where a
    device and its edge were killed, a session may still be open: only housekeeping ends it, hours later.
    """
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT session, device, reason, tokens, device_tokens FROM sessions").fetchall()
    logged = {session: tuple(rest) for session, *rest in rows}
    return [*_of_ended(logged, tally), *_of_others(logged, tally)]


def _of_ended(logged: dict[str, tuple[object, ...]], tally: FaultTally) -> Iterator[str]:
    unreported = Counter(tally.killed)
    # The last of each device, at its end; one that was cancelled before an edge took it has no Close to confirm.
    ended = {text.device: session for session, text in tally.texts.items() if text.tokens}
    for session, text in tally.texts.items():
        row = logged.get(session)
        if row == (text.device, "lost", text.tokens, None):
            if session in tally.unconfirmed and ended[text.device] == session:
                continue
            if unreported[text.device]:
                unreported[text.device] -= 1
                continue
        if row is None:
            if text.tokens:  # one that was cancelled before an edge took it leaves no row
                yield f"{session} of {text.device} is not in the log; it has {text.tokens} tokens"
            continue
        expected = (text.device, text.reason, text.tokens, text.tokens)
        if row != expected:
            yield f"{session}: the log says {row}, its device {expected}"


def _of_others(logged: dict[str, tuple[object, ...]], tally: FaultTally) -> Iterator[str]:
    others: Counter[str] = Counter()
    left = {device: list(tokens) for device, tokens in tally.left.items()}
    for session, (device, reason, tokens, device_tokens) in logged.items():
        if session in tally.texts:
            continue
        others[str(device)] += 1
        if reason is None and tally.edge_kills and tally.killed[str(device)]:
            continue
        if reason not in _NOT_WHOLE:
            unreported = left.get(str(device), [])
            if reason is not None and tokens == device_tokens and tokens in unreported:
                unreported.remove(tokens)
                continue
            yield f"{session} of {device} did not end at its device; the log says {reason}"
    for device, number in others.items():
        most = tally.failed[device] + tally.killed[device]
        if number > most:
            yield f"{device} has {number} sessions in the log that it does not know, and can have left {most}"

"""Child processes of the benchmarks: their cores and their standard output."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from broker_config.processes import LocalBroker, ThrowAwayBroker
from fleet_common.mqtt.settings import TlsSettings
from fleet_device.requests.generate import Cancellation
from schemas.errors import FleetError
from tests.support.raw_client import RawClient

_START_S: Final = 120.0
_STOP_S: Final = 15.0


class BenchError(FleetError):
    """The benchmark cannot go on. Its text is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Cores:
    edge: frozenset[int]
    others: frozenset[int]

    @classmethod
    def choose(cls, available: Collection[int]) -> Self:
        """Give the edge half of the cores for itself, if there are two; else all share one."""
        cores = sorted(available)
        half = (len(cores) + 1) // 2
        if len(cores) < 2:
            return cls(frozenset(cores), frozenset(cores))
        return cls(frozenset(cores[-half:]), frozenset(cores[: len(cores) - half]))

    @property
    def apart(self) -> bool:
        return not self.edge & self.others


def call(*words: object) -> str:
    """Run a program, and return its output; raise BenchError if it fails."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{words[0]} failed: {' '.join((done.stderr or done.stdout).split())[-600:]}")
    return done.stdout


def venv(folder: Path, *packages: str) -> Path:
    """Return the folder of programs of a virtual environment; it is made with the packages if it is missing."""
    programs = folder / "bin"
    if not (programs / "complete").exists():
        print(f"Installing {', '.join(packages)} in {folder} …", file=sys.stderr, flush=True)
        call(sys.executable, "-m", "venv", folder)
        call(programs / "python", "-m", "pip", "--disable-pip-version-check", "--quiet", "install", *packages)
        (programs / "complete").touch()
    return programs


@contextlib.contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """Run this thread, and processes that it starts meanwhile, on these cores: a child has its parent's cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Program:
    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        *,
        cores: Collection[int],
        log: Path,
        on_line: Callable[[dict[str, Any]], None] = lambda _line: None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        self._on_line = on_line
        self._lines: list[str] = []
        self._arrived = threading.Condition()
        with on_cores(cores), log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read, name=f"read-{module}", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def wait_for(self, word: str, *, timeout_s: float) -> str:
        """Return the first line that contains `word`."""

        def found() -> bool:
            return not self._reader.is_alive() or any(word in line for line in self._lines)

        with self._arrived:
            self._arrived.wait_for(found, timeout_s)
            line = next((line for line in self._lines if word in line), None)
        if line is None:
            tail = self.log.read_text(errors="replace")[-500:].strip().replace("\n", " ")
            raise BenchError(f"{self.log.stem} did not say {word!r} in {timeout_s:.0f} s; its log ends with: {tail}")
        return line

    def wait_to_end(self, *, timeout_s: float) -> None:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise BenchError(f"{self.log.stem} has not ended within {timeout_s:.0f} s.") from None
        self._reader.join(_STOP_S)

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.lives:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it, as a power failure would."""
        self._process.kill()
        self._process.wait()

    def ask_to_end(self) -> None:
        if self.lives:
            self._process.terminate()

    def end(self) -> list[str]:
        """End it, wait, and return all its output. Idempotent."""
        self.ask_to_end()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(_STOP_S)
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        return self._lines

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                with contextlib.suppress(ValueError):
                    decoded = json.loads(line)
                    if isinstance(decoded, dict):
                        self._on_line(decoded)
                if '"tokens"' not in line:
                    with self._arrived:
                        self._lines.append(line)
                        self._arrived.notify_all()
        with self._arrived:
            self._arrived.notify_all()


@dataclass(frozen=True, slots=True)
class BrokerClient:
    """A client, and the broker that takes it: by its certificate, or without TLS by its name."""

    name: str
    host: str
    port: int
    ca: str = ""
    certificate: str = ""
    key: str = ""

    @classmethod
    def at(cls, broker: ThrowAwayBroker, name: str, *, port: int | None = None) -> Self:
        """Return a client of a running broker, or of a relay before it."""
        port = broker.broker.port_of(name) if port is None else port
        if not isinstance(broker, LocalBroker):
            return cls(name, "127.0.0.1", port)
        files = broker.identity(name)
        return cls(name, "127.0.0.1", port, str(files.ca), str(files.certificate), str(files.key))

    @property
    def tls(self) -> TlsSettings | None:
        return TlsSettings(Path(self.ca), Path(self.certificate), Path(self.key)) if self.ca else None

    def settings(self) -> dict[str, Any]:
        """Return the section `broker` of a device's or an edge's settings, as JSON values."""
        return {name: value for name, value in asdict(self).items() if value and name != "name"}

    def connect(self) -> RawClient:
        return RawClient(self.port, self.tls, self.name, host=self.host, receive_buffer=None)


def edge_settings(
    identity: BrokerClient, *, fleet: str, folder: Path, lines: Sequence[str] = (), **settings: object
) -> str:
    """Return an edge's configuration file, with more lines before its section `broker`."""
    own = {"fleet": fleet, "edge": identity.name, "db": f"sqlite:///{folder}/log.sqlite3", "spool": f"{folder}/spool"}
    return "\n".join(
        [
            *(f"{key} = {json.dumps(value)}" for key, value in {**own, **settings}.items()),
            *lines,
            "[broker]",
            *(f"{key} = {json.dumps(value)}" for key, value in identity.settings().items()),
            "",
        ]
    )


def scripted_edge(
    identity: BrokerClient,
    *,
    fleet: str,
    folder: Path,
    cores: Collection[int],
    data: Path | None = None,
    words: Sequence[str] = (),
    lines: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    **settings: object,
) -> Program:
    """Start an edge over a scripted target; on return it is online. Its session log is in `data`, or in `folder`."""
    config, log = folder / "edge.toml", folder / "edge.log"
    content = edge_settings(identity, fleet=fleet, folder=data or folder, lines=lines, **settings)
    config.write_text(content, encoding="utf-8")
    module = "tests.support.scripted_edge_process"
    edge = Program(module, [str(config), *words], cores=cores, log=log, environment=environment)
    try:
        edge.wait_for('"online"', timeout_s=_START_S)
    except BenchError:
        edge.end()
        raise
    return edge


@dataclass(frozen=True, slots=True)
class Ending:
    """End of a process that generates."""

    event: threading.Event = field(default_factory=threading.Event)
    cancellation: Cancellation = field(default_factory=Cancellation)

    def at_sigterm(self) -> Self:
        """End at SIGTERM; on the main thread. Return self."""
        # Not in the handler itself, which may interrupt a holder of the locks that it needs.
        threading.Thread(target=self._cancel, name="cancel", daemon=True).start()
        signal.signal(signal.SIGTERM, lambda *_: self.event.set())
        return self

    def with_parent(self) -> Self:
        """End with standard input: the parent process has ended. Return self."""
        threading.Thread(target=self._outlive_nobody, name="lifeline", daemon=True).start()
        return self

    def _cancel(self) -> None:
        self.event.wait()
        self.cancellation.cancel()

    def _outlive_nobody(self) -> None:
        while sys.stdin.readline():
            pass
        self.event.set()


def tell(event: str, **fields: object) -> None:
    """Write an event, unless the reader has gone."""
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps({"event": event, **fields}), flush=True)

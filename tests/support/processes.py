"""Programs of this project as child processes: an edge, and what plays one."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from broker_config.processes import ThrowAwayBroker
from fleet_common.mqtt.settings import TlsSettings
from fleet_edge.settings import EdgeSettings
from schemas.errors import FleetError
from tests.support.edge_thread import NO_QUOTAS
from tests.support.local_broker import LocalBroker
from tests.support.raw_client import RawClient
from tests.support.waiting import PATIENCE_S

_START_S: Final = 600.0  # an edge may have a large model to quantize
_STOP_S: Final = 20.0
EDGE_PROGRAM: Final = "fleet_cli.main"


class ProgramError(FleetError):
    """A program does not do what it was started for."""


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
        cores: Collection[int] | None = None,
        log: Path | None = None,
        on_line: Callable[[dict[str, Any]], None] = lambda _line: None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        self._name = module if log is None else log.stem
        self._on_line = on_line
        self._lines: list[str] = []
        self._arrived = threading.Condition()
        with contextlib.ExitStack() as stack:
            if cores is not None:
                stack.enter_context(on_cores(cores))
            errors = None if log is None else stack.enter_context(log.open("ab"))
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
            said = "" if self.log is None else self.log.read_text(errors="replace")
            tail = (said or "".join(self._lines))[-500:].strip().replace("\n", " ")
            raise ProgramError(f"{self._name} did not say {word!r} in {timeout_s:.0f} s; it ended with: {tail}")
        return line

    def wait_to_end(self, *, timeout_s: float) -> None:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ProgramError(f"{self._name} has not ended within {timeout_s:.0f} s.") from None
        self._reader.join(PATIENCE_S)

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
        for _ in range(2):  # a second SIGTERM ends an edge that waits for a session
            self.ask_to_end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
        if self.lives:
            self.kill()
        self._reader.join(PATIENCE_S)
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
    cores: Collection[int] | None = None,
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
    edge = Program(
        "tests.support.scripted_edge_process", [str(config), *words], cores=cores, log=log, environment=environment
    )
    return _online(edge)


def _online(edge: Program) -> Program:
    try:
        edge.wait_for('"online"', timeout_s=_START_S)
    except ProgramError:
        edge.end()
        raise
    return edge


def quota_variables() -> dict[str, str]:
    prefix = f"{EdgeSettings.variable_prefix}QUOTAS__"
    return {f"{prefix}{name.upper()}": f"{NO_QUOTAS.model_dump()[name]:.0f}" for name in NO_QUOTAS.model_fields_set}


def edge_process(
    arguments: Sequence[str], *, module: str = EDGE_PROGRAM, cores: Collection[int] | None = None
) -> Program:
    """Run `fleet edge run` with the arguments and without quotas; on return it is online."""
    words = ["edge", "run", "--events", *arguments]
    return _online(Program(module, words, cores=cores, environment=quota_variables()))


def toy_edge_process(port: int, fleet: str, *words: str) -> Program:
    """Run an edge over the toy target; see `tests.support.toy_edge` for `words`."""
    return _online(Program("tests.support.toy_edge", ["--port", str(port), "--fleet", fleet, *words]))

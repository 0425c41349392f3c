"""Processes of the demo: broker, edge, devices and dashboard, ended in order at Ctrl-C."""

import contextlib
import http.client
import itertools
import json
import queue
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from rich.console import Console

from broker_config.broker import Broker, BrokerMissing
from broker_config.processes import EmbeddedBroker, LocalBroker, MosquittoProcess, ThrowAwayBroker, find_mosquitto
from broker_config.site import make_local_broker
from fleet_admin.dashboard.settings import AccountRole, DashboardSettings
from fleet_cli.errors import CommandError
from fleet_cli.options import actor_of, needs_extra
from fleet_common.logs import Event, read_events

_STOP_S: Final = 6


class DeviceEvent(NamedTuple):
    device: str
    fields: dict[str, Any] | None  # from `fleet device generate --events`; None when the process has ended


@dataclass(slots=True)
class ChildProcess:
    name: str
    process: "subprocess.Popen[str]"
    sentences: list[str] = field(default_factory=list)  # its own reasons for its end
    last_line: str = ""  # of its standard error
    _readers: list[threading.Thread] = field(default_factory=list)

    @classmethod
    def spawn(
        cls,
        name: str,
        arguments: Sequence[str],
        *,
        on_event: Callable[[dict[str, Any]], None],
        on_end: Callable[[], None] = lambda: None,
    ) -> "ChildProcess":
        """Start `fleet` with arguments that make it write events. Both callbacks run on a thread."""
        process = subprocess.Popen(
            [sys.executable, "-m", "fleet_cli.main", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        child = cls(name, process)
        child._start(child._read_errors)

        def follow() -> None:
            child._read_events(on_event)
            process.wait()
            on_end()

        child._start(follow)
        return child

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ask_to_stop()
        self.end()

    def ask_to_stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """Wait for its end, and kill it if needed.

        The interrupt is repeated every second, because one that arrives in native code, such as while a model is
        loaded, is lost.
        """
        for _ in range(_STOP_S):
            try:
                self.process.wait(1.0)
                break
            except subprocess.TimeoutExpired:
                self.ask_to_stop()
        else:
            self.process.kill()
            self.process.wait()
        for reader in self._readers:
            reader.join(_STOP_S)

    @property
    def cause(self) -> str:
        """Return the reason of its end: its own messages, or exit code and last line."""
        if self.sentences:
            return " ".join(self.sentences)
        code = self.process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        last = f" The last line that it wrote: {self.last_line}" if self.last_line else ""
        return f"its process {how} and gave no reason.{last}"

    def _start(self, read: Callable[[], None]) -> None:
        thread = threading.Thread(target=read, name=f"read-{self.name}", daemon=True)
        thread.start()
        self._readers.append(thread)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self.last_line = line.strip() or self.last_line

    def _read_events(self, on_event: Callable[[dict[str, Any]], None]) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            for event in read_events(stream):
                if event["event"] == Event.ERROR:
                    self.sentences.append(event["sentence"])
                on_event(event)


class StartedProcess(NamedTuple):
    child: ChildProcess
    online: dict[str, Any]  # the event with which it was ready


@contextmanager
def _started(title: str, name: str, arguments: Sequence[str], event: Event) -> Iterator[StartedProcess]:
    said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    with ChildProcess.spawn(
        name,
        arguments,
        on_event=lambda fields: said.put(fields) if fields["event"] == event else None,
        on_end=lambda: said.put(None),
    ) as child:
        if (fields := said.get()) is None:
            child.end()
            raise CommandError(f"{title} did not start: {child.cause}")
        yield StartedProcess(child, fields)


def edge_process(arguments: Sequence[str]) -> AbstractContextManager[StartedProcess]:
    """Run an edge that is online on entry; raises `CommandError` if it ends before."""
    return _started("The edge", "edge", ["edge", "run", "--events", *arguments], Event.ONLINE)


def device_process(device: str, arguments: Sequence[str], events: "queue.SimpleQueue[DeviceEvent]") -> ChildProcess:
    """Run `fleet device generate`; its events go to the queue, the last one without fields."""
    return ChildProcess.spawn(
        device,
        ["device", "generate", "--events", "--device", device, *arguments],
        on_event=lambda event: events.put(DeviceEvent(device, event)),
        on_end=lambda: events.put(DeviceEvent(device, None)),
    )


_ANY_PORT: Final = 8883  # what the folder describes; the demo's broker runs on a free one


@dataclass(frozen=True, slots=True)
class DemoBroker:
    name: str
    host: str
    port: int
    # command-line arguments for the participant of a name
    credentials: Callable[[str], Sequence[str]] = lambda _name: ()
    lives: Callable[[], bool] = lambda: True  # whether it still runs; always, where it was there before
    ports: Mapping[str, int] = field(default_factory=dict)  # of participants with another port, by name

    def arguments(self, participant: str) -> list[str]:
        port = self.ports.get(participant, self.port)
        return ["--host", self.host, "--port", str(port), *self.credentials(participant)]


@contextmanager
def demo_broker(wanted: str, *, tls: bool, fleet: str, edge: str, devices: Sequence[str]) -> Iterator[DemoBroker]:
    """Start the requested broker, if it is not running."""
    host, colon, port = wanted.rpartition(":")
    if tls:
        if wanted not in ("auto", "mosquitto"):
            raise CommandError("--tls starts its own mosquitto; leave --broker out.")
        with _over_tls(fleet, edge, devices) as place:
            yield place
    elif colon:
        if not port.isdigit() or not host:
            raise CommandError(f"--broker {wanted} is not an address; write HOST:PORT, e.g. 127.0.0.1:1883.")
        yield DemoBroker(wanted, host, int(port))
    else:
        name, runner = _plain(wanted, Broker(fleet=fleet, edges=(edge,)))
        with runner:
            yield DemoBroker(
                f"{name} {runner.host}:{runner.port}", runner.host, runner.port, lives=lambda: runner.running
            )


@contextmanager
def _over_tls(fleet: str, edge: str, devices: Sequence[str]) -> Iterator[DemoBroker]:
    with tempfile.TemporaryDirectory(prefix="fleet-tls-") as folder:
        home = Path(folder) / "broker"
        make_local_broker(home, fleet=fleet, edges=(edge,), devices=devices, port=_ANY_PORT)
        with LocalBroker(home, port=0) as broker:

            def credentials(name: str) -> Sequence[str]:
                files = broker.identity(name)
                return ["--ca", str(files.ca), "--certificate", str(files.certificate), "--key", str(files.key)]

            where = f"mosquitto {broker.host}:{broker.port} (mutual TLS)"
            yield DemoBroker(
                where, broker.host, broker.port, credentials, lambda: broker.running, {edge: broker.edge_port}
            )


def _plain(wanted: str, description: Broker) -> tuple[str, ThrowAwayBroker]:
    if wanted == "auto":
        try:
            find_mosquitto()
        except BrokerMissing:
            wanted = "embedded"
    if wanted in ("auto", "mosquitto"):
        return "mosquitto", MosquittoProcess(description)
    if wanted == "embedded":
        return "embedded rumqttd", EmbeddedBroker(description)
    raise CommandError(f"--broker {wanted} is not known; write auto, embedded, mosquitto or HOST:PORT.")


_PORT: Final = 8400
_HOST: Final = "127.0.0.1"
_NAME: Final = "monitor"  # the identity that the demo's brokers have for administrators
_ACCOUNT: Final = "demo"
_TEXT_S: Final = 120.0
_AGAIN_S: Final = 2.0


def run_dashboard(
    console: Console,
    place: DemoBroker,
    *,
    fleet: str,
    db: str,
    folder: Path,
    devices: Sequence[str],
    arguments: Sequence[str],
    prompts: Sequence[str],
    edge: ChildProcess,
) -> None:
    """Serve the dashboard over the demo's fleet until Ctrl-C; devices generate from `prompts` in turn."""
    with needs_extra("dashboard"):
        from fleet_admin.dashboard.app import DashboardServer
        from fleet_admin.dashboard.services import Services, open_services

    settings = DashboardSettings(
        db=db, listen=f"{_HOST}:{_free(_PORT)}", steer=True, fleet=fleet, name=_NAME, broker=_broker(place)
    )
    services: Services = open_services(settings)
    password = _account(services)
    stopped = threading.Event()
    with ExitStack() as stack:
        server = DashboardServer(settings, services=services)
        stack.callback(server.stop)
        stack.callback(stopped.set)
        for number, name in enumerate(devices):
            api_port = _free()
            own = ["--device", name, "--api-port", str(api_port), "--steering-dir", str(folder / name)]
            serve = ["device", "run", "--events", *own, *arguments, *place.arguments(name)]
            stack.enter_context(_started(f"The device {name}", name, serve, Event.SERVING))
            asked = itertools.islice(itertools.cycle(prompts), number, None)
            threading.Thread(target=_write, args=(api_port, asked, stopped), daemon=True).start()
        console.print(
            f"The dashboard is at {server.address} (name {_ACCOUNT}, password {password}). The devices continue. "
            "Ctrl-C stops all of it.",
            soft_wrap=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            while edge.process.poll() is None and place.lives():
                stopped.wait(1.0)
            raise CommandError("The broker or the edge has ended, and the demo with it: see the lines above.")


def _account(services: Any) -> str:  # noqa: ANN401 - the dashboard's, which is imported late
    """Recreate the demo's account; return its password."""
    password, actor = secrets.token_urlsafe(12), actor_of("demo")
    if services.accounts.role(_ACCOUNT) is not None:
        services.accounts.remove(_ACCOUNT, actor=actor)
    services.accounts.add(_ACCOUNT, role=AccountRole.OPERATOR, password=password, actor=actor)
    return password


def _broker(place: DemoBroker) -> dict[str, Any]:
    flags = place.arguments(_NAME)
    return {flag.removeprefix("--"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}


def _write(api_port: int, prompts: Iterator[str], stopped: threading.Event) -> None:
    for prompt in prompts:
        if stopped.is_set():
            return
        connection = http.client.HTTPConnection(_HOST, api_port, timeout=_TEXT_S)
        try:
            body = json.dumps({"model": "fleet", "messages": [{"role": "user", "content": prompt}]})
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            refused = connection.getresponse().status != http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            refused = True
        finally:
            connection.close()
        if refused:
            stopped.wait(_AGAIN_S)


def _free(wanted: int = 0) -> int:
    for port in (wanted, 0):
        with contextlib.suppress(OSError), socket.create_server((_HOST, port)) as listener:
            return int(listener.getsockname()[1])
    raise CommandError(f"There is no free port on {_HOST}.")

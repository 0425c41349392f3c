"""Processes of the demo: broker, edge, devices and dashboard, and requests to its devices."""

import contextlib
import http.client
import json
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple, Self

from broker_config.broker import Broker, BrokerMissing
from broker_config.processes import EmbeddedBroker, MosquittoProcess, ThrowAwayBroker, find_mosquitto
from fleet_admin.dashboard.settings import AccountRole, DashboardSettings
from fleet_cli.commands import CommandError
from fleet_cli.options import actor_of, needs_extra
from fleet_common.logs import Event, read_events

_STOP_S: Final = 6


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


def device_service(device: str, arguments: Sequence[str]) -> AbstractContextManager[StartedProcess]:
    """Run a device that serves applications on entry; raises `CommandError` if it ends before."""
    return _started(
        f"The device {device}", device, ["device", "run", "--events", "--device", device, *arguments], Event.SERVING
    )


def demo_broker(wanted: str, description: Broker) -> ThrowAwayBroker:
    """Return the requested broker, to be started."""
    if wanted == "auto":
        try:
            find_mosquitto()
        except BrokerMissing:
            wanted = "embedded"
    if wanted in ("auto", "mosquitto"):
        return MosquittoProcess(description)
    if wanted == "embedded":
        return EmbeddedBroker(description)
    raise CommandError(f"--broker {wanted} is not known; write auto, embedded or mosquitto.")


def name_of(broker: ThrowAwayBroker) -> str:
    program = "embedded rumqttd" if isinstance(broker, EmbeddedBroker) else "mosquitto"
    return f"{program} {broker.host}:{broker.port}"


@dataclass(frozen=True, slots=True)
class StreamedAnswer:
    """What a device has answered so far; `summary` is there once the answer is complete."""

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0  # since the request
    finish: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def stream_answer(port: int, prompt: str, *, raw: bool = False, **options: object) -> Iterator[StreamedAnswer]:
    """Ask a device over its HTTP API and yield the growing answer; raises `CommandError` if it fails."""
    path = "/v1/completions" if raw else "/v1/chat/completions"
    asked = {"prompt": prompt} if raw else {"messages": [{"role": "user", "content": prompt}]}
    usage = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": "fleet", **asked, "stream": True, "stream_options": usage, **options}
    connection = http.client.HTTPConnection(_HOST, port, timeout=_REPLY_S)
    answer, started = StreamedAnswer(), time.monotonic()
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != http.HTTPStatus.OK:
            raise CommandError(f"The device refused a request: {json.load(reply)['error']['message']}")
        for line in reply:
            data = line.decode().strip().removeprefix("data:").strip()
            if not data.startswith("{"):
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise CommandError(f"A request failed: {chunk['error']['message']}")
            for choice in chunk["choices"]:
                text = choice["text"] if raw else choice["delta"].get("content")
                answer = replace(
                    answer,
                    text=answer.text + (text or ""),
                    tokens=chunk["usage"]["completion_tokens"] if chunk.get("usage") else answer.tokens,
                    seconds=time.monotonic() - started,
                    finish=choice["finish_reason"] or "",
                    summary=chunk.get("fleet", {}),
                )
                yield answer
    except (OSError, http.client.HTTPException) as error:
        raise CommandError(f"A device of the demo does not answer: {error!r}.") from error
    finally:
        connection.close()


def free_port(wanted: int) -> int:
    """Return a free port on loopback: the wanted one if possible."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError), socket.create_server((_HOST, port)) as listener:
            return int(listener.getsockname()[1])
    raise CommandError(f"There is no free port on {_HOST}.")


_PORT: Final = 8400
_HOST: Final = "127.0.0.1"
_REPLY_S: Final = 120.0  # longest silence; an edge that is killed may take this long to be back
_NAME: Final = "monitor"  # the identity that the demo's brokers have for administrators
_ACCOUNT: Final = "demo"


@contextmanager
def demo_dashboard(broker: ThrowAwayBroker, *, fleet: str, db: str) -> Iterator[str]:
    """Serve the dashboard; yields a sentence with its address, name and password."""
    with needs_extra("dashboard"):
        from fleet_admin.dashboard.app import DashboardServer
        from fleet_admin.dashboard.services import open_services

    settings = DashboardSettings(
        db=db,
        listen=f"{_HOST}:{free_port(_PORT)}",
        steer=True,
        fleet=fleet,
        name=_NAME,
        broker={"host": broker.host, "port": broker.port},
    )
    services = open_services(settings)
    password = _account(services)
    server = DashboardServer(settings, services=services)
    try:
        yield f"{server.address} (name {_ACCOUNT}, password {password})"
    finally:
        server.stop()


def _account(services: Any) -> str:  # noqa: ANN401 - the dashboard's, which is imported late
    """Recreate the demo's account; return its password."""
    password, actor = secrets.token_urlsafe(12), actor_of("demo")
    if services.accounts.role(_ACCOUNT) is not None:
        services.accounts.remove(_ACCOUNT, actor=actor)
    services.accounts.add(_ACCOUNT, role=AccountRole.OPERATOR, password=password, actor=actor)
    return password

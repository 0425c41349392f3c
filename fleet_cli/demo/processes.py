"""Processes of the demo, each in a process group of its own: Ctrl-C reaches the demo, which ends them in order."""

import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from fleet_cli.errors import CommandError
from fleet_common.logs import Event, read_events

_STOP_S: Final = 6


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """An event of a device process; `fields` is None when it has ended.

    Attributes:
        device: Whose.
        fields: The event, as `fleet device generate --events` writes it.
    """

    device: str
    fields: dict[str, Any] | None


@dataclass(slots=True)
class Child:
    """A child process, of which what it says of its end is kept.

    Attributes:
        name: For messages.
        process: The process.
        sentences: Why it says that it cannot go on.
        last_line: Of its standard error.
    """

    name: str
    process: "subprocess.Popen[str]"
    sentences: list[str] = field(default_factory=list)
    last_line: str = ""
    _readers: list[threading.Thread] = field(default_factory=list)

    @classmethod
    def spawn(
        cls,
        name: str,
        arguments: Sequence[str],
        *,
        on_event: Callable[[dict[str, Any]], None],
        on_end: Callable[[], None] = lambda: None,
    ) -> "Child":
        """Start `fleet` with the arguments, which make it write events; both are called on a thread."""
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

    def ask_to_stop(self) -> None:
        """Interrupt it, as Ctrl-C in a terminal would."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def end(self) -> None:
        """See that it has ended, at the latest by force.

        It is asked again every second: an interrupt that falls into a call from native code back into Python, as while
        a model is loaded, is lost.
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
        """Why it has ended: its own sentence; else how the process ended, and its last line as what it is."""
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


@dataclass(frozen=True, slots=True)
class EdgeChild:
    """The edge's process, online.

    Attributes:
        child: The process.
        online: What it said of itself when it came online.
    """

    child: Child
    online: dict[str, Any]


@contextmanager
def edge_process(arguments: Sequence[str]) -> Iterator[EdgeChild]:
    """Run an edge; on entry it is online, on exit it has ended.

    Raises:
        CommandError: It ended before it came online.
    """
    said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    child = Child.spawn(
        "edge",
        ["edge", "run", "--events", *arguments],
        on_event=lambda event: said.put(event) if event["event"] == Event.ONLINE else None,
        on_end=lambda: said.put(None),
    )
    try:
        online = said.get()
        if online is None:
            child.end()
            raise CommandError(f"The edge did not start: {child.cause}")
        yield EdgeChild(child, online)
    finally:
        child.ask_to_stop()
        child.end()


@contextmanager
def device_process(device: str, arguments: Sequence[str], events: "queue.SimpleQueue[DeviceEvent]") -> Iterator[Child]:
    """Run `fleet device generate`; its events go to the queue, the last one without fields."""
    child = Child.spawn(
        device,
        ["device", "generate", "--events", "--device", device, *arguments],
        on_event=lambda event: events.put(DeviceEvent(device, event)),
        on_end=lambda: events.put(DeviceEvent(device, None)),
    )
    try:
        yield child
    finally:
        child.ask_to_stop()
        child.end()

"""Processes of the demo, each in a process group of its own: Ctrl-C reaches the demo, which ends them in order."""

import itertools
import json
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

__all__ = ["Child", "DeviceEvent", "device_process", "edge_process"]

_STOP_S: Final = 6
_OWN: Final = "fleet: "


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """A line that a device process wrote; `fields` is None when it has ended.

    Attributes:
        device: Whose.
        fields: The event, as `fleet device generate --events` writes it.
    """

    device: str
    fields: dict[str, Any] | None


@dataclass(slots=True)
class Child:
    """A child process whose standard error is kept for the case that it fails.

    Attributes:
        name: For messages.
        process: The process.
        errors: Its standard error so far, line by line.
    """

    name: str
    process: "subprocess.Popen[str]"
    errors: list[str] = field(default_factory=list)
    _readers: list[threading.Thread] = field(default_factory=list)

    @classmethod
    def spawn(cls, name: str, arguments: Sequence[str], *, on_error: Callable[[str], None] | None = None) -> "Child":
        """Start `fleet` with the arguments."""
        process = subprocess.Popen(
            [sys.executable, "-m", "fleet_cli.main", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        child = cls(name, process)

        def keep(line: str) -> None:
            child.errors.append(line)
            if on_error is not None:
                on_error(line)

        child.read(process.stderr, keep)
        return child

    def read(self, stream: Any, on_line: Callable[[str], None]) -> None:  # noqa: ANN401 - a text pipe
        """Read a pipe line by line on a thread of its own."""

        def pump() -> None:
            for line in stream:
                on_line(line.rstrip("\n"))

        thread = threading.Thread(target=pump, name=f"read-{self.name}", daemon=True)
        thread.start()
        self._readers.append(thread)

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
    def complaint(self) -> str:
        """What it said at its end, in one line: all sentences of `fleet`, or the last line of something else."""
        said = [line for line in self.errors if line.strip()]
        own = list(itertools.takewhile(lambda line: line.startswith(_OWN), reversed(said)))[::-1]
        return (
            " ".join(line.removeprefix(_OWN) for line in own or said[-1:])
            or f"ended with exit code {self.process.returncode} and said nothing"
        )


@contextmanager
def edge_process(arguments: Sequence[str]) -> Iterator[Child]:
    """Run an edge; on entry it is online, on exit it has ended.

    Raises:
        CommandError: It ended before it came online.
    """
    online = threading.Event()
    child = Child.spawn(
        "edge", ["edge", "run", *arguments], on_error=lambda line: online.set() if " is online at " in line else None
    )
    try:
        while not online.wait(0.1):
            if child.process.poll() is not None:
                child.end()
                raise CommandError(f"The edge did not start: {child.complaint}")
        yield child
    finally:
        child.ask_to_stop()
        child.end()


@contextmanager
def device_process(device: str, arguments: Sequence[str], events: "queue.SimpleQueue[DeviceEvent]") -> Iterator[Child]:
    """Run `fleet device generate`; its events go to the queue, the last one without fields."""
    child = Child.spawn(device, ["device", "generate", "--events", "--device", device, *arguments])

    def pump() -> None:
        assert child.process.stdout is not None
        for line in child.process.stdout:
            events.put(DeviceEvent(device, json.loads(line)))
        child.process.wait()
        events.put(DeviceEvent(device, None))

    thread = threading.Thread(target=pump, name=f"events-{device}", daemon=True)
    thread.start()
    try:
        yield child
    finally:
        child.ask_to_stop()
        child.end()
        thread.join(_STOP_S)

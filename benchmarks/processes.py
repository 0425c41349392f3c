"""Child processes of the benchmarks: their cores, their tools and their end."""

import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from fleet_device.requests.generate import Cancellation
from schemas.errors import FleetError


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


@dataclass(frozen=True, slots=True)
class Ending:
    """End of a process that generates."""

    event: threading.Event = field(default_factory=threading.Event)
    cancellation: Cancellation = field(default_factory=Cancellation)
    _asked: "queue.SimpleQueue[None]" = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        threading.Thread(target=self._end, name="end", daemon=True).start()

    def at_sigterm(self) -> Self:
        """End at SIGTERM; on the main thread. Return self."""
        # The handler may interrupt whoever holds a lock, also itself at a second SIGTERM; this `put` takes none.
        signal.signal(signal.SIGTERM, lambda *_: self._asked.put(None))
        return self

    def with_parent(self) -> Self:
        """End with standard input: the parent process has ended. Return self."""
        threading.Thread(target=self._outlive_nobody, name="lifeline", daemon=True).start()
        return self

    def _end(self) -> None:
        self._asked.get()
        self.event.set()
        self.cancellation.cancel()

    def _outlive_nobody(self) -> None:
        while sys.stdin.readline():
            pass
        self._asked.put(None)


def tell(event: str, **fields: object) -> None:
    """Write an event, unless the reader has gone."""
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps({"event": event, **fields}), flush=True)

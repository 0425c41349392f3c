"""Progress of a preparation: a bar a step on a terminal, a line a step elsewhere."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

_MEGA = 1_000_000


class Reporter(AbstractContextManager["Reporter"], Protocol):
    """Told of every step."""

    def begin(self, name: str, doing: str, total: int) -> None:
        """A step begins that writes or reads about `total` bytes."""

    def bytes_done(self, done: int) -> None:
        """Bytes of the current step so far."""

    def end(self, outcome: str) -> None:
        """The step has ended; `outcome` is a word or two."""

    def say(self, sentence: str) -> None:
        """Something worth a line of its own."""


class LineReporter(AbstractContextManager["LineReporter"]):
    """One line a step, for logs and pipes."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock
        self._name = ""
        self._done = 0
        self._began = 0.0

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def begin(self, name: str, doing: str, total: int) -> None:  # noqa: ARG002 - a line shows no total
        self._name, self._done, self._began = name, 0, self._clock()
        self.say(f"{name}: {doing} …")

    def bytes_done(self, done: int) -> None:
        self._done = done

    def end(self, outcome: str) -> None:
        seconds = self._clock() - self._began
        self.say(f"{self._name}: {outcome}, {self._done / _MEGA:.0f} MB in {seconds:.1f} s")

    def say(self, sentence: str) -> None:
        self._console.print(sentence, markup=False, highlight=False, soft_wrap=True)


class BarReporter(AbstractContextManager["BarReporter"]):
    """A bar of bytes for each step."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[name]:>7}  {task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, name: str, doing: str, total: int) -> None:
        self._task = self._bars.add_task(doing, total=total, name=name)

    def bytes_done(self, done: int) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=done)

    def end(self, outcome: str) -> None:
        """Fill the bar: the expected size was an estimate."""
        if self._task is not None:
            task = self._bars.tasks[self._task]
            self._bars.update(self._task, description=outcome, total=task.completed, completed=task.completed)
        self._task = None

    def say(self, sentence: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def reporter(console: Console, *, clock: Callable[[], float]) -> Reporter:
    """Return bars for a terminal, lines for anything else."""
    return BarReporter(console) if console.is_terminal else LineReporter(console, clock)

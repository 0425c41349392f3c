"""Logs and events of a running program: JSON lines for programs, and a filter against repetition."""

import atexit
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final, TextIO

from schemas.errors import FleetError
from schemas.printable import json_text

FIELDS: Final = ("session", "device", "edge", "reason", "code", "tokens", "accepted", "tested", "rounds", "resumes")
"""Fields of a record (`extra`) that are written, if they are strings or numbers."""

_LONGEST_FIELD: Final = 8000
"""Characters of a message or traceback. Collectors cut longer lines, which are then no JSON."""


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON.

    Every line has `time`, `level`, `logger` and `message`, identifies the program (`device`, or `edge` and `fleet`),
    and has the record's own fields, such as `session`. Only the fields in `FIELDS` are written, so that no secret gets
    into a log by accident.
    """

    def __init__(self, program: Mapping[str, str]) -> None:
        super().__init__()
        self._program = dict(program)

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, object] = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record)[:_LONGEST_FIELD],
            **self._program,
        }
        for name in FIELDS:
            value = record.__dict__.get(name)
            if isinstance(value, str | int | float):
                line[name] = value[:_LONGEST_FIELD] if isinstance(value, str) else value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)[-_LONGEST_FIELD:]
        # A lone surrogate is valid in JSON as an escape, and nowhere else.
        return json_text(line).encode("utf-8", "backslashreplace").decode()


def write_log_as(log_format: str, **program: str) -> None:
    """Set the format of the root logger's stream handlers; JSON logs include level INFO.

    `log_format` is `json`, or `plain`, which changes nothing; `program` identifies the program.
    """
    if log_format != "json":
        return
    root = logging.getLogger()
    root.setLevel(min(root.level, logging.INFO))
    for handler in root.handlers:
        # Not on subclasses: handlers that collect records have their own format.
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(JsonFormatter(program))


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError):
        return f"{record.msg!r} with arguments that do not fit"


AT_MOST: Final = 5
WINDOW_S: Final = 60.0
KINDS: Final = 500
LONGEST_TEMPLATE: Final = 200  # characters
LONGEST_EXAMPLE: Final = 500

_Key = tuple[str, int, str]


@dataclass(slots=True)
class _Kind:
    records: int = 0
    example: str = ""  # the first that was held back


class _SuppressedReport(logging.LogRecord):
    """A line that reports suppressed records."""


class Repetition(logging.Filter):
    """Filter of a handler that suppresses and counts repeated warnings. Callable from any thread.

    Others often decide how many warnings there are: a broker that is down, a device that sends garbage. 50,000 equal
    lines hide the one that matters, and fill a disk. Two warnings are of one kind if logger, level and message template
    are equal. The first few of a minute are written. At its end, or that of the program, `write` (the handler's
    `handle`) gets a line per kind with the number of suppressed ones and an example. Records below a warning pass: they
    are only logged on request.
    """

    def __init__(
        self, write: Callable[[logging.LogRecord], object], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._write = write
        self._clock = clock
        self._kinds: dict[_Key, _Kind] = {}
        self._began = clock()
        # Reentrant, as the locks of `logging` are: a signal handler may log in the middle of this.
        self._lock = threading.RLock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is written as it is."""
        if record.levelno < logging.WARNING or isinstance(record, _SuppressedReport):
            return True
        if self._clock() - self._began >= WINDOW_S:
            self.report()
        template = record.msg if isinstance(record.msg, str) else type(record.msg).__name__
        key = (record.name, record.levelno, template[:LONGEST_TEMPLATE])
        with self._lock:
            if key not in self._kinds and len(self._kinds) >= KINDS:
                key = (record.name, record.levelno, "")
            kind = self._kinds.setdefault(key, _Kind())
            kind.records += 1
            if kind.records == AT_MOST + 1:
                if not any(each.example for each in self._kinds.values()):
                    self._report_later()
                kind.example = _message(record)[:LONGEST_EXAMPLE]
            return kind.records <= AT_MOST

    def report(self) -> None:
        """Write how many records were suppressed, and begin the next minute."""
        with self._lock:
            kinds, self._kinds = self._kinds, {}
            seconds = max(1, round(self._clock() - self._began))
            self._began = self._clock()
        for (name, level, _), kind in kinds.items():
            if held_back := max(0, kind.records - AT_MOST):
                text = f"{kind.example} … {held_back:,} more of this kind in the last {seconds} s."
                self._write(_SuppressedReport(name, level, __file__, 0, text, None, None))

    def _report_later(self) -> None:
        timer = threading.Timer(WINDOW_S, self.report)
        timer.daemon = True
        timer.start()


def hold_back_repetition() -> None:
    """Add the filter to the root logger's stream handlers; the rest is reported when the program ends."""
    for handler in logging.getLogger().handlers:
        # Not on subclasses: handlers that collect records need all of them.
        if type(handler) is logging.StreamHandler and not any(isinstance(each, Repetition) for each in handler.filters):
            repetition = Repetition(handler.handle)
            handler.addFilter(repetition)
            atexit.register(repetition.report)


class Event(StrEnum):
    """Kind of an event. Readers must ignore unknown fields and events (docs/operations.md)."""

    LOADING = "loading"  # a model is being loaded
    SERVING = "serving"  # a device accepts requests of applications
    ONLINE = "online"
    OFFLINE = "offline"  # the connection is lost and retried
    DRAINING = "draining"  # stops once running requests have finished
    STOPPED = "stopped"
    START = "start"  # a request begins
    TOKENS = "tokens"  # text of it was verified
    WAITING = "waiting"  # no progress for ten seconds, and why
    END = "end"  # a request has ended; its statistics
    ERROR = "error"  # why the program failed


class EventStream:
    """Write events at once, from any thread; a `stream` of None writes nothing.

    `outlives_reader`: continue silently when the reader has gone, as a service does, instead of raising
    BrokenPipeError.
    """

    def __init__(self, stream: TextIO | None, *, outlives_reader: bool = False) -> None:
        self._stream = stream
        self._outlives_reader = outlives_reader
        self._writing = threading.Lock()

    def __bool__(self) -> bool:
        return self._stream is not None

    def write(self, event: Event, **fields: object) -> None:
        line = json_text({"event": event.value, **fields})
        with self._writing:
            if self._stream is None:
                return
            try:
                self._stream.write(f"{line}\n")
                self._stream.flush()
            except BrokenPipeError:
                if not self._outlives_reader:
                    raise
                # Python would flush the rest at exit, and fail again.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
                self._stream = None

    @contextmanager
    def reporting_errors(self) -> Iterator[None]:
        """Write a FleetError as one event per sentence, and re-raise it."""
        try:
            yield
        except FleetError as error:
            for sentence in str(error).splitlines():
                self.write(Event.ERROR, sentence=sentence)
            raise


def read_events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the events that a program writes; skip other lines."""
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            yield event

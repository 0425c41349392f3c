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
UNWRITABLE: Final = "a message that cannot be written"

_Key = tuple[str, int, str]
Later = Callable[[float, Callable[[], None]], None]


@dataclass(slots=True)
class _Kind:
    began: float
    written: int = 0
    held_back: int = 0
    example: str = ""


class _SuppressedReport(logging.LogRecord):
    """A line that reports suppressed records."""


def _on_a_thread(delay_s: float, action: Callable[[], None]) -> None:
    timer = threading.Timer(delay_s, action)
    timer.daemon = True
    timer.start()


class Repetition(logging.Filter):
    """Filter of a handler that suppresses and counts repeated warnings. Callable from any thread.

    Others often decide how many warnings there are: a broker that is down, a device that sends garbage. 50,000 equal
    lines hide the one that matters, and fill a disk. Two warnings are of one kind if logger, level and message template
    are equal. The first few per window are written. At the end of the window, or of the program, one line reports the
    number of suppressed ones, with an example. Records below a warning pass: they are only logged on request.

    Args:
        write: Writes the lines that report suppressed records: the handler's `handle`.
        at_most: Records of one kind that pass per window.
        window_s: Length of a window, which begins with the first record of its kind.
        kinds: Limit on kinds; beyond it, the records of one logger and level are one kind.
        level: Records below it pass.
        later: Calls a function after a delay in seconds, from any thread.
    """

    def __init__(
        self,
        write: Callable[[logging.LogRecord], object],
        *,
        at_most: int = AT_MOST,
        window_s: float = WINDOW_S,
        kinds: int = KINDS,
        level: int = logging.WARNING,
        clock: Callable[[], float] = time.monotonic,
        later: Later = _on_a_thread,
    ) -> None:
        super().__init__()
        self._write = write
        self._at_most = at_most
        self._window_s = window_s
        self._most_kinds = kinds
        self._level = level
        self._clock = clock
        self._later = later
        self._kinds: dict[_Key, _Kind] = {}
        self._waiting = False  # a call of `report` is scheduled
        # Reentrant, as the locks of `logging` are: a signal handler may log in the middle of this.
        self._lock = threading.RLock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is written as it is."""
        if record.levelno < self._level or isinstance(record, _SuppressedReport):
            return True
        now = self._clock()
        with self._lock:
            key = self._key(record, now)
            kind = self._kinds.get(key)
            ended = None
            if kind is None or now - kind.began >= self._window_s:
                ended = self._report(key, kind, now)
                kind = self._kinds[key] = _Kind(now)
            passes = kind.written < self._at_most
            if passes:
                kind.written += 1
            else:
                kind.held_back += 1
                kind.example = kind.example or _example(record)
            wait_s = self._window_s - (now - kind.began)
            begin_to_wait, self._waiting = not passes and not self._waiting, self._waiting or not passes
        if ended is not None:
            self._write(ended)
        if begin_to_wait:
            self._later(wait_s, self._wake)
        return passes

    def report(self, *, all_of_it: bool = False) -> None:
        """Report what was suppressed in the windows that are over, or in all when the program ends."""
        now = self._clock()
        lines = []
        with self._lock:
            for key, kind in list(self._kinds.items()):
                if all_of_it or now - kind.began >= self._window_s:
                    lines.append(self._report(key, kind, now))
                    del self._kinds[key]
        for line in lines:
            if line is not None:
                self._write(line)

    def _wake(self) -> None:
        self.report()
        with self._lock:
            next_end = min((kind.began for kind in self._kinds.values() if kind.held_back), default=None)
            self._waiting = next_end is not None
        if next_end is not None:
            self._later(max(0.0, next_end + self._window_s - self._clock()), self._wake)

    def _key(self, record: logging.LogRecord, now: float) -> _Key:
        template = record.msg if isinstance(record.msg, str) else type(record.msg).__name__
        key = (record.name, record.levelno, template[:LONGEST_TEMPLATE])
        if key in self._kinds or len(self._kinds) < self._most_kinds:
            return key
        for other, kind in list(self._kinds.items()):
            if not kind.held_back and now - kind.began >= self._window_s:
                del self._kinds[other]
        return key if len(self._kinds) < self._most_kinds else (record.name, record.levelno, "")

    @staticmethod
    def _report(key: _Key, kind: _Kind | None, now: float) -> logging.LogRecord | None:
        if kind is None or not kind.held_back:
            return None
        name, level, _ = key
        times = "once" if kind.held_back == 1 else f"{kind.held_back:,} times"
        text = f"{kind.example} … {times} more in the last {_span(now - kind.began)}, of this kind."
        return _SuppressedReport(name, level, __file__, 0, text, None, None)


def _example(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()[:LONGEST_EXAMPLE]
    except (TypeError, ValueError):
        return UNWRITABLE


def _span(seconds: float) -> str:
    return "minute" if round(seconds) == round(WINDOW_S) else f"{max(1, round(seconds))} s"


def hold_back_repetition() -> None:
    """Add the filter to the root logger's stream handlers; the rest is reported when the program ends."""
    for handler in logging.getLogger().handlers:
        # Not on subclasses: handlers that collect records need all of them.
        if type(handler) is logging.StreamHandler and not any(isinstance(each, Repetition) for each in handler.filters):
            repetition = Repetition(handler.handle)
            handler.addFilter(repetition)
            atexit.register(repetition.report, all_of_it=True)


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


def wait_for_event(lines: Iterable[str], event: Event) -> dict[str, Any] | None:
    """Read lines up to an event and return it; None if the program ends first."""
    return next((each for each in read_events(lines) if each["event"] == event), None)

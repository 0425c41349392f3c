"""Events of a running program as JSON lines, for other programs to read where people read sentences.

Every line is an object whose `event` says what has happened; the other fields are that event's (docs/operations.md,
"Events for programs"). Lines of a later version may have more fields and other events: pass over what is not known.
"""

import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, TextIO

from fleet_common.terminal import json_text
from schemas.errors import FleetError


class Event(StrEnum):
    """What can happen.

    Attributes:
        LOADING: A model is being loaded.
        SERVING: A device takes requests of applications.
        ONLINE: The broker knows this end as online.
        OFFLINE: A device has lost its connection, and keeps trying.
        DRAINING: The end has begun; what is open may finish.
        STOPPED: All is released.
        START: A text begins.
        TOKENS: A piece of it was verified.
        WAITING: Why nothing of it was for ten seconds.
        END: It has ended; its figures.
        ERROR: Why the program ends without having done what it was asked.
    """

    LOADING = "loading"
    SERVING = "serving"
    ONLINE = "online"
    OFFLINE = "offline"
    DRAINING = "draining"
    STOPPED = "stopped"
    START = "start"
    TOKENS = "tokens"
    WAITING = "waiting"
    END = "end"
    ERROR = "error"


class EventStream:
    """Writes events, each at once; from any thread.

    Args:
        stream: Where to; None writes nothing.
        outlives_reader: Whether to go on in silence when the reader has gone, as a service does; else writing raises
            BrokenPipeError.
    """

    def __init__(self, stream: TextIO | None, *, outlives_reader: bool = False) -> None:
        self._stream = stream
        self._outlives_reader = outlives_reader
        self._writing = threading.Lock()

    def __bool__(self) -> bool:
        return self._stream is not None

    def write(self, event: Event, **fields: object) -> None:
        """Write an event; the fields are JSON values."""
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
                # Python would write the rest when it ends, and fail again.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
                self._stream = None

    @contextmanager
    def telling_errors(self) -> Iterator[None]:
        """Write an error that a user can mend as an event for each of its sentences, and let it pass."""
        try:
            yield
        except FleetError as error:
            for sentence in str(error).splitlines():
                self.write(Event.ERROR, sentence=sentence)
            raise


def read_events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the events that a program writes; a line that is none is passed over."""
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            yield event


def wait_for_event(lines: Iterable[str], event: Event) -> dict[str, Any] | None:
    """Read lines up to an event and return it; None if the program ends before."""
    return next((each for each in read_events(lines) if each["event"] == event), None)

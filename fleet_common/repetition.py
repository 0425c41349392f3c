"""Log filter against repetition: warnings of one kind beyond a few a minute are counted, and told once a minute.

Somebody else often decides how many warnings there are: a broker that is away, a device that sends nonsense. A log of
50,000 equal lines hides the one that matters, and fills a disk. Two warnings are of one kind if logger, level and
message template are the same. The first few of a minute are written as they come; of the rest, how many there were and
what one of them said is written when the minute is over, or when the program ends. What is below a warning passes: it
is only logged where somebody has asked for it.
"""

import atexit
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

AT_MOST: Final = 5
WINDOW_S: Final = 60.0
KINDS: Final = 500
LONGEST_TEMPLATE: Final = 200  # characters: what is longer is told apart by its beginning
LONGEST_EXAMPLE: Final = 500
UNWRITABLE: Final = "a message that cannot be written"

_Key = tuple[str, int, str]
Later = Callable[[float, Callable[[], None]], None]


@dataclass(slots=True)
class _Kind:
    """The records of one kind in one window."""

    began: float
    written: int = 0
    held_back: int = 0
    example: str = ""


class _Told(logging.LogRecord):
    """A line that tells what was held back."""


def _on_a_thread(delay_s: float, action: Callable[[], None]) -> None:
    timer = threading.Timer(delay_s, action)
    timer.daemon = True
    timer.start()


class Repetition(logging.Filter):
    """A filter of a handler; a record that it holds back is counted. Callable from any thread.

    Args:
        write: Takes the lines that tell what was held back: the handler's `handle`.
        at_most: Records of one kind that pass in a window.
        window_s: Length of a window, which begins with the first record of its kind.
        kinds: Most kinds that are told apart; beyond them those of one logger and level are one kind.
        level: Records below it pass.
        clock: Monotonic seconds.
        later: Calls a function after so many seconds, from any thread.
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
        self._waiting = False  # a call of `tell` is under way
        # Reentrant, as the locks of `logging` are: a signal handler may log in the middle of this.
        self._lock = threading.RLock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is written as it is."""
        if record.levelno < self._level or isinstance(record, _Told):
            return True
        now = self._clock()
        with self._lock:
            key = self._key(record, now)
            kind = self._kinds.get(key)
            ended = None
            if kind is None or now - kind.began >= self._window_s:
                ended = self._told(key, kind, now)
                kind = self._kinds[key] = _Kind(now)
            passes = kind.written < self._at_most
            if passes:
                kind.written += 1
            else:
                kind.held_back += 1
                kind.example = kind.example or _text(record)
            wait_s = self._window_s - (now - kind.began)
            begin_to_wait, self._waiting = not passes and not self._waiting, self._waiting or not passes
        if ended is not None:
            self._write(ended)
        if begin_to_wait:
            self._later(wait_s, self._wake)
        return passes

    def tell(self, *, all_of_it: bool = False) -> None:
        """Write what was held back in the windows that are over.

        Args:
            all_of_it: Likewise in those that are not: the program ends.
        """
        now = self._clock()
        lines = []
        with self._lock:
            for key, kind in list(self._kinds.items()):
                if all_of_it or now - kind.began >= self._window_s:
                    lines.append(self._told(key, kind, now))
                    del self._kinds[key]
        for line in lines:
            if line is not None:
                self._write(line)

    def _wake(self) -> None:
        self.tell()
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
    def _told(key: _Key, kind: _Kind | None, now: float) -> logging.LogRecord | None:
        if kind is None or not kind.held_back:
            return None
        name, level, _ = key
        times = "once" if kind.held_back == 1 else f"{kind.held_back:,} times"
        text = f"{kind.example} … {times} more in the last {_span(now - kind.began)}, of this kind."
        return _Told(name, level, __file__, 0, text, None, None)


def _text(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()[:LONGEST_EXAMPLE]
    except (TypeError, ValueError):
        return UNWRITABLE


def _span(seconds: float) -> str:
    return "minute" if round(seconds) == round(WINDOW_S) else f"{max(1, round(seconds))} s"


def hold_back_repetition() -> None:
    """Put the filter on the root logger's handlers that write to a stream; the rest is told when the program ends."""
    for handler in logging.getLogger().handlers:
        # Not on a subclass: a handler that was made to collect records shall have them all.
        if type(handler) is logging.StreamHandler and not any(isinstance(each, Repetition) for each in handler.filters):
            repetition = Repetition(handler.handle)
            handler.addFilter(repetition)
            atexit.register(repetition.tell, all_of_it=True)

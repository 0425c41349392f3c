"""Closes that no edge has confirmed yet: sent again until one has recorded the end of the session.

An edge confirms a Close once its session log cannot lose it. If it dies before that, the session stays open in the log,
and only the device can report its end, to any edge that is online. Each is kept in memory from its first sending.

No edge knows what was generated without one. Such Closes are kept in files, which survive the end of the process, and
sent one after the other; the log holds each session once, however often it is reported. A generation that still runs
is kept too, as failed, until its own end replaces that: so it is reported if the process is killed. The files have
neither tokens nor prompts, only counts, times and how a session ended.
"""

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Final

from fleet_common.host import write_atomically
from fleet_device.client.messaging import EdgeStateChanged, Event
from schemas.codec import decode_close, encode_close
from schemas.control import Presence
from schemas.errors import CodecError
from schemas.messages import Close, Closed

_MAX_CLOSES: Final = 8
_REPEATS: Final = 20
"""Number of repetitions of a Close: some edges never confirm."""


@dataclass(slots=True)
class UnconfirmedCloses:
    """Closes of one device that no edge has confirmed; the oldest are dropped above a limit.

    `send` sends a Close to all edges and never blocks.
    """

    send: Callable[[Close], None]
    _closes: dict[bytes, Close] = field(default_factory=dict)
    _repeats: dict[bytes, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self._closes)

    def keep(self, close: Close) -> None:
        with self._lock:
            # To any edge: the one that it was meant for may never be back.
            self._closes[close.session] = close.model_copy(update={"edge": None, "handle": None})
            self._repeats[close.session] = 0
            while len(self._closes) > _MAX_CLOSES:
                self._forget(next(iter(self._closes)))

    def on_event(self, event: Event) -> None:
        """Drop what an edge confirms; send all again when an edge's state changes. Callable from any thread.

        If an edge is gone, another records the end; one that is back has received nothing meanwhile. After a reconnect
        of the device each edge's state arrives once.
        """
        match event:
            case Closed(session=session):
                with self._lock:
                    self._forget(session)
            case EdgeStateChanged(presence=Presence.OFFLINE, before=Presence.OFFLINE):
                pass  # it publishes every second how much of its target it has loaded
            case EdgeStateChanged():
                self._repeat()

    def _repeat(self) -> None:
        with self._lock:
            closes = list(self._closes.values())
            for close in closes:
                self._repeats[close.session] += 1
                if self._repeats[close.session] >= _REPEATS:
                    self._forget(close.session)
        for close in closes:
            self.send(close)

    def _forget(self, session: bytes) -> None:
        self._closes.pop(session, None)
        self._repeats.pop(session, None)


_log = logging.getLogger(__name__)

_ENDED, _RUNNING, _REPORTS = ".ended", ".running", "[0-9a-f]*.*"
_MAX_REPORTS: Final = 1000
"""Reports that are kept; of more, the oldest are dropped."""

_CONFIRM_S: Final = 10.0
"""Longest wait for a confirmation before a report is sent again, at first; each repetition doubles it."""

_SLOWEST_S: Final = 300.0


class _News(Enum):
    KEPT = auto()  # a report was kept
    EDGE = auto()  # an edge is online
    STOP = auto()


@dataclass(slots=True)
class UnverifiedReports:
    """The reports of one device, each a file of a folder. Callable from any thread.

    Attributes:
        send: Sends a Close to all edges; never blocks.
        wall_clock: Unix seconds; reports have the age of a session, not its time.
    """

    folder: Path
    send: Callable[[Close], None] = lambda _close: None
    ready: Callable[[], bool] = lambda: True
    wall_clock: Callable[[], float] = time.time
    most: int = _MAX_REPORTS
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _news: "queue.SimpleQueue[bytes | _News]" = field(default_factory=queue.SimpleQueue)
    _thread: threading.Thread | None = None
    _unconfirmed: int = 0

    def start(self) -> None:
        """Send what an earlier process has left, as soon as an edge is online."""
        try:
            for path in self.folder.glob(f"*{_RUNNING}"):  # of a process that has ended
                if path.with_suffix(_ENDED).exists():
                    path.unlink()
                else:
                    path.rename(path.with_suffix(_ENDED))
        except OSError as error:
            _log.warning("Reports of unverified sessions in %s cannot be used: %s.", self.folder, error)
        if len(self):
            self._begin()

    def stop(self) -> None:
        """End the thread; waiting reports stay. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._news.put(_News.STOP)
            thread.join()

    def __len__(self) -> int:
        return len({path.stem for path in self.folder.glob(_REPORTS)})

    def keep(self, close: Close, *, under_way: bool = False) -> None:
        """Keep a report on disk, in place of an earlier one of the same session.

        `under_way`: the session still runs, so that this is only reported if it never ends.
        """
        whole, now = close.model_copy(update={"edge": None, "handle": None}), self.wall_clock()
        path = self._path(close.session, _RUNNING if under_way else _ENDED)
        try:
            with self._lock:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_atomically(path, encode_close(whole))
                os.utime(path, (now, now))
                if not under_way:
                    path.with_suffix(_RUNNING).unlink(missing_ok=True)
                self._drop_oldest()
        except OSError as error:
            _log.warning("A report of an unverified session is lost, %s cannot be written: %s.", path, error)
            return
        self._begin()
        if not under_way:
            self._news.put(_News.KEPT)

    def forget(self, session: bytes) -> None:
        """Delete a session's report: it is confirmed, or no unverified token is left."""
        try:
            with self._lock:
                for ending in (_ENDED, _RUNNING):
                    self._path(session, ending).unlink(missing_ok=True)
        except OSError as error:
            _log.warning("A report in %s cannot be deleted, so it will be sent again: %s.", self.folder, error)

    def on_event(self, event: Event) -> None:
        if self._thread is None:
            return
        match event:
            case Closed(session=session):
                self._news.put(session)
            case EdgeStateChanged(presence=Presence.ONLINE):
                self._news.put(_News.EDGE)

    # Private

    def _path(self, session: bytes, ending: str) -> Path:
        return self.folder / f"{session.hex()}{ending}"

    def _drop_oldest(self) -> None:
        kept = sorted(self.folder.glob(_REPORTS), key=lambda path: path.stat().st_mtime)
        if gone := kept[: -self.most]:
            for path in gone:
                path.unlink()
            _log.warning("More than %d unverified sessions wait to be reported; %d are dropped.", self.most, len(gone))

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="unverified-reports", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        said = None
        while self._wait(said):
            said = self._send_oldest() if self.ready() else None

    def _send_oldest(self) -> bytes | None:
        with self._lock:
            waiting = [(path.stat().st_mtime, path) for path in self.folder.glob(f"*{_ENDED}")]
            if not waiting:
                return None
            ended, oldest = min(waiting)
            try:
                close = decode_close(oldest.read_bytes())
            except (OSError, CodecError) as error:
                _log.warning("The report %s cannot be read and is dropped: %s", oldest, error)
                with contextlib.suppress(OSError):
                    oldest.unlink()
                    self._news.put(_News.KEPT)
                return None
        self.send(close.model_copy(update={"age_s": max(0.0, self.wall_clock() - ended)}))
        return close.session

    def _wait(self, said: bytes | None) -> bool:
        """Wait for a report to send; return False at the end. `said` is the session reported last."""
        until = time.monotonic() + min(_SLOWEST_S, _CONFIRM_S * 2.0 ** min(self._unconfirmed, 16))
        while True:
            try:
                news = self._news.get(timeout=None if said is None else max(0.0, until - time.monotonic()))
            except queue.Empty:
                self._unconfirmed += 1
                return True
            match news:
                case _News.STOP:
                    return False
                case _News.EDGE:
                    self._unconfirmed = 0
                    return True
                case _News.KEPT if said is None:
                    return True
                case bytes():
                    self.forget(news)
                    if news == said:
                        self._unconfirmed = 0
                        return True

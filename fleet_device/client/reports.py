"""Reports of unverified texts: kept on disk until an edge confirms that the session log holds them.

What a device has written without an edge, no edge knows of. Its Close is kept in an SQLite file, which survives the end
of the process, and is said when an edge is there, one after the other; the edge confirms each once it cannot be lost
any more. An edge takes a session's report as often as it comes, and the log holds it once.

A text under way is kept too, as one that failed, until its own end takes that place: so one whose process is killed is
reported. No text is kept, nor anything of a prompt: only counts, times and how it ended.
"""

import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Final

from fleet_device.client.inbox import EdgeStateChanged, Event
from schemas.codec import decode_close, encode_close
from schemas.control import Presence
from schemas.errors import CodecError
from schemas.messages import Close, Closed

_log = logging.getLogger(__name__)

_CREATE: Final = """
CREATE TABLE IF NOT EXISTS reports (
    session BLOB PRIMARY KEY,
    ended REAL NOT NULL,
    under_way INTEGER NOT NULL,
    close BLOB NOT NULL
)
"""
_MOST: Final = 1000
"""Reports that are kept; of more, the oldest are forgotten."""

_CONFIRM_S: Final = 10.0
"""Longest wait for an edge to confirm one, before it is said again, first for so long and then for longer."""

_SLOWEST_S: Final = 300.0


class _News(Enum):
    KEPT = auto()  # a report was kept
    EDGE = auto()  # an edge says that it is there
    STOP = auto()


@dataclass(slots=True)
class UnverifiedReports:
    """The reports of one device. Callable from any thread.

    Attributes:
        path: The file; it is made when there is something to keep.
        send: Sends a Close to all edges; never blocks.
        ready: Whether the broker answers, and an edge is there.
        wall_clock: Unix seconds: how long ago a text ended is told, not when.
        most: Reports that are kept.
        forgotten: Reports that were not kept, because there were too many or the file could not be written.
    """

    path: Path
    send: Callable[[Close], None] = lambda _close: None
    ready: Callable[[], bool] = lambda: True
    wall_clock: Callable[[], float] = time.time
    most: int = _MOST
    forgotten: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _database: sqlite3.Connection | None = None
    _news: "queue.SimpleQueue[bytes | _News]" = field(default_factory=queue.SimpleQueue)
    _thread: threading.Thread | None = None
    _in_vain: int = 0

    def start(self) -> None:
        """Begin to say what an earlier process has left, as soon as an edge is there."""
        with self._lock:
            if self.path.exists() and (database := self._open()) is not None:
                database.execute("UPDATE reports SET under_way = 0")  # of a process that has ended
                database.commit()
                self._begin()

    def stop(self) -> None:
        """End the thread and close the file; what waits stays in it. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._news.put(_News.STOP)
            thread.join()
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    def __len__(self) -> int:
        with self._lock:
            if self._database is None:
                return 0
            return int(self._database.execute("SELECT COUNT(*) FROM reports").fetchone()[0])

    def keep(self, close: Close, *, under_way: bool = False) -> None:
        """Keep a report, in place of an earlier one of the same session; on return it is on disk.

        Args:
            close: How the session ended.
            under_way: Whether the text is still being written, so that this is only what to say if it is never ended.
        """
        whole = close.model_copy(update={"edge": None, "handle": None})
        with self._lock:
            database = self._open()
            if database is None:
                self.forgotten += 1
                return
            try:
                with database:
                    row = (close.session, self.wall_clock(), under_way, encode_close(whole))
                    database.execute("INSERT OR REPLACE INTO reports VALUES (?, ?, ?, ?)", row)
                    self._bound(database)
            except sqlite3.Error as error:
                self.forgotten += 1
                _log.warning("What %s keeps of an unverified text is lost: %s.", self.path, error)
                return
            self._begin()
        if not under_way:
            self._news.put(_News.KEPT)

    def forget(self, session: bytes) -> None:
        """Forget a session's report: it is confirmed, or nothing unverified is left of it."""
        with self._lock:
            if self._database is None:
                return
            try:
                with self._database:
                    self._database.execute("DELETE FROM reports WHERE session = ?", (session,))
            except sqlite3.Error as error:
                _log.warning("The file %s cannot be written, so its reports will come again: %s.", self.path, error)

    def on_event(self, event: Event) -> None:
        """Take what an edge says; never blocks."""
        if self._thread is None:
            return
        match event:
            case Closed(session=session):
                self._news.put(session)
            case EdgeStateChanged(presence=Presence.ONLINE):
                self._news.put(_News.EDGE)

    # Within

    def _open(self) -> sqlite3.Connection | None:
        if self._database is None:
            try:
                database = sqlite3.connect(self.path, timeout=5.0, check_same_thread=False)
                database.execute("PRAGMA journal_mode=WAL")
                database.execute("PRAGMA synchronous=FULL")
                database.execute(_CREATE)
                database.commit()
            except sqlite3.Error as error:
                _log.warning("The file %s for reports of unverified texts cannot be used: %s.", self.path, error)
                return None
            self._database = database
        return self._database

    def _bound(self, database: sqlite3.Connection) -> None:
        oldest = "DELETE FROM reports WHERE session NOT IN (SELECT session FROM reports ORDER BY ended DESC LIMIT ?)"
        if (gone := database.execute(oldest, (self.most,)).rowcount) > 0:
            self.forgotten += gone
            _log.warning("More than %d unverified texts wait to be reported; %d are forgotten.", self.most, gone)

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="unverified-reports", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        """Say a report, and the next when it is confirmed."""
        said = None
        while self._wait(said):
            said = self._say() if self.ready() else None

    def _say(self) -> bytes | None:
        oldest = "SELECT session, ended, close FROM reports WHERE NOT under_way ORDER BY ended LIMIT 1"
        with self._lock:
            row = None if self._database is None else self._database.execute(oldest).fetchone()
        if row is None:
            return None
        session, ended, payload = row
        try:
            close = decode_close(payload)
        except CodecError as error:
            _log.warning("A report in %s cannot be read and is forgotten: %s", self.path, error)
            self.forget(session)
            self._news.put(_News.KEPT)
            return None
        self.send(close.model_copy(update={"age_s": max(0.0, self.wall_clock() - ended)}))
        return close.session

    def _wait(self, said: bytes | None) -> bool:
        """Wait until there is something to say; return False at the end.

        Args:
            said: The session whose report was said last and is to be confirmed.
        """
        until = time.monotonic() + min(_SLOWEST_S, _CONFIRM_S * 2.0 ** min(self._in_vain, 16))
        while True:
            try:
                news = self._news.get(timeout=None if said is None else max(0.0, until - time.monotonic()))
            except queue.Empty:
                self._in_vain += 1
                return True
            match news:
                case _News.STOP:
                    return False
                case _News.EDGE:
                    self._in_vain = 0
                    return True
                case _News.KEPT if said is None:
                    return True
                case bytes():
                    self.forget(news)
                    if news == said:
                        self._in_vain = 0
                        return True

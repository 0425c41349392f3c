"""Writer of the session log, off the hot path.

`put` appends to a list. A thread commits records in batches; while the database refuses them they go to the spool and
back from there later, each stored exactly once by its primary key. A commit that hangs ends by the database's timeouts.

`kill -9` loses the records of the last `flush_interval_s` and the current batch; a power cut also loses what SQLite had
not yet synchronized (a server's commits and the spool are durable). A caller that must not promise what a crash could
undo passes `then` to `put`.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from fleet_edge.session_log.errors import RecordRejected, SpoolFull, StoreError, StoreRefused, StoreUnavailable
from fleet_edge.session_log.records import Record
from fleet_edge.session_log.spool import Spool


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterSettings:
    """Bounds of the writer, and how it trades delay for throughput.

    Attributes:
        flush_interval_s: Longest wait before a commit; also what a crash may lose.
        capacity: Records in memory, about 500 bytes each.
        retry_s: Between attempts while the database or the spool's disk is away.
    """

    batch_records: int = 500
    flush_interval_s: float = 0.25
    capacity: int = 65_536
    retry_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterCounters:
    """Number of records since the start, by outcome.

    Attributes:
        replayed: Of those written, from the spool (records of an earlier run included).
        rejected: Refused by the database because of their content.
        dropped: Lost, because memory and spool were full.
        away: Whether the database did not answer at the last attempt.
        stuck: Whether neither database nor spool took the last batch.
        lag_s: Seconds since the database last held all records.
    """

    written: int
    spooled: int
    replayed: int
    rejected: int
    dropped: int
    queued: int
    away: bool
    stuck: bool
    spool_bytes: int
    lag_s: float


_log = logging.getLogger(__name__)


class RecordSink(Protocol):
    """Destination of records: a `Store`."""

    def apply(self, records: Sequence[Record]) -> None:
        """Store all of the records or none; MUST be idempotent.

        Raises:
            StoreUnavailable: Try again later; also `StoreRefused`, though an operator has to act first.
            RecordRejected: One of them can never be stored.
        """


class LogWriter:
    """Takes records from any thread and writes them to the database.

    `tell` is called on the writer's thread with a code of `event_codes` and a sentence when the database's state
    changes; it MUST NOT block or raise.
    """

    def __init__(
        self,
        sink: RecordSink,
        spool: Spool,
        *,
        settings: WriterSettings | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sink = sink
        self._spool = spool
        self._settings = settings or WriterSettings()
        self._monotonic = monotonic
        self._records: deque[Record] = deque()
        self._due = threading.Event()  # a whole batch waits, or an urgent record
        self._stopping = threading.Event()
        self._give_up_at = float("inf")
        self._thread: threading.Thread | None = None
        self._awaited: dict[Record, list[Callable[[], None]]] = {}
        self._count = threading.Lock()
        self._written = self._spooled = self._replayed = self._rejected = self._dropped = 0
        self._known_drops = 0
        self._drops_reported = False
        self._spool_error = ""
        self._spool_unreadable = False
        self._stuck = False
        self._away = False
        self._refused = False
        self._retry_at = float("-inf")
        self._away_since = 0.0
        self.tell: Callable[[str, str], None] = lambda _code, _sentence: None
        self._complete_at = monotonic()

    def start(self) -> Self:
        self._thread = threading.Thread(target=self._write_loop, name="store", daemon=True)
        self._thread.start()
        return self

    def put(self, record: Record, *, urgent: bool = False, then: Callable[[], None] | None = None) -> None:
        """Queue a record. Never blocks and never raises; a record that finds no room anywhere is counted.

        An urgent record is written at once, with everything queued. `then` makes it urgent and is called, on the thread
        that did so, once the record is written, spooled or refused for good; never if it found no room.
        """
        with self._count:
            if self._stopping.is_set() or len(self._records) >= self._settings.capacity:
                self._dropped += 1
                return
            self._records.append(record)
            if then is not None:
                self._awaited.setdefault(record, []).append(then)
        # Waking the thread for every record would cost more than the record.
        if urgent or then is not None or len(self._records) >= self._settings.batch_records:
            self._due.set()

    @property
    def counters(self) -> WriterCounters:
        complete = not self._records and self._spool.empty and not self._away
        with self._count:
            return WriterCounters(
                written=self._written,
                spooled=self._spooled,
                replayed=self._replayed,
                rejected=self._rejected,
                dropped=self._dropped,
                queued=len(self._records),
                away=self._away,
                stuck=self._stuck,
                spool_bytes=self._spool.size,
                lag_s=0.0 if complete else max(0.0, self._monotonic() - self._complete_at),
            )

    def close(self, timeout_s: float) -> bool:
        """Write or spool what was put, end the thread, and close the spool. Idempotent.

        Returns whether nothing was lost since the start: False also if work was still in progress after `timeout_s`.
        """
        self._give_up_at = self._monotonic() + timeout_s
        with self._count:
            self._stopping.set()
        self._due.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
        hung = self._thread is not None and self._thread.is_alive()
        if not hung:
            self._flush()
            self._spool.close()
        self._dropped += len(self._records)
        self._records.clear()
        self._report_drops()
        return not hung and self._dropped == 0

    def step(self) -> bool:
        """Store one batch, and if the database answers, one from the spool; return whether the spool may have more.

        Only the writing thread calls this, or the caller if `start` was not called.
        """
        began = self._monotonic()
        most = self._settings.batch_records
        batch: Sequence[Record] = [self._records.popleft() for _ in range(min(most, len(self._records)))]
        if batch and self._answers():
            batch = self._commit(batch)
        self._stuck = bool(batch) and not self._to_spool(batch)
        replayed = self._answers() and not self._spool.empty and self._replay()
        if not self._away and not self._stuck and self._spool.empty:
            # Records put since the batch was taken are younger than that.
            self._complete_at = began
        self._report_drops()
        return replayed

    def _write_loop(self) -> None:
        more = False
        while not self._stopping.is_set():
            if self._stuck:
                self._stopping.wait(self._settings.flush_interval_s)
            elif not more:
                self._due.wait(self._settings.flush_interval_s)
            if len(self._records) <= self._settings.batch_records:
                self._due.clear()
            more = self.step()
        self._flush()

    def _flush(self) -> None:
        """Empty the queue while that makes progress and the time limit of `close` allows."""
        self._stuck = False
        while self._records and not self._stuck and self._monotonic() < self._give_up_at:
            self.step()

    def _answers(self) -> bool:
        """The database is worth an attempt if it answered last time, or `retry_s` has passed."""
        return not self._away or self._monotonic() >= self._retry_at

    def _commit(self, batch: Sequence[Record], *, replayed: bool = False) -> Sequence[Record]:
        """Store a batch, without the records that never can be; return the rest if the database is away."""
        try:
            self._sink.apply(batch)
        except StoreUnavailable as error:
            self._rest(error)
            return batch
        except RecordRejected as error:
            if len(batch) > 1:
                for done, record in enumerate(batch):
                    if self._commit([record], replayed=replayed):
                        return batch[done:]
                return []
            with self._count:
                self._rejected += 1
            tables = ", ".join(batch[0].rows)
            _log.error("A record of %s is left out of the session log: %s", tables, error)
            if "events" not in batch[0].rows:  # the event of one would be another
                self.tell("record-refused", f"A record of {tables} is left out: {error}")
            self._settled(batch)
            return []
        with self._count:
            self._written += len(batch)
            self._replayed += len(batch) if replayed else 0
        self._settled(batch)
        if self._away:
            self._away = self._refused = self._drops_reported = False
            _log.info("The session log can be written again.")
            seconds = self._monotonic() - self._away_since
            self.tell("back", f"The session log can be written again, after {seconds:.0f} s; waiting records follow.")
        return []

    def _rest(self, error: StoreUnavailable) -> None:
        self._retry_at = self._monotonic() + self._settings.retry_s
        refused = isinstance(error, StoreRefused)
        if not self._away:
            self._away_since = self._monotonic()
        if not self._away or refused > self._refused:
            self.tell("refuses" if refused else "away", str(error))
            if refused:
                _log.error("Records of the session log wait in %s until this is fixed: %s", self._spool.folder, error)
            else:
                _log.warning(
                    "Records of the session log wait in %s until its database is available: %s",
                    self._spool.folder,
                    error,
                )
        self._away, self._refused = True, refused

    def _to_spool(self, batch: Sequence[Record]) -> bool:
        try:
            self._spool.append(batch)
        except SpoolFull as error:
            # Memory is the last resort; `put` drops when that is full too.
            self._records.extendleft(reversed(batch))
            self._spool_error = str(error)
            return False
        with self._count:
            self._spooled += len(batch)
        self._settled(batch)
        return True

    def _settled(self, batch: Sequence[Record]) -> None:
        with self._count:
            if not self._awaited:
                return
            callbacks = [then for record in batch for then in self._awaited.pop(record, ())]
        for then in callbacks:
            try:
                then()
            except Exception:  # noqa: BLE001 - logged with its traceback
                _log.exception("A callback of the session log failed.")

    def _replay(self) -> bool:
        try:
            batch = self._spool.peek(self._settings.batch_records)
        except StoreError:
            # It stays on disk, and does not keep new records from the database.
            if not self._spool_unreadable:
                _log.exception("Spooled records of the session log wait for the next start.")
            self._spool_unreadable = True
            return False
        if not batch or self._commit(batch, replayed=True):
            return False
        self._spool.confirm()
        return True

    def _report_drops(self) -> None:
        dropped = self._dropped
        if dropped > self._known_drops and not self._drops_reported:
            self._drops_reported = True
            cause = self._spool_error or "records arrive faster than they can be written."
            _log.error("The session log loses records, %d so far: %s", dropped, cause)
            self.tell("records-lost", f"The session log loses records, {dropped} so far: {cause}")
        self._known_drops = dropped

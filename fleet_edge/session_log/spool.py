"""Spool: where records wait, on disk, while the database does not take them.

A folder of numbered files of lines. Writing goes to the newest file and every append is fsynced; reading takes the
oldest first and removes a file when all of it is confirmed. A file is read only after writing to it has ended, and one
found at start is never written again, so a torn line is always the last of its file.

A line is `<CRC-32 of the rest, 8 hex digits> <JSON of the record>`. A damaged line fails its checksum and is skipped.
"""

import json
import logging
import os
import re
import stat
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from io import FileIO
from pathlib import Path
from typing import Any, Final
from zlib import crc32

from sqlalchemy import Table

from fleet_common.host import locked, sync
from fleet_edge.session_log.errors import SpoolFull, SpoolInUse, StoreError
from fleet_edge.session_log.records import Record
from fleet_edge.session_log.tables import METADATA, UtcDateTime

MAX_LINE_BYTES: Final = 64 << 10
"""Longest line that is read: far above any record, so that a damaged file costs bounded memory."""

_CRC_DIGITS = 8


def to_line(record: Record) -> bytes:
    """Return the record's line, newline included; raises TypeError or ValueError if a value is of no JSON type."""
    body = json.dumps([record.at, record.rows], default=datetime.isoformat, separators=(",", ":")).encode()
    return b"%08x %s\n" % (crc32(body), body)


def from_line(line: bytes) -> Record | None:
    """Read a line; None if it is damaged, or of tables that this version does not have."""
    checksum, _, body = line.rstrip(b"\n").partition(b" ")
    if len(checksum) != _CRC_DIGITS or checksum != b"%08x" % crc32(body):
        return None
    try:
        at, rows = json.loads(body)
        found = {name: _values(METADATA.tables[name], values) for name, values in rows.items()}
        return Record(datetime.fromisoformat(at), found)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _values(table: Table, values: Mapping[str, Any]) -> dict[str, Any]:
    """Read the values of a row, whose times are text; raises KeyError if its key is not whole."""
    row = {name: value for name, value in values.items() if name in table.c}
    for column in table.primary_key:
        row[column.name]
    times = [name for name, value in row.items() if value is not None and isinstance(table.c[name].type, UtcDateTime)]
    return row | {name: datetime.fromisoformat(row[name]) for name in times}


_log = logging.getLogger(__name__)

_PATTERN: Final = "spool-{:010d}.jsonl"
_NAME: Final = re.compile(r"spool-([0-9]{10,})\.jsonl")


class Spool:
    """A bounded queue of records on disk. Callable from any thread; calls block on the disk.

    The folder is created if missing, and used by one process only. `max_bytes` bounds all files together; a new one is
    begun at `file_bytes`. Raises `StoreError` if the folder cannot be used, or another process uses it.
    """

    def __init__(self, folder: Path, *, max_bytes: int = 256 << 20, file_bytes: int = 4 << 20) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._file_bytes = file_bytes
        self._lock = threading.Lock()
        self._guard = _claim(folder)
        found = _numbered(folder)
        self._sealed: deque[tuple[Path, int]] = deque(
            (path, status.st_size)
            for _, path in sorted(found.items())
            if stat.S_ISREG((status := path.lstat()).st_mode)
        )
        self._bytes = sum(size for _, size in self._sealed)
        self._next_number = 1 + max(found, default=0)
        self._active: FileIO | None = None
        self._active_path = folder
        self._active_bytes = 0
        self._offset = 0  # confirmed bytes of the oldest file
        self._peeked = 0  # read bytes of it
        self._damaged = 0

    @property
    def size(self) -> int:
        """Bytes on disk, including those confirmed but not yet removed."""
        return self._bytes

    @property
    def empty(self) -> bool:
        return self._bytes == 0

    @property
    def damaged(self) -> int:
        """Lines skipped since the start because of a wrong checksum."""
        return self._damaged

    def append(self, records: Iterable[Record]) -> None:
        """Store records; on return they are on disk.

        Raises `SpoolFull` and stores none of them if the bound is reached, or the disk did not take them.
        """
        with self._lock:
            data = b"".join(self._lines(records))
            if self._bytes + len(data) > self._max_bytes:
                raise SpoolFull(f"The spool {self.folder} holds {self._bytes} bytes, and no more may be added.")
            try:
                file = self._writable()
                _write(file, data)
                os.fsync(file.fileno())
            except OSError as error:
                self._undo()
                raise SpoolFull(f"The spool {self.folder} cannot be written: {error.strerror}.") from error
            self._bytes += len(data)
            self._active_bytes += len(data)
            if self._active_bytes >= self._file_bytes:
                self._seal()

    def peek(self, limit: int) -> Sequence[Record]:
        """Return up to `limit` of the oldest records; they stay until `confirm`. Only one thread may read.

        Raises `StoreError` if the oldest file cannot be read.
        """
        with self._lock:
            while True:
                if not self._sealed:
                    self._seal()
                if not self._sealed:
                    return []
                records = self._read(self._sealed[0][0], limit)
                if records:
                    return records
                self._forget_oldest()

    def confirm(self) -> None:
        """Remove what the last `peek` returned."""
        with self._lock:
            self._offset = self._peeked
            if self._sealed and self._offset >= self._sealed[0][1]:
                self._forget_oldest()

    def close(self) -> None:
        """Stop writing and release the folder; waiting records stay. Idempotent."""
        with self._lock:
            self._seal()
            self._guard.close()

    def _lines(self, records: Iterable[Record]) -> Iterator[bytes]:
        for record in records:
            try:
                yield to_line(record)
            except (TypeError, ValueError):
                self._damaged += 1
                _log.warning("A record of %s cannot be spooled and was skipped.", ", ".join(record.rows))

    def _writable(self) -> FileIO:
        if self._active is None:
            self._active_path = self.folder / _PATTERN.format(self._next_number)
            self._active = FileIO(self._active_path, "x")
            self._next_number += 1
            self._active_bytes = 0
            sync(self.folder)
        return self._active

    def _undo(self) -> None:
        """Cut off a half-written append, and end the file: a full disk may have damaged it."""
        if self._active is not None:
            try:
                os.ftruncate(self._active.fileno(), self._active_bytes)
            except OSError:
                _log.warning("An incomplete line remains in %s and will be skipped.", self._active_path)
            self._seal()

    def _seal(self) -> None:
        if self._active is None:
            return
        path = self._active_path
        self._active.close()
        self._active = None
        if self._active_bytes:
            self._sealed.append((path, self._active_bytes))
        else:
            path.unlink(missing_ok=True)

    def _read(self, path: Path, limit: int) -> list[Record]:
        records: list[Record] = []
        try:
            with path.open("rb") as file:
                file.seek(self._offset)
                while len(records) < limit and (line := file.readline(MAX_LINE_BYTES)):
                    record = from_line(line)
                    if record is None:
                        self._damaged += 1
                        _log.warning("A damaged line of the spool file %s was skipped.", path)
                    else:
                        records.append(record)
                self._peeked = file.tell()
        except OSError as error:
            raise StoreError(f"The spool file {path} cannot be read: {error.strerror}.") from error
        return records

    def _forget_oldest(self) -> None:
        path, size = self._sealed.popleft()
        self._bytes -= size
        self._offset = self._peeked = 0
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            # Replayed again at the next start, which changes nothing.
            _log.warning("The spool file %s is written but cannot be removed: %s.", path, error.strerror)


def _numbered(folder: Path) -> dict[int, Path]:
    """Return the spool files by number; other files of the folder are ignored."""
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in named if match is not None}


def _claim(folder: Path) -> ExitStack:
    """Create and lock the folder: two processes would remove each other's files."""
    guard = ExitStack()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        guard.enter_context(locked(folder, timeout_s=0.0))
    except TimeoutError as error:
        raise SpoolInUse(f"The spool folder {folder} is in use by another process; give each its own.") from error
    except OSError as error:
        raise StoreError(f"The spool folder {folder} cannot be used: {error.strerror}.") from error
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        guard.close()
        raise StoreError(f"The spool folder {folder} cannot be used by this user; change its owner or mode.")
    return guard


def _write(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]

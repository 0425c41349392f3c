"""Backup and restore of a session log in SQLite while it is written; compaction of a file.

A server's database is copied by its own tools, which the errors name.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from fleet_common.host import sync
from fleet_edge.store.engine import parse_url, shown, sqlite_path
from fleet_edge.store.errors import StoreError, StoreRefused, StoreUnavailable
from fleet_edge.store.models import REVISION

Progress = Callable[[int, int], object]
"""Called with the number of copied pages and of all pages."""

_STEP_PAGES: Final = 4096
_BUSY_S: Final = 5.0
_NAMES: Final = "fleet-*.sqlite3"


def back_up(url: str, to: Path, *, progress: Progress | None = None) -> int:
    """Copy a session log as it is at one instant into a checked file, while an edge writes to it.

    Meanwhile the write-ahead log keeps all that the edge writes. The file is created, readable by its owner alone.
    Returns its size in bytes. Raises `StoreRefused` if there is no such database, the file exists, or the disk is full;
    `StoreUnavailable`; `StoreError` for a server or a file of something else.
    """
    source = _file_of(url, "pg_dump --format=custom --file={to} '{url}'", to=to)
    if to.exists():
        raise StoreRefused(f"There is a file {to} already; name another.")
    with _made_whole(to) as part, _failing_in_a_sentence(source), closing(_opened(source, mode="ro")) as connection:
        # An open read transaction, so that the copy does not restart whenever an edge writes.
        connection.execute("BEGIN")
        _check(connection, source)
        with closing(sqlite3.connect(part)) as copy:
            report = None if progress is None else lambda _, left, pages: progress(pages - left, pages)
            connection.backup(copy, pages=_STEP_PAGES, progress=report)
            # One file without a journal, which any reader can open.
            copy.execute("PRAGMA journal_mode = DELETE")
            _check(copy, part, thoroughly=True)
    return to.stat().st_size


def back_up_into(url: str, folder: Path, *, keep: int, now: datetime) -> Path:
    """Make a backup named after the time, and delete all but the latest ones; otherwise as `back_up`."""
    to = folder / _name(now)
    back_up(url, to)
    for old in sorted(folder.glob(_NAMES))[:-keep]:
        old.unlink()
    return to


def check_backups(url: str, folder: Path) -> None:
    """Check that regular backups can be made in a folder.

    Raises `StoreError` if the database is a server's, which its own tool has to copy, or the folder is missing or not
    ours.
    """
    _file_of(url, "pg_dump --format=custom --file={to} '{url}'", to=folder / "fleet.pgdump")
    if not folder.is_dir():
        raise StoreError(f"The folder {folder} does not exist; create it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreError(f"The folder {folder} may not be written by this user; change its owner or mode.")


def is_due(folder: Path, *, every: timedelta, now: datetime) -> bool:
    """Return whether the latest backup in a folder is older than `every`, or there is none."""
    latest = max(folder.glob(_NAMES), default=None)
    return latest is None or latest.name < _name(now - every)


def restore(backup: Path, url: str, *, replace: bool, now: datetime) -> Path | None:
    """Replace a session log that no process has open by a backup; return the path of the replaced file.

    The backup stays as it is. An edge migrates the database when it starts. Raises `StoreRefused` if there is a
    database and not `replace`, a process has it open, or the disk is full; `StoreError` if the backup is damaged, no
    session log or newer than this software, or the URL is a server's.
    """
    path = _file_of(url, "pg_restore --clean --if-exists --dbname='{url}' {to}", to=backup)
    with _failing_in_a_sentence(backup), closing(_opened(backup, mode="ro")) as source:
        _check(source, backup, thoroughly=True)
        if path.exists() and not replace:
            raise StoreRefused(f"There is a database at {path}; --replace moves it aside and restores the backup.")
        aside = path.with_name(f"{path.name}.{now.astimezone(UTC):%Y%m%dT%H%M%SZ}") if path.exists() else None
        new = path.with_name(f"{path.name}.restored")
        if new.exists():
            raise StoreRefused(f"There is a file {new} of an earlier attempt; delete it first.")
        with _made_whole(new) as part, closing(sqlite3.connect(part)) as copy:
            source.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
    if aside is not None:
        _settle(path)
        for end in ("", "-wal", "-shm"):  # of a damaged one; what was settled has but its one file
            if (part_of := path.with_name(path.name + end)).exists():
                part_of.rename(aside.with_name(aside.name + end))
    new.rename(path)
    return aside


def compact(url: str) -> tuple[int, int]:
    """Rewrite a file without its free pages; return its size before and after, in bytes.

    Needs as much free disk again as the database takes. Edges wait meanwhile, with their records in their spools.
    Raises `StoreRefused` if there is no such database or the disk is full, `StoreUnavailable` if another process is
    writing, `StoreError` for a server or a file of something else.
    """
    path = _file_of(url, "vacuumdb --full --dbname='{url}'", to=Path())
    with _failing_in_a_sentence(path), closing(_opened(path, mode="rw")) as connection:
        _check(connection, path)
        before = path.stat().st_size
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return before, path.stat().st_size


def _name(at: datetime) -> str:
    return f"fleet-{at.astimezone(UTC):%Y%m%dT%H%M%SZ}.sqlite3"


def _file_of(url: str, instead: str, *, to: Path) -> Path:
    parsed = parse_url(url)
    path = sqlite_path(parsed)
    if path is None:
        raise StoreError(
            f"A server's database is not a file; use its own tool: {instead.format(to=to, url=shown(parsed))}"
        )
    return path


def _opened(path: Path, *, mode: str) -> sqlite3.Connection:
    if not path.is_file():
        raise StoreRefused(f"There is no file {path}.")
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=_BUSY_S, isolation_level=None)


def _check(connection: sqlite3.Connection, path: Path, *, thoroughly: bool = False) -> None:
    """Check that a file is a session log that this software can read, and is whole."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone() is None:
        raise StoreError(f"{path} is no session log.")
    [revision] = connection.execute("SELECT version_num FROM alembic_version").fetchone() or ("",)
    if revision > REVISION:
        raise StoreError(f"{path} was written by a newer version of this software; upgrade this installation first.")
    if thoroughly:
        [said] = connection.execute("PRAGMA quick_check(1)").fetchone()
        if said != "ok":
            raise StoreError(f"{path} is damaged: {said}.")


def _settle(path: Path) -> None:
    """Move everything into the database's one file, which fails if another process has it open."""
    with closing(_opened(path, mode="rw")) as connection:
        connection.execute("PRAGMA busy_timeout = 0")
        try:
            [mode] = connection.execute("PRAGMA journal_mode = DELETE").fetchone()
        except sqlite3.OperationalError:
            mode = "wal"
        except sqlite3.DatabaseError:
            return  # damaged, which may be why it is replaced: there is nothing to bring into it
    if mode != "delete":
        path.with_name(f"{path.name}.restored").unlink()
        raise StoreRefused(f"An edge or a dashboard has {path} open; stop it first.")


@contextmanager
def _made_whole(path: Path) -> Iterator[Path]:
    """Create a file under another name, and rename it once all of it is on disk."""
    part = path.with_name(f"{path.name}.part")
    try:
        # A copy is as private as the database.
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
    except OSError as error:
        raise StoreRefused(f"The file {part} cannot be made: {error.strerror}.") from error
    try:
        yield part
        sync(part)
        part.rename(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _failing_in_a_sentence(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF
        kind = StoreUnavailable if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED} else StoreRefused
        raise kind(f"{path} cannot be used: {error}.") from error
    except OSError as error:
        raise StoreRefused(f"{error.filename or path} cannot be used: {error.strerror}.") from error

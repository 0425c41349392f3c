"""Index of all signed certificates, and the rules on names and keys that follow from it."""

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict

from fleet_common.identity.certificates import RENEWAL_DAYS, IdentityRole, folded
from fleet_common.identity.files import SECRET, AuthorityError, NameRefused, SigningRefused

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS names (
    folded TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    role TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS certificates (
    serial TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    key_sha256 TEXT NOT NULL,
    record TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS certificates_name ON certificates (name);
CREATE INDEX IF NOT EXISTS certificates_key ON certificates (key_sha256);
CREATE TABLE IF NOT EXISTS lists (
    number INTEGER PRIMARY KEY,
    this_update TEXT NOT NULL
);
"""


class CertificateState(StrEnum):
    VALID = "valid"
    DUE = "due"  # to be renewed now
    ENDED = "ended"
    REVOKED = "revoked"
    SUSPENDED = "suspended"  # refused until it is lifted
    REPLACED = "replaced"  # valid, but there is a newer one


class CertificateRecord(BaseModel):
    """One certificate: what it is for, who made, suspended and revoked it, and its state.

    Attributes:
        action: `sign`, `renew`, or `take over` for one that exists only to end the sessions of a revoked identity.
        by: User who signed it.
        state: At the moment of `standing`; None before, as `days_left`, which is negative after the end.
    """

    model_config = ConfigDict(frozen=True)

    serial: str
    name: str
    role: IdentityRole
    hosts: tuple[str, ...] = ()
    key_sha256: str
    not_before: datetime
    not_after: datetime
    pem: str
    action: str = "sign"
    by: str = ""
    revoked_at: datetime | None = None
    revoked_by: str = ""
    suspended_at: datetime | None = None
    suspended_by: str = ""
    state: CertificateState | None = None
    days_left: int | None = None

    @property
    def takeover(self) -> bool:
        return self.action == "take over"

    @property
    def suspended(self) -> bool:
        return self.suspended_at is not None and self.revoked_at is None


class CertificateIndex:
    """SQLite index; use as a context manager. Writers hold the folder's lock."""

    def __init__(self, path: Path, *, new: bool = False) -> None:
        """Open the index, or create it if `new`; raise AuthorityError if it is missing or invalid.

        A missing index is an error because an empty one would revoke nobody.
        """
        self._path = path
        if not new and not path.exists():
            raise AuthorityError(f"The authority's index {path} is missing: restore it from a backup.")
        with self._complaining():
            path.touch(mode=SECRET)
            self._connection = sqlite3.connect(path, isolation_level=None)
            try:
                self._connection.execute("PRAGMA synchronous = FULL")
                self._connection.executescript(_SCHEMA)
            except sqlite3.Error:
                self._connection.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Commit all changes in the block, or none."""
        with self._complaining():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def owner(self, name: str) -> tuple[str, IdentityRole] | None:
        """Return spelling and role of the identity that has or had this name, ignoring case."""
        rows = self._rows("SELECT name, role FROM names WHERE folded = ?", folded(name))
        return (rows[0][0], IdentityRole(rows[0][1])) if rows else None

    def keep_name(self, name: str, role: IdentityRole) -> None:
        self._run("INSERT OR IGNORE INTO names VALUES (?, ?, ?)", folded(name), name, role.value)

    def put(self, record: CertificateRecord) -> None:
        """Add a record, or replace that of the same certificate."""
        stored = record.model_dump_json(exclude={"state", "days_left"})
        self._run(
            "INSERT INTO certificates VALUES (?, ?, ?, ?) ON CONFLICT (serial) DO UPDATE SET record = excluded.record",
            record.serial,
            record.name,
            record.key_sha256,
            stored,
        )

    def of_name(self, name: str) -> tuple[CertificateRecord, ...]:
        return tuple(each for each in self._records("WHERE name = ?", name) if not each.takeover)

    def of_key(self, key_sha256: str) -> tuple[CertificateRecord, ...]:
        return self._records("WHERE key_sha256 = ?", key_sha256)

    def identities(self) -> tuple[CertificateRecord, ...]:
        return tuple(each for each in self._records() if not each.takeover)

    def refused(self, *, ending_after: datetime) -> tuple[CertificateRecord, ...]:
        """Return the revoked and the suspended certificates, without those that expired long ago."""
        refused = (each for each in self._records() if each.revoked_at or each.suspended)
        return tuple(each for each in refused if each.not_after > ending_after)

    def next_list(self, now: datetime) -> tuple[int, datetime]:
        """Return and record number and time of the next revocation list.

        Of two lists of one CA, OpenSSL uses the one with the later time in whole seconds, and keeps the present one if
        they are equal. So each list is at least a second later than the last.
        """
        rows = self._rows("SELECT number, this_update FROM lists ORDER BY number DESC LIMIT 1")
        number, this_update = 1, now.replace(microsecond=0)
        if rows:
            number = rows[0][0] + 1
            last = datetime.fromisoformat(rows[0][1])
            this_update = max(this_update, datetime.fromtimestamp(last.timestamp() + 1, UTC))
        self._run("INSERT INTO lists VALUES (?, ?)", number, this_update.isoformat())
        return number, this_update

    def _records(self, condition: str = "", *values: object) -> tuple[CertificateRecord, ...]:
        rows = self._rows(f"SELECT record FROM certificates {condition} ORDER BY rowid", *values)  # noqa: S608 - ours
        return tuple(
            sorted((CertificateRecord.model_validate_json(row[0]) for row in rows), key=lambda each: each.not_before)
        )

    def _rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with self._complaining():
            return self._connection.execute(statement, values).fetchall()

    def _run(self, statement: str, *values: object) -> None:
        with self._complaining():
            self._connection.execute(statement, values)

    @contextlib.contextmanager
    def _complaining(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise AuthorityError(
                f"The authority's index {self._path} cannot be used ({error}): check the disk, or restore it "
                "from a backup."
            ) from error


def check_free(index: CertificateIndex, name: str, role: IdentityRole) -> None:
    """Raise NameRefused for a name that another role has or had, or that differs from one in case only."""
    owner = index.owner(name)
    if owner is not None and owner != (name, role):
        known, known_role = owner
        raise NameRefused(
            f"The name {name!r} cannot be given to the role {role}: {known!r} belongs to the role {known_role}; "
            "choose another."
        )


def check_key(index: CertificateIndex, key_sha256: str, name: str) -> None:
    """Raise SigningRefused for a key that was revoked or belongs to another identity."""
    for entry in index.of_key(key_sha256):
        if entry.revoked_at is not None:
            raise SigningRefused(
                f"The key of this request was revoked with a certificate of {entry.name!r}: make a new key "
                "(`fleet device enroll --new-key`)."
            )
        if entry.name != name:
            raise SigningRefused(f"The key of this request is that of {entry.name!r}: every device makes its own.")


def check_not_suspended(index: CertificateIndex, name: str) -> None:
    """Raise NameRefused for a suspended name: a new certificate would not be on the revocation list."""
    if any(entry.suspended for entry in index.of_name(name)):
        raise NameRefused(f"{name!r} is suspended: lift that first (`fleet broker unsuspend {name}`), or revoke it.")


def current(index: CertificateIndex, name: str, *, now: datetime) -> CertificateRecord | None:
    """Return the certificate of this name that ends last, if it is valid now."""
    entries = [entry for entry in index.of_name(name) if entry.revoked_at is None and entry.not_after > now]
    return max(entries, key=lambda entry: entry.not_after, default=None)


def renewable(index: CertificateIndex, name: str, *, now: datetime, early: bool) -> CertificateRecord:
    """Return the certificate to renew, which may have expired; raise NameRefused if there is none, or too early."""
    known = index.of_name(name)
    if not known:
        raise NameRefused(
            f"There is no certificate for {name[:80]!r}: see `fleet broker list`, or sign a request for it."
        )
    kept = [entry for entry in known if entry.revoked_at is None]
    if not kept:
        raise NameRefused(f"{name!r} was revoked: it needs a new key and a new request (`fleet broker sign`).")
    check_not_suspended(index, name)
    latest = max(kept, key=lambda entry: entry.not_after)
    if latest.not_after - now > timedelta(days=RENEWAL_DAYS) and not early:
        raise NameRefused(
            f"The certificate of {name!r} is valid until {latest.not_after:%Y-%m-%d}: it is renewed in its last "
            f"{RENEWAL_DAYS} days, or now with --early."
        )
    return latest


_DAY: Final = timedelta(days=1)


def standing(records: Iterable[CertificateRecord], *, now: datetime, history: bool = False) -> list[CertificateRecord]:
    """Return records with their state, sorted by name; the given ones are oldest first.

    `history` includes certificates that a newer one of the same name replaces.
    """
    found = list(records)
    newest = {each.name: each.serial for each in found}
    shown = [each for each in found if history or newest[each.name] == each.serial]
    return [
        each.model_copy(
            update={
                "state": _state(each, now, replaced=newest[each.name] != each.serial),
                "days_left": (each.not_after - now) // _DAY,
            }
        )
        for each in sorted(shown, key=lambda each: each.name)
    ]


def _state(record: CertificateRecord, now: datetime, *, replaced: bool) -> CertificateState:
    if record.revoked_at is not None:
        return CertificateState.REVOKED
    if record.suspended:
        return CertificateState.SUSPENDED
    if record.not_after <= now:
        return CertificateState.ENDED
    if replaced:
        return CertificateState.REPLACED
    return CertificateState.DUE if record.not_after - now <= timedelta(days=RENEWAL_DAYS) else CertificateState.VALID

"""Index of all signed certificates, and the rules on names and keys that follow from it."""

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Self

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
    role TEXT NOT NULL,
    hosts TEXT NOT NULL,
    key_sha256 TEXT NOT NULL,
    not_before TEXT NOT NULL,
    not_after TEXT NOT NULL,
    pem TEXT NOT NULL,
    takeover INTEGER NOT NULL,
    revoked_at TEXT
);
CREATE INDEX IF NOT EXISTS certificates_name ON certificates (name);
CREATE INDEX IF NOT EXISTS certificates_key ON certificates (key_sha256);
CREATE TABLE IF NOT EXISTS lists (
    number INTEGER PRIMARY KEY,
    this_update TEXT NOT NULL
);
"""

_COLUMNS: Final = "serial, name, role, hosts, key_sha256, not_before, not_after, pem, takeover, revoked_at"


@dataclass(frozen=True, slots=True)
class Entry:
    """One certificate; `takeover` marks one that exists only to end the sessions of a revoked identity."""

    serial: str
    name: str
    role: IdentityRole
    hosts: tuple[str, ...]
    key_sha256: str
    not_before: datetime
    not_after: datetime
    pem: str
    takeover: bool = False
    revoked_at: datetime | None = None


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

    def add(self, entry: Entry) -> None:
        self._run(
            f"INSERT INTO certificates ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608 - constants
            entry.serial,
            entry.name,
            entry.role.value,
            " ".join(entry.hosts),
            entry.key_sha256,
            entry.not_before.isoformat(),
            entry.not_after.isoformat(),
            entry.pem,
            int(entry.takeover),
            entry.revoked_at.isoformat() if entry.revoked_at is not None else None,
        )

    def revoke(self, serial: str, at: datetime) -> None:
        """Mark a certificate as revoked. Idempotent."""
        self._run(
            "UPDATE certificates SET revoked_at = ? WHERE serial = ? AND revoked_at IS NULL", at.isoformat(), serial
        )

    def of_name(self, name: str) -> tuple[Entry, ...]:
        return self._entries("name = ? AND takeover = 0", name)

    def of_key(self, key_sha256: str) -> tuple[Entry, ...]:
        return self._entries("key_sha256 = ?", key_sha256)

    def identities(self) -> tuple[Entry, ...]:
        return self._entries("takeover = 0")

    def revoked(self, *, ending_after: datetime) -> tuple[Entry, ...]:
        """Return the revoked certificates, without those that expired long ago."""
        return self._entries("revoked_at IS NOT NULL AND not_after > ?", ending_after.isoformat())

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

    def _entries(self, condition: str, *values: object) -> tuple[Entry, ...]:
        rows = self._rows(
            f"SELECT {_COLUMNS} FROM certificates WHERE {condition} ORDER BY not_before, rowid",  # noqa: S608 - ours
            *values,
        )
        return tuple(_entry(row) for row in rows)

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


def _entry(row: Sequence[Any]) -> Entry:
    serial, name, role, hosts, key_sha256, not_before, not_after, pem, takeover, revoked_at = row
    return Entry(
        serial=serial,
        name=name,
        role=IdentityRole(role),
        hosts=tuple(hosts.split()),
        key_sha256=key_sha256,
        not_before=datetime.fromisoformat(not_before),
        not_after=datetime.fromisoformat(not_after),
        pem=pem,
        takeover=bool(takeover),
        revoked_at=datetime.fromisoformat(revoked_at) if revoked_at else None,
    )


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


def current(index: CertificateIndex, name: str, *, now: datetime) -> Entry | None:
    """Return the certificate of this name that ends last, if it is valid now."""
    entries = [entry for entry in index.of_name(name) if entry.revoked_at is None and entry.not_after > now]
    return max(entries, key=lambda entry: entry.not_after, default=None)


def renewable(index: CertificateIndex, name: str, *, now: datetime, early: bool) -> Entry:
    """Return the certificate to renew, which may have expired; raise NameRefused if there is none, or too early."""
    known = index.of_name(name)
    if not known:
        raise NameRefused(
            f"There is no certificate for {name[:80]!r}: see `fleet broker list`, or sign a request for it."
        )
    kept = [entry for entry in known if entry.revoked_at is None]
    if not kept:
        raise NameRefused(f"{name!r} was revoked: it needs a new key and a new request (`fleet broker sign`).")
    latest = max(kept, key=lambda entry: entry.not_after)
    if latest.not_after - now > timedelta(days=RENEWAL_DAYS) and not early:
        raise NameRefused(
            f"The certificate of {name!r} is valid until {latest.not_after:%Y-%m-%d}: it is renewed in its last "
            f"{RENEWAL_DAYS} days, or now with --early."
        )
    return latest


DAY_S = 86_400


class CertificateState(StrEnum):
    VALID = "valid"
    DUE = "due"  # to be renewed now
    ENDED = "ended"
    REVOKED = "revoked"
    REPLACED = "replaced"  # valid, but there is a newer one


@dataclass(frozen=True, slots=True)
class CertificateStatus:
    """State of one certificate at one moment; `days_left` is negative after its end."""

    name: str
    role: IdentityRole
    state: CertificateState
    days_left: int
    not_after: datetime
    revoked_at: datetime | None
    hosts: tuple[str, ...]
    serial: str


def certificate_statuses(entries: Iterable[Entry], *, now: datetime, history: bool = False) -> list[CertificateStatus]:
    """Return the state of each certificate, sorted by name; `entries` are oldest first.

    `history` includes certificates that a newer one of the same name replaces.
    """
    found = list(entries)
    newest = {entry.name: entry.serial for entry in found}
    shown = [entry for entry in found if history or newest[entry.name] == entry.serial]
    return [
        CertificateStatus(
            name=entry.name,
            role=entry.role,
            state=_state(entry, now, replaced=newest[entry.name] != entry.serial),
            days_left=int((entry.not_after - now).total_seconds() // DAY_S),
            not_after=entry.not_after,
            revoked_at=entry.revoked_at,
            hosts=entry.hosts,
            serial=entry.serial,
        )
        for entry in sorted(shown, key=lambda entry: entry.name)
    ]


def _state(entry: Entry, now: datetime, *, replaced: bool) -> CertificateState:
    if entry.revoked_at is not None:
        return CertificateState.REVOKED
    if entry.not_after <= now:
        return CertificateState.ENDED
    if replaced:
        return CertificateState.REPLACED
    return CertificateState.DUE if entry.not_after - now <= timedelta(days=RENEWAL_DAYS) else CertificateState.VALID

"""Accounts of the dashboard: passwords (argon2id), logins of browsers, limits of login attempts.

Cookies are random; the database stores their SHA-256.

Login attempts are limited by address, because checking a password is expensive, and by account, because guesses may
come from many addresses; a successful one costs nothing.
"""

import hashlib
import hmac
import secrets
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from threading import BoundedSemaphore, Lock
from typing import Final

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError
from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from fleet_admin.dashboard.errors import AccountError
from fleet_admin.dashboard.settings import AccountRole
from fleet_admin.steering.planning import Actor
from fleet_common.limits import TokenBucket, network_of
from fleet_edge.session_log import ACCOUNTS, LOGINS, AuditEntry, open_existing, record_audit, transaction
from schemas.errors import InvalidName
from schemas.names import check_name


class AccountDatabase:
    """The session log's database, open to write accounts. Thread-safe. Raises `StoreError` if it cannot be opened."""

    def __init__(self, url: str, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.now = now
        self._engine = open_existing(url, read_only=False)
        weakref.finalize(self, self._engine.dispose)

    def begin(self) -> AbstractContextManager[Connection]:
        """Begin a transaction; raises `StoreUnavailable` if the database does not answer or is read-only."""
        return transaction(self._engine)

    def audit(
        self, connection: Connection, action: str, subject: str, *, actor: Actor, after: str | None = None
    ) -> None:
        entry = AuditEntry(who=actor.who, action=action, subject=subject, after=after, source=actor.source)
        record_audit(connection, [entry], now=self.now())


MIN_PASSWORD: Final = 12
"""Minimum characters of a password, against offline guessing of stolen hashes."""

_MAX_PASSWORD: Final = 256
_RANDOM_BYTES: Final = 32
_AT_ONCE: Final = 2


class Passwords:
    """Hashes and checks passwords, two at a time: a check takes about 0.2 s of a core and 64 MiB."""

    def __init__(self, hasher: PasswordHasher | None = None) -> None:
        self._hasher = hasher or PasswordHasher()
        self._places = BoundedSemaphore(_AT_ONCE)
        # Checked for unknown accounts, so that the response time does not reveal which names exist.
        self._nobody = self._hasher.hash(new_token())

    def hash(self, password: str, *, account: str) -> str:
        """Return the hash of a password; raises `AccountError` if it is too short, too long, or the account's name."""
        if not MIN_PASSWORD <= len(password) <= _MAX_PASSWORD:
            raise AccountError(
                f"A password has {MIN_PASSWORD} to {_MAX_PASSWORD} characters, this one {len(password):,}."
            )
        if password.casefold() in {account.casefold(), account.casefold()[::-1]} or len(set(password)) == 1:
            raise AccountError("A password is not the account's name, nor one character repeated; take another.")
        with self._places:
            return self._hasher.hash(password)

    def check(self, password: str, known: str | None) -> bool:
        """Compare a password with a hash; takes the same time without a hash."""
        try:
            with self._places:
                self._hasher.verify(known or self._nobody, password[: _MAX_PASSWORD + 1])
        except (Argon2Error, InvalidHashError):
            return False
        return known is not None


def new_token() -> str:
    """Return 256 random bits for a cookie."""
    return secrets.token_urlsafe(_RANDOM_BYTES)


def fingerprint(secret: str) -> str:
    """Return the stored hash of a random secret; lookup by equality reveals none of the secret."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def csrf_token(cookie: str) -> str:
    """Return the token in the forms of the browser with this cookie, unknown to other sites."""
    return hmac.new(cookie.encode("utf-8", "replace"), b"form", hashlib.sha256).hexdigest()


@dataclass(frozen=True, slots=True)
class Account:
    """An account; without a password only a proxy can identify it."""

    name: str
    role: AccountRole
    has_password: bool
    created_at: datetime
    changed_at: datetime


class Accounts:
    def __init__(self, database: AccountDatabase, *, passwords: Passwords | None = None) -> None:
        self._database = database
        self._passwords = passwords or Passwords()

    def list(self) -> list[Account]:
        with self._database.begin() as connection:
            rows = connection.execute(select(ACCOUNTS).order_by(ACCOUNTS.c.account)).all()
        return [
            Account(row.account, AccountRole(row.role), row.password is not None, row.created_at, row.changed_at)
            for row in rows
        ]

    def role(self, name: str) -> AccountRole | None:
        with self._database.begin() as connection:
            found = connection.scalar(select(ACCOUNTS.c.role).where(ACCOUNTS.c.account == name))
        return None if found is None else AccountRole(found)

    def add(self, name: str, *, role: AccountRole, password: str | None, actor: Actor) -> None:
        """Add an account; without a password only a proxy identifies it. Raises `AccountError`."""
        try:
            check_name(name)
        except InvalidName as error:
            raise AccountError(str(error)) from None
        hashed = None if password is None else self._passwords.hash(password, account=name)
        now = self._database.now()
        row = {"account": name, "role": role, "password": hashed, "created_at": now, "changed_at": now}
        with self._database.begin() as connection:
            try:
                connection.execute(insert(ACCOUNTS).values(row))
            except IntegrityError:
                raise AccountError(
                    f"There is an account {name} already; `fleet admin user password {name}` gives it another password."
                ) from None
            self._database.audit(connection, "account add", name, actor=actor, after=str(role))

    def remove(self, name: str, *, actor: Actor) -> None:
        """Remove an account with its logins; raises `AccountError` if there is none."""
        with self._database.begin() as connection:
            removed = connection.execute(delete(ACCOUNTS).where(ACCOUNTS.c.account == name)).rowcount
            if removed:
                connection.execute(delete(LOGINS).where(LOGINS.c.account == name))
                self._database.audit(connection, "account remove", name, actor=actor)
        if not removed:
            raise AccountError(_unknown(name))

    def set_password(self, name: str, password: str, *, actor: Actor) -> None:
        """Change a password and end all logins; raises `AccountError` for an unknown account or an invalid password."""
        hashed = self._passwords.hash(password, account=name)
        with self._database.begin() as connection:
            self._change(connection, name, password=hashed)
            self._database.audit(connection, "account password", name, actor=actor)

    def set_role(self, name: str, role: AccountRole, *, actor: Actor) -> None:
        """Change a role and end all logins; raises `AccountError` for an unknown account."""
        with self._database.begin() as connection:
            self._change(connection, name, role=str(role))
            self._database.audit(connection, "account role", name, actor=actor, after=str(role))

    def check(self, name: str, password: str) -> bool:
        """Check an account's password; takes the same time if there is no such account."""
        return self._passwords.check(password, self._hash(name))

    def _hash(self, name: str) -> str | None:
        with self._database.begin() as connection:
            return connection.scalar(select(ACCOUNTS.c.password).where(ACCOUNTS.c.account == name))

    def _change(self, connection: Connection, name: str, **values: str) -> None:
        changed = connection.execute(
            update(ACCOUNTS).where(ACCOUNTS.c.account == name).values(changed_at=self._database.now(), **values)
        ).rowcount
        if not changed:
            raise AccountError(_unknown(name))
        connection.execute(delete(LOGINS).where(LOGINS.c.account == name))


def _unknown(name: str) -> str:
    return f"There is no account {name[:63]!r}; `fleet admin user list` lists those there are."


_MAX_LOGINS: Final = 20
"""Browsers of one account: the oldest is logged out, so that logins cannot fill the table."""

_NOTED_EVERY: Final = timedelta(minutes=1)
"""Resolution of a browser's last use, because each update is a write."""


@dataclass(frozen=True, slots=True)
class Login:
    """A browser's login, with the account's current role, until `expires_at` at the latest."""

    account: str
    role: AccountRole
    expires_at: datetime


class Logins:
    def __init__(self, database: AccountDatabase, *, idle: timedelta, longest: timedelta) -> None:
        self._database = database
        self._idle = idle
        self._longest = longest

    def begin(self, account: str, *, address: str) -> str:
        """Log a browser in; return a new cookie, never a reused one."""
        token, now = new_token(), self._database.now()
        row = {
            "fingerprint": fingerprint(token),
            "account": account,
            "address": address,
            "created_at": now,
            "seen_at": now,
            "expires_at": now + self._longest,
        }
        of_account = (
            select(LOGINS.c.fingerprint)
            .where(LOGINS.c.account == account)
            .order_by(LOGINS.c.seen_at.desc())
            .offset(_MAX_LOGINS - 1)
        )
        with self._database.begin() as connection:
            connection.execute(delete(LOGINS).where(LOGINS.c.expires_at < now))
            too_many = connection.scalars(of_account).all()
            connection.execute(delete(LOGINS).where(LOGINS.c.fingerprint.in_(too_many)))
            connection.execute(insert(LOGINS).values(row))
        return token

    def find(self, token: str) -> Login | None:
        """Return the login of a cookie; None if it is unknown, ended or expired."""
        now = self._database.now()
        query = (
            select(LOGINS.c.account, LOGINS.c.seen_at, LOGINS.c.expires_at, ACCOUNTS.c.role)
            .join(ACCOUNTS, ACCOUNTS.c.account == LOGINS.c.account)
            .where(LOGINS.c.fingerprint == fingerprint(token))
        )
        with self._database.begin() as connection:
            row = connection.execute(query).one_or_none()
            if row is None or now >= row.expires_at or now - row.seen_at >= self._idle:
                return None
            if now - row.seen_at >= _NOTED_EVERY:
                connection.execute(update(LOGINS).where(LOGINS.c.fingerprint == fingerprint(token)).values(seen_at=now))
        return Login(row.account, AccountRole(row.role), row.expires_at)

    def addresses(self) -> Sequence[tuple[str, str]]:
        """Return accounts with the addresses of their logins, the oldest first."""
        query = select(LOGINS.c.account, LOGINS.c.address).order_by(LOGINS.c.seen_at)
        with self._database.begin() as connection:
            return [(row.account, row.address) for row in connection.execute(query)]

    def end(self, token: str) -> None:
        with self._database.begin() as connection:
            connection.execute(delete(LOGINS).where(LOGINS.c.fingerprint == fingerprint(token)))


_RATE_PER_S: Final = 0.5
_BURST: Final = 30.0
_ACCOUNT_BURST: Final = 300.0
"""Attempts on one account from all addresses; as it refills as fast as one address may guess, one alone never takes
them all."""

_BUCKETS: Final = 4096
"""Addresses that share one share its rate, and so do accounts; which ones do is different in each process."""

_MAX_USUAL: Final = 4096


class Attempts:
    """Token buckets of login attempts: one for each network, one for each account from unknown networks. Thread-safe.

    Where an account has logged in, its attempts from that network have a bucket of their own, so that guesses from
    elsewhere do not lock its owner out. Invented addresses and accounts neither fill the memory nor renew the bucket of
    a real one.
    """

    def __init__(self, clock: Callable[[], float], *, usual: Iterable[tuple[str, str]] = ()) -> None:
        """`usual` are accounts with addresses from which they have logged in."""
        self._clock = clock
        self._buckets: dict[int, TokenBucket] = {}
        self._usual: OrderedDict[tuple[str, str], TokenBucket] = OrderedDict()
        self._lock = Lock()
        for account, address in usual:
            self._note_usual(account, address)

    def take(self, address: str, account: str = "") -> float:
        """Return 0 if a login may be tried now, else the seconds to wait; without an account, by the address alone.

        An attempt counts as failed until it succeeds, because many may run at once.
        """
        with self._lock:
            buckets, now = self._of(address, account), self._clock()
            wait_s = max(bucket.wait_s(1.0, now) for bucket in buckets)
            if not wait_s:
                for bucket in buckets:
                    bucket.spend(1.0, now)
            return wait_s

    def succeeded(self, address: str, account: str = "") -> None:
        with self._lock:
            for bucket in self._of(address, account):
                bucket.spend(-1.0, self._clock())
            if account:
                self._note_usual(account, address)

    def _note_usual(self, account: str, address: str) -> None:
        key = account, network_of(address)
        self._usual.setdefault(key, self._new(_BURST))
        self._usual.move_to_end(key)
        if len(self._usual) > _MAX_USUAL:
            self._usual.popitem(last=False)

    def _of(self, address: str, account: str) -> list[TokenBucket]:
        """Return the buckets from which an attempt takes."""
        network = network_of(address)
        if (own := self._usual.get((account, network))) is not None:
            return [own]
        found = [self._buckets.setdefault(hash(network) % _BUCKETS, self._new(_BURST))]
        if account:
            key = _BUCKETS + hash(account) % _BUCKETS
            found.append(self._buckets.setdefault(key, self._new(_ACCOUNT_BURST)))
        return found

    def _new(self, burst: float) -> TokenBucket:
        return TokenBucket(_RATE_PER_S, burst, now=self._clock())

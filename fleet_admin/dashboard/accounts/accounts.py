"""Accounts: names, roles and passwords of the people who use the dashboard."""

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from fleet_admin.dashboard.accounts.database import AccountDatabase
from fleet_admin.dashboard.accounts.roles import Role
from fleet_admin.dashboard.accounts.secrets import Passwords, browser_token, new_token
from fleet_admin.dashboard.errors import AccountError
from fleet_admin.steering.views import Actor
from fleet_edge.store.models import AccountRow, ApiKeyRow, LoginRow
from fleet_edge.store.steering.audit import AuditEntry, record_audit
from schemas.errors import InvalidName
from schemas.names import check_name


@dataclass(frozen=True, slots=True)
class Account:
    """An account.

    Attributes:
        name: Its name.
        role: What it may do.
        has_password: Whether it can log in; else a proxy or a key says who it is.
        created_at: When it was made.
        changed_at: When its role or password was last changed.
    """

    name: str
    role: Role
    has_password: bool
    created_at: datetime
    changed_at: datetime


class Accounts:
    """The accounts of a database.

    Args:
        database: Where they are.
        passwords: Hashes and checks.
        now: The wall clock (aware).
    """

    def __init__(
        self,
        database: AccountDatabase,
        *,
        passwords: Passwords | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database = database
        self._passwords = passwords or Passwords()
        self._now = now

    def list(self) -> list[Account]:
        with self._database.begin() as connection:
            rows = connection.execute(select(AccountRow.__table__).order_by(AccountRow.account)).mappings().all()
        return [
            Account(
                row["account"], Role(row["role"]), row["password"] is not None, row["created_at"], row["changed_at"]
            )
            for row in rows
        ]

    def role(self, name: str) -> Role | None:
        """Return an account's role, or None if there is no such account."""
        with self._database.begin() as connection:
            found = connection.scalar(select(AccountRow.role).where(AccountRow.account == name))
        return None if found is None else Role(found)

    def add(self, name: str, *, role: Role, password: str | None, actor: Actor) -> None:
        """Add an account.

        Args:
            name: Its name, of letters, digits, '.', '_' and '-'.
            role: What it may do.
            password: Its password; None for one that a proxy or a key alone tells.
            actor: Who adds it, for the audit log.

        Raises:
            AccountError: The name or the password cannot be, or there is such an account.
        """
        try:
            check_name(name)
        except InvalidName as error:
            raise AccountError(str(error)) from None
        hashed = None if password is None else self._passwords.hash(password, account=name)
        now = self._now()
        row = {"account": name, "role": role, "password": hashed, "created_at": now, "changed_at": now}
        with self._database.begin() as connection:
            try:
                connection.execute(insert(AccountRow).values(row))
            except IntegrityError:
                raise AccountError(
                    f"There is an account {name} already; `fleet admin user password {name}` gives it another password."
                ) from None
            self._audit(connection, "account add", name, actor=actor, after=str(role))

    def remove(self, name: str, *, actor: Actor) -> None:
        """Remove an account, its keys and its logins.

        Raises:
            AccountError: There is none of that name.
        """
        with self._database.begin() as connection:
            removed = connection.execute(delete(AccountRow).where(AccountRow.account == name)).rowcount
            if removed:
                connection.execute(delete(ApiKeyRow).where(ApiKeyRow.account == name))
                connection.execute(delete(LoginRow).where(LoginRow.account == name))
                self._audit(connection, "account remove", name, actor=actor)
        if not removed:
            raise AccountError(_unknown(name))

    def set_password(self, name: str, password: str, *, actor: Actor) -> None:
        """Give an account another password; whoever is logged in under it no longer is.

        Raises:
            AccountError: There is none of that name, or the password cannot be.
        """
        hashed = self._passwords.hash(password, account=name)
        with self._database.begin() as connection:
            self._change(connection, name, password=hashed)
            self._audit(connection, "account password", name, actor=actor)

    def set_role(self, name: str, role: Role, *, actor: Actor) -> None:
        """Give an account another role; whoever is logged in under it no longer is.

        Raises:
            AccountError: There is none of that name.
        """
        with self._database.begin() as connection:
            self._change(connection, name, role=str(role))
            self._audit(connection, "account role", name, actor=actor, after=str(role))

    def check(self, name: str, password: str) -> bool:
        """Return whether that is the account's password; takes as long where there is no such account."""
        return self._passwords.check(password, self._hash(name))

    def browser_token(self, name: str) -> str | None:
        """Return a new token for a browser that has logged in under an account; void once the password changes."""
        hashed = self._hash(name)
        return None if hashed is None else browser_token(new_token(), password=hashed)

    def familiar(self, name: str, token: str) -> str | None:
        """Return a browser's token if it is of this account, else None."""
        hashed, nonce = self._hash(name), token.partition(".")[0]
        if hashed is None or not hmac.compare_digest(token.encode(), browser_token(nonce, password=hashed).encode()):
            return None
        return nonce

    def _hash(self, name: str) -> str | None:
        with self._database.begin() as connection:
            return connection.scalar(select(AccountRow.password).where(AccountRow.account == name))

    def _audit(self, connection: Connection, action: str, name: str, *, actor: Actor, after: str | None = None) -> None:
        entry = AuditEntry(who=actor.who, action=action, subject=name, after=after, source=actor.source)
        record_audit(connection, [entry], now=self._now())

    def _change(self, connection: Connection, name: str, **values: str) -> None:
        changed = connection.execute(
            update(AccountRow).where(AccountRow.account == name).values(changed_at=self._now(), **values)
        ).rowcount
        if not changed:
            raise AccountError(_unknown(name))
        connection.execute(delete(LoginRow).where(LoginRow.account == name))


def _unknown(name: str) -> str:
    return f"There is no account {name[:63]!r}; `fleet admin user list` lists those there are."

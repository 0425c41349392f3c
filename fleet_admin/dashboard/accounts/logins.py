"""Logins: browsers that have shown a password, each by a random cookie of which the database keeps the SHA-256."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import delete, insert, select, update

from fleet_admin.dashboard.accounts.database import AccountDatabase
from fleet_admin.dashboard.accounts.roles import Role
from fleet_admin.dashboard.accounts.secrets import fingerprint, new_token
from fleet_edge.store.models import AccountRow, LoginRow

_MOST_OF_AN_ACCOUNT: Final = 20
"""Browsers of one account: the oldest is logged out, so that logins cannot fill the table."""

_NOTED_EVERY: Final = timedelta(minutes=1)
"""How exactly it is known when a browser was last seen: each note is a write."""


@dataclass(frozen=True, slots=True)
class Login:
    """A browser that is logged in.

    Attributes:
        account: Whose it is.
        role: The account's role now.
        expires_at: When it has to log in again, however busy it is.
    """

    account: str
    role: Role
    expires_at: datetime


class Logins:
    """The logins of a database.

    Args:
        database: Where they are.
        idle: Silence after which a browser has to log in again.
        longest: Time after which it has to in any case.
        now: The wall clock (aware).
    """

    def __init__(
        self,
        database: AccountDatabase,
        *,
        idle: timedelta = timedelta(hours=8),
        longest: timedelta = timedelta(days=7),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database = database
        self._idle = idle
        self._longest = longest
        self._now = now

    def begin(self, account: str, *, address: str) -> str:
        """Log a browser in, under a cookie that is new: one that it had before says nothing."""
        token, now = new_token(), self._now()
        row = {
            "fingerprint": fingerprint(token),
            "account": account,
            "address": address,
            "created_at": now,
            "seen_at": now,
            "expires_at": now + self._longest,
        }
        of_account = (
            select(LoginRow.fingerprint)
            .where(LoginRow.account == account)
            .order_by(LoginRow.seen_at.desc())
            .offset(_MOST_OF_AN_ACCOUNT - 1)
        )
        with self._database.begin() as connection:
            connection.execute(delete(LoginRow).where(LoginRow.expires_at < now))
            too_many = connection.scalars(of_account).all()
            connection.execute(delete(LoginRow).where(LoginRow.fingerprint.in_(too_many)))
            connection.execute(insert(LoginRow).values(row))
        return token

    def find(self, token: str) -> Login | None:
        """Return whose cookie this is, or None: never given, ended, or run out."""
        now = self._now()
        query = (
            select(LoginRow.account, LoginRow.seen_at, LoginRow.expires_at, AccountRow.role)
            .join(AccountRow, AccountRow.account == LoginRow.account)
            .where(LoginRow.fingerprint == fingerprint(token))
        )
        with self._database.begin() as connection:
            row = connection.execute(query).one_or_none()
            if row is None or now >= row.expires_at or now - row.seen_at >= self._idle:
                return None
            if now - row.seen_at >= _NOTED_EVERY:
                connection.execute(
                    update(LoginRow).where(LoginRow.fingerprint == fingerprint(token)).values(seen_at=now)
                )
        return Login(row.account, Role(row.role), row.expires_at)

    def end(self, token: str) -> None:
        with self._database.begin() as connection:
            connection.execute(delete(LoginRow).where(LoginRow.fingerprint == fingerprint(token)))

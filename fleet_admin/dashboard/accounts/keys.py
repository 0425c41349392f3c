"""API keys: random, shown once, kept by their SHA-256."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import Connection, delete, func, insert, select, update

from fleet_admin.dashboard.accounts.database import AccountDatabase
from fleet_admin.dashboard.accounts.roles import Role, Visitor
from fleet_admin.dashboard.accounts.secrets import KEY_PREFIX, fingerprint, new_key
from fleet_admin.dashboard.errors import AccountError
from fleet_admin.steering.views import Actor
from fleet_edge.store.models import AccountRow, ApiKeyRow
from fleet_edge.store.steering.audit import AuditEntry, record_audit
from schemas.errors import InvalidName
from schemas.names import check_name

_MOST_OF_AN_ACCOUNT: Final = 100
_SHOWN: Final = 12
"""Characters of a fingerprint that tell keys apart."""

_NOTED_EVERY: Final = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key, without what makes it one.

    Attributes:
        id: The beginning of its fingerprint.
        name: What it is for.
        account: Whose it is.
        role: What it may do, if its account may.
        created_at: When it was made.
        expires_at: From when it is no longer taken; None: never.
        used_at: When it was last taken, to the minute.
    """

    id: str
    name: str
    account: str
    role: Role
    created_at: datetime
    expires_at: datetime | None
    used_at: datetime | None


class ApiKeys:
    """The keys of a database.

    Args:
        database: Where they are.
        now: The wall clock (aware).
    """

    def __init__(self, database: AccountDatabase, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._database = database
        self._now = now

    def list(self, *, account: str | None = None) -> list[ApiKey]:
        """Return the keys, of all accounts or of one, by account and name."""
        query = select(ApiKeyRow.__table__).order_by(ApiKeyRow.account, ApiKeyRow.name)
        if account is not None:
            query = query.where(ApiKeyRow.account == account)
        with self._database.begin() as connection:
            rows = connection.execute(query).mappings().all()
        return [
            ApiKey(
                id=row["fingerprint"][:_SHOWN],
                role=Role(row["role"]),
                **{each: row[each] for each in ("name", "account", "created_at", "expires_at", "used_at")},
            )
            for row in rows
        ]

    def add(self, name: str, *, account: str, role: Role, actor: Actor, lasts: timedelta | None = None) -> str:
        """Make a key.

        Args:
            name: What it is for.
            account: Whose it is.
            role: What it may do; never more than its account.
            actor: Who makes it, for the audit log.
            lasts: For how long it is taken; None: until it is removed.

        Returns:
            The key, which is shown this once.

        Raises:
            AccountError: The name cannot be, there is no such account, or it has too many keys.
        """
        try:
            check_name(name)
        except InvalidName as error:
            raise AccountError(str(error)) from None
        key, now = new_key(), self._now()
        row = {
            "fingerprint": fingerprint(key),
            "name": name,
            "account": account,
            "role": role,
            "created_at": now,
            "expires_at": None if lasts is None else now + lasts,
            "used_at": None,
        }
        own = select(func.count()).select_from(ApiKeyRow).where(ApiKeyRow.account == account)
        with self._database.begin() as connection:
            if connection.scalar(select(AccountRow.account).where(AccountRow.account == account)) is None:
                raise AccountError(
                    f"There is no account {account[:63]!r}; `fleet admin user list` lists those there are."
                )
            if (connection.scalar(own) or 0) >= _MOST_OF_AN_ACCOUNT:
                raise AccountError(
                    f"The account {account} has {_MOST_OF_AN_ACCOUNT} keys; remove some that are no longer used."
                )
            connection.execute(insert(ApiKeyRow).values(row))
            shown = f"{role} {fingerprint(key)[:_SHOWN]}"
            self._audit(connection, "key add", f"{account}/{name}", actor=actor, after=shown)
        return key

    def remove(self, key_id: str, *, actor: Actor, account: str | None = None) -> ApiKey:
        """Remove a key: it is no longer taken from now on.

        Args:
            key_id: As `ApiKey.id` has it.
            actor: Who removes it, for the audit log.
            account: Whose it must be.

        Raises:
            AccountError: There is none.
        """
        found = [each for each in self.list(account=account) if each.id == key_id]
        if not found:
            raise AccountError(f"There is no key {key_id[:_SHOWN]!r}; `fleet admin key list` lists those there are.")
        with self._database.begin() as connection:
            connection.execute(
                delete(ApiKeyRow).where(
                    ApiKeyRow.fingerprint.startswith(found[0].id, autoescape=True),
                    ApiKeyRow.account == found[0].account,
                )
            )
            self._audit(connection, "key remove", f"{found[0].account}/{found[0].name}", actor=actor)
        return found[0]

    def find(self, key: str, *, address: str) -> Visitor | None:
        """Return who shows this key, or None: never given, removed, or run out."""
        if not key.startswith(KEY_PREFIX):
            return None
        now = self._now()
        own = ApiKeyRow.fingerprint == fingerprint(key)
        query = (
            select(ApiKeyRow.account, ApiKeyRow.role, ApiKeyRow.expires_at, ApiKeyRow.used_at, AccountRow.role)
            .join(AccountRow, AccountRow.account == ApiKeyRow.account)
            .where(own)
        )
        with self._database.begin() as connection:
            row = connection.execute(query).one_or_none()
            if row is None:
                return None
            account, role, expires_at, used_at, most = row
            if expires_at is not None and now >= expires_at:
                return None
            if used_at is None or now - used_at >= _NOTED_EVERY:
                connection.execute(update(ApiKeyRow).where(own).values(used_at=now))
        held = Role.OPERATOR if Role(role) is Role(most) is Role.OPERATOR else Role.VIEWER
        return Visitor(account, held, "key", address)

    def _audit(
        self, connection: Connection, action: str, subject: str, *, actor: Actor, after: str | None = None
    ) -> None:
        entry = AuditEntry(who=actor.who, action=action, subject=subject, after=after, source=actor.source)
        record_audit(connection, [entry], now=self._now())

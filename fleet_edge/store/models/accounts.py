"""Tables of the dashboard's accounts: who may look, who may act, their keys and their logins."""

from datetime import datetime

from sqlalchemy import Index
from sqlalchemy.orm import Mapped, mapped_column

from fleet_edge.store.models.base import Base


class AccountRow(Base):
    """An account. `password` is an argon2id hash; None: it is only known by a proxy's header, or by keys."""

    __tablename__ = "accounts"

    account: Mapped[str] = mapped_column(primary_key=True)
    role: Mapped[str]
    password: Mapped[str | None]
    created_at: Mapped[datetime]
    changed_at: Mapped[datetime]


class ApiKeyRow(Base):
    """A key for programs, of which only the SHA-256 is kept: it is random, and needs no slower hash."""

    __tablename__ = "api_keys"
    __table_args__ = (Index(None, "account"),)

    fingerprint: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    account: Mapped[str]
    role: Mapped[str]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    used_at: Mapped[datetime | None]


class LoginRow(Base):
    """A browser that is logged in, by the SHA-256 of its cookie."""

    __tablename__ = "logins"
    __table_args__ = (Index(None, "account"), Index(None, "expires_at"))

    fingerprint: Mapped[str] = mapped_column(primary_key=True)
    account: Mapped[str]
    address: Mapped[str]
    created_at: Mapped[datetime]
    seen_at: Mapped[datetime]
    expires_at: Mapped[datetime]

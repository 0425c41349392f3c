"""Tables of alerts: what was wrong, since when, who has seen it; and who looks for it now."""

from datetime import datetime

from sqlalchemy import Index, text
from sqlalchemy.orm import Mapped, mapped_column

from fleet_edge.store.models.base import Base

_OPEN = text("cleared_at IS NULL")


class AlertRow(Base):
    """One alert, open until `cleared_at`; of a rule and a subject at most one is open."""

    __tablename__ = "alerts"
    __table_args__ = (
        Index("uq_alerts_open", "rule", "subject", unique=True, sqlite_where=_OPEN, postgresql_where=_OPEN),
        Index(None, "since_at"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    rule: Mapped[str]
    subject: Mapped[str]
    device: Mapped[str | None]
    severity: Mapped[str]
    sentence: Mapped[str]
    value: Mapped[float | None]
    threshold: Mapped[float | None]
    since_at: Mapped[datetime]
    last_at: Mapped[datetime]
    cleared_at: Mapped[datetime | None]
    cleared_by: Mapped[str | None]
    acknowledged_at: Mapped[datetime | None]
    acknowledged_by: Mapped[str | None]


class AlertLeaseRow(Base):
    """Who evaluates the rules, and until when nobody else does."""

    __tablename__ = "alert_leases"

    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    until_at: Mapped[datetime]

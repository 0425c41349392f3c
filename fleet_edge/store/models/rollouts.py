"""Table of rollouts: what a rollout, a rollback or a decommissioning did to each machine."""

from datetime import datetime

from sqlalchemy import Index
from sqlalchemy.orm import Mapped, mapped_column

from fleet_edge.store.models.base import Base


class RolloutRow(Base):
    """One machine in one rollout. No foreign keys: a machine may be rolled out to before it is first seen."""

    __tablename__ = "rollouts"
    __table_args__ = (Index(None, "started_at"), Index(None, "kind", "name", "started_at"))

    rollout: Mapped[str] = mapped_column(primary_key=True)
    host: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]
    action: Mapped[str]
    wanted: Mapped[str | None]
    found: Mapped[str | None]
    running: Mapped[str | None]
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str]
    sentence: Mapped[str]
    who: Mapped[str]

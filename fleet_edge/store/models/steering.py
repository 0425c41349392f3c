"""Tables of what an administrator decides: labels, settings and commands, and the audit log of all that is changed.

No foreign keys: a device may be labelled, set or told something before any edge has seen it.
"""

from datetime import datetime

from sqlalchemy import Index
from sqlalchemy.orm import Mapped, mapped_column

from fleet_edge.store.models.base import Base


class LabelRow(Base):
    """A label of a device, who gave it, and when."""

    __tablename__ = "labels"
    __table_args__ = (Index(None, "label", "device"),)

    device: Mapped[str] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column(primary_key=True)
    at: Mapped[datetime]
    who: Mapped[str]


class WantedSettingsRow(Base):
    """The latest settings that a device is wanted to have; `settings` is a JSON object."""

    __tablename__ = "settings_wanted"

    device: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int]
    settings: Mapped[str]
    who: Mapped[str]
    at: Mapped[datetime]


class ReportedSettingsRow(Base):
    """What a device has last said of its settings; `settings` and `refused` are JSON objects, the others lists."""

    __tablename__ = "settings_reported"

    device: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int]
    applied: Mapped[int]
    settings: Mapped[str]
    refused: Mapped[str]
    needs_restart: Mapped[str]
    fixed: Mapped[str]
    at: Mapped[datetime | None]  # by the device's clock
    heard_at: Mapped[datetime]


class CommandRow(Base):
    """A command to one device; those that were given together share a batch. Without an outcome none is known yet."""

    __tablename__ = "commands"
    __table_args__ = (Index(None, "at"), Index(None, "device", "at"), Index(None, "batch"))

    id: Mapped[str] = mapped_column(primary_key=True)
    batch: Mapped[str]
    device: Mapped[str]
    command: Mapped[str]
    arguments: Mapped[str]  # a JSON object
    who: Mapped[str]
    at: Mapped[datetime]
    deadline_at: Mapped[datetime]
    outcome: Mapped[str | None]
    sentence: Mapped[str | None]
    ended_at: Mapped[datetime | None]


class AuditRow(Base):
    """One action of an administrator, and what came of it."""

    __tablename__ = "audit"
    __table_args__ = (Index(None, "at"), Index(None, "who", "at"), Index(None, "subject", "at"))

    id: Mapped[str] = mapped_column(primary_key=True)
    at: Mapped[datetime]
    who: Mapped[str]
    action: Mapped[str]
    subject: Mapped[str]
    before: Mapped[str | None]
    after: Mapped[str | None]
    outcome: Mapped[str]
    source: Mapped[str]  # from where: this command line's machine, the dashboard and the address of its reader

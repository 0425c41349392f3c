"""Tables of rollups: sums and distributions by hour, day and month, and what is known of how far they reach."""

from dataclasses import fields
from datetime import datetime

from sqlalchemy import BigInteger, Double, Index, Table
from sqlalchemy.orm import Mapped, mapped_column

from fleet_edge.counters import SegmentCounters
from fleet_edge.store.models.base import Base


class _Sums:
    """What rollups sum; a column for each counter of a segment comes on top.

    `sessions` are those that began with one of the segments, `visits` those that came to an edge with one of them for
    the first time; so both add up over time.
    """

    sessions: Mapped[int]
    visits: Mapped[int]
    segments: Mapped[int]
    duration_ms: Mapped[float]


class RollupRow(_Sums, Base):
    """The segments opened in an hour, a day or a month (UTC) that have all else of the key in common, summed.

    Text that is not known is '', so that it can be part of the key.
    """

    __tablename__ = "rollups"
    # Clustered by its key at SQLite: a period is read from front to back.
    __table_args__ = (Index(None, "device", "grain", "start"), {"sqlite_with_rowid": False})

    grain: Mapped[str] = mapped_column(primary_key=True)  # hour, day or month
    start: Mapped[datetime] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(primary_key=True)
    edge: Mapped[str] = mapped_column(primary_key=True)
    app: Mapped[str] = mapped_column(primary_key=True)
    draft_model: Mapped[str] = mapped_column(primary_key=True)
    quantization: Mapped[str] = mapped_column(primary_key=True)


class FleetRollupRow(_Sums, Base):
    """What the rollups of all devices come to: a fleet's course is read from few rows, however many devices it has."""

    __tablename__ = "fleet_rollups"
    __table_args__ = ({"sqlite_with_rowid": False},)

    grain: Mapped[str] = mapped_column(primary_key=True)
    start: Mapped[datetime] = mapped_column(primary_key=True)
    edge: Mapped[str] = mapped_column(primary_key=True)
    app: Mapped[str] = mapped_column(primary_key=True)
    draft_model: Mapped[str] = mapped_column(primary_key=True)
    quantization: Mapped[str] = mapped_column(primary_key=True)


class DeviceRollupRow(_Sums, Base):
    """What the rollups of a device and an application of its come to, at whatever edge, with whatever draft model."""

    __tablename__ = "device_rollups"
    __table_args__ = (Index(None, "device", "grain", "start"), {"sqlite_with_rowid": False})

    grain: Mapped[str] = mapped_column(primary_key=True)
    start: Mapped[datetime] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(primary_key=True)
    app: Mapped[str] = mapped_column(primary_key=True)


class DistributionRow(Base):
    """How a measure of an edge's segments opened in an hour, a day or a month (UTC) is distributed."""

    __tablename__ = "distributions"
    __table_args__ = ({"sqlite_with_rowid": False},)

    grain: Mapped[str] = mapped_column(primary_key=True)
    start: Mapped[datetime] = mapped_column(primary_key=True)
    edge: Mapped[str] = mapped_column(primary_key=True)
    measure: Mapped[str] = mapped_column(primary_key=True)
    counts: Mapped[str]  # of `fleet_edge.store.rollups.distribution`


class StaleHourRow(Base):
    """An hour of which segments have been written since it was rolled up.

    Each process that writes has rows of its own, which it never shares with another's transaction.
    """

    __tablename__ = "stale_hours"

    hour: Mapped[datetime] = mapped_column(primary_key=True)
    writer: Mapped[str] = mapped_column(primary_key=True)
    changes: Mapped[int]  # how often it has written; greater than when it was read: stale still


class RollupMarkRow(Base):
    """How far rollups and purges have come; `fleet_edge.store.rollups.marks` says what each name means."""

    __tablename__ = "rollup_marks"

    name: Mapped[str] = mapped_column(primary_key=True)
    at: Mapped[datetime]


def add_counters(table: type[Base]) -> None:
    """Add a column for each counter of a segment."""
    assert isinstance(table.__table__, Table)
    for counter in fields(SegmentCounters):
        kind = Double if counter.type is float else BigInteger
        setattr(table, counter.name, mapped_column(kind, nullable=False, server_default="0"))


add_counters(RollupRow)
add_counters(FleetRollupRow)
add_counters(DeviceRollupRow)

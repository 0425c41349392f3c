"""Tables of the session log: devices, edges, sessions, events, fences.

Columns that only one kind of record knows are nullable: an end may be replayed before its Open, and then
makes the row that the Open completes. What a device says of a session of which no edge has told yet waits apart, in
`reported_closes`. Unset means "that record has not come", never zero.
"""

from datetime import datetime

from sqlalchemy import ForeignKey, ForeignKeyConstraint, Index, false, text
from sqlalchemy.orm import Mapped, mapped_column

from fleet_edge.store.models.base import Base, Seed
from fleet_edge.store.models.rollups import add_counters


class DeviceRow(Base):
    """A device and its latest state; `silent_since` is set by a job, and cleared when it is seen again."""

    __tablename__ = "devices"

    device: Mapped[str] = mapped_column(primary_key=True)
    presence: Mapped[str | None]
    software: Mapped[str | None]
    draft_model: Mapped[str | None]
    quantization: Mapped[str | None]
    state_at: Mapped[datetime | None]
    first_seen_at: Mapped[datetime]
    seen_at: Mapped[datetime]
    silent_since: Mapped[datetime | None]
    presence_since: Mapped[datetime | None]
    certificate_until: Mapped[datetime | None]
    telemetry_at: Mapped[datetime | None]
    plan: Mapped[str | None]
    round_trip_ms: Mapped[float | None]
    told_acceptance: Mapped[float | None]
    draft_ms_per_token: Mapped[float | None]
    retired_at: Mapped[datetime | None]  # out of service, as the administrator says


class EdgeRow(Base):
    """An edge, its latest state, and its latest load."""

    __tablename__ = "edges"

    edge: Mapped[str] = mapped_column(primary_key=True)
    presence: Mapped[str | None]
    software: Mapped[str | None]
    target: Mapped[str | None]
    vocabulary: Mapped[str | None]
    state_at: Mapped[datetime | None]
    first_seen_at: Mapped[datetime]
    seen_at: Mapped[datetime]
    presence_since: Mapped[datetime | None]
    certificate_until: Mapped[datetime | None]
    load_at: Mapped[datetime | None]
    open_sessions: Mapped[int | None]
    most_sessions: Mapped[int | None]
    batch_sessions: Mapped[float | None]
    step_ms: Mapped[float | None]
    queue_ms: Mapped[float | None]
    tokens_per_s: Mapped[float | None]
    kv_usage: Mapped[float | None]
    spooled_records: Mapped[int | None]


class SessionRow(Base):
    """A session of a device: described by its first Open, ended with its last segment, counted by its device."""

    __tablename__ = "sessions"
    __table_args__ = (
        Index(None, "opened_at"),
        Index(None, "device", "opened_at"),
        Index(None, "reason", "opened_at"),
        Index(None, "device", "last_at"),
        Index(None, "last_at"),
        Index(None, "edge", "opened_at"),
        # The few that an edge other than their last has served too.
        Index("ix_sessions_moved", "opened_at", sqlite_where=text("moved"), postgresql_where=text("moved")),
    )

    session: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(ForeignKey("devices.device"), primary_key=True)
    app: Mapped[str | None]
    opened_at: Mapped[datetime]
    last_at: Mapped[datetime]
    last_segment: Mapped[int]
    described_by: Mapped[int | None]
    draft_model: Mapped[str | None]
    quantization: Mapped[str | None]
    target: Mapped[str | None]
    mode: Mapped[str | None]
    temperature: Mapped[float | None]
    top_k: Mapped[int | None]
    top_p: Mapped[float | None]
    seed: Mapped[int | None] = mapped_column(Seed)
    prompt_tokens: Mapped[int | None]
    max_new_tokens: Mapped[int | None]
    reason: Mapped[str | None]
    closed_at: Mapped[datetime | None]
    tokens: Mapped[int | None]
    device_counted_at: Mapped[datetime | None]
    device_tokens: Mapped[int | None]
    device_rounds: Mapped[int | None]
    device_drafted: Mapped[int | None]
    device_tested: Mapped[int | None]
    device_accepted: Mapped[int | None]
    device_uplink_bytes: Mapped[int | None]
    device_downlink_bytes: Mapped[int | None]
    device_draft_ms: Mapped[float | None]
    device_wait_ms: Mapped[float | None]
    device_wall_ms: Mapped[float | None]
    device_unverified: Mapped[int | None]
    end_code: Mapped[str | None]
    end_sentence: Mapped[str | None]
    edge: Mapped[str | None]  # of the latest segment whose Open has come
    edge_segment: Mapped[int | None]  # that segment
    moved: Mapped[bool] = mapped_column(server_default=false())  # whether several edges have served it


class SegmentRow(Base):
    """One stay of a session at one edge; a column for each counter of `SegmentCounters` is added below."""

    __tablename__ = "segments"
    __table_args__ = (
        ForeignKeyConstraint(["session", "device"], ["sessions.session", "sessions.device"], ondelete="CASCADE"),
        # None by device: SQLite would look a session's segments up there, among all that its device ever had.
        Index(None, "segment"),
        Index(None, "edge", "segment"),
    )

    session: Mapped[str] = mapped_column(primary_key=True)
    segment: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    device: Mapped[str]
    app: Mapped[str | None]
    edge: Mapped[str | None] = mapped_column(ForeignKey("edges.edge"))
    draft_model: Mapped[str | None]
    quantization: Mapped[str | None]
    target: Mapped[str | None]
    resumed_tokens: Mapped[int | None]
    open_bytes: Mapped[int | None]
    reason: Mapped[str | None]
    closed_at: Mapped[datetime | None]
    duration_ms: Mapped[float]  # from Open to the last record
    first_token_ms: Mapped[float | None]
    gap_p95_ms: Mapped[float | None]


class RoundRow(Base):
    """One verdict of a traced session."""

    __tablename__ = "rounds"
    __table_args__ = (
        ForeignKeyConstraint(["session", "segment"], ["segments.session", "segments.segment"], ondelete="CASCADE"),
        Index(None, "at"),
    )

    session: Mapped[str] = mapped_column(primary_key=True)
    segment: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    round: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    base: Mapped[int]
    drafted: Mapped[int]
    tested: Mapped[int]
    accepted: Mapped[int]
    batch: Mapped[int]
    uplink_bytes: Mapped[int]
    downlink_bytes: Mapped[int]
    form: Mapped[str | None]
    queue_ms: Mapped[float]
    compute_ms: Mapped[float]
    at: Mapped[datetime]
    prefill_ms: Mapped[float] = mapped_column(server_default="0")


class ReportedCloseRow(Base):
    """A device's latest Close of a session that its edge did not serve. No foreign keys: it may never have been."""

    __tablename__ = "reported_closes"
    __table_args__ = (Index(None, "device", "closed_at"), Index(None, "closed_at"))

    session: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(primary_key=True)
    closed_at: Mapped[datetime]
    reason: Mapped[str]
    tokens: Mapped[int]
    device_tokens: Mapped[int]
    device_rounds: Mapped[int]
    device_drafted: Mapped[int]
    device_tested: Mapped[int]
    device_accepted: Mapped[int]
    device_uplink_bytes: Mapped[int]
    device_downlink_bytes: Mapped[int]
    device_draft_ms: Mapped[float]
    device_wait_ms: Mapped[float]
    device_wall_ms: Mapped[float]
    device_unverified: Mapped[int] = mapped_column(server_default="0")
    end_code: Mapped[str | None]
    end_sentence: Mapped[str | None]


class EventRow(Base):
    """What happened to a device in a minute, and how often. No foreign keys: a session may never have been."""

    __tablename__ = "events"
    __table_args__ = (
        Index(None, "at"),
        Index(None, "session"),
        *(Index(None, name, "at") for name in ("device", "kind", "code", "edge", "severity")),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    edge: Mapped[str]
    device: Mapped[str | None]
    session: Mapped[str | None]
    kind: Mapped[str]
    code: Mapped[str]
    sentence: Mapped[str]
    at: Mapped[datetime]
    count: Mapped[int] = mapped_column(server_default="1")
    last_at: Mapped[datetime]
    who: Mapped[str | None]
    severity: Mapped[str] = mapped_column(server_default="info")


class FenceRow(Base):
    """The latest fence of a device by one edge, or by the administrator. No foreign keys: either may be unknown."""

    __tablename__ = "fences"
    __table_args__ = (Index(None, "until_at"),)

    device: Mapped[str] = mapped_column(primary_key=True)
    fenced_by: Mapped[str] = mapped_column(primary_key=True)
    since_at: Mapped[datetime]
    until_at: Mapped[datetime | None]  # None: until it is lifted
    reason: Mapped[str]
    strikes: Mapped[int]
    level: Mapped[int]


class FenceLiftRow(Base):
    """When a device's fences were last lifted; kept apart, since a fence may be replayed after it was lifted."""

    __tablename__ = "fence_lifts"

    device: Mapped[str] = mapped_column(primary_key=True)
    lifted_at: Mapped[datetime]
    lifted_by: Mapped[str]


add_counters(SegmentRow)

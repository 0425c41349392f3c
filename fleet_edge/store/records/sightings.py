"""Sightings: states, telemetry and load of devices and edges; of each the latest is kept."""

from dataclasses import dataclass
from datetime import datetime

from schemas.control import Presence


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSeen:
    """A device's state, as retained at the broker.

    Attributes:
        device: Its name.
        presence: Online, draining or offline.
        software: Version that it runs.
        draft_model: Name of its draft model.
        quantization: Of its weights.
        at: When the edge saw it (UTC, aware). The latest wins.
        certificate_until: End of its certificate (UTC, aware), if it has one and says so.
        presence_since: Since when it has that presence (UTC, aware), if the edge has seen it change, or the device says
            since when it is connected.
    """

    device: str
    presence: Presence
    software: str
    draft_model: str
    quantization: str
    at: datetime
    certificate_until: datetime | None = None
    presence_since: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeSeen:
    """An edge's state, as retained at the broker.

    Attributes:
        edge: Its name.
        presence: Online, draining or offline.
        software: Version that it runs.
        target: Name of its target model.
        vocabulary: Size and head of the fingerprint, for the reader's eye.
        at: When it was so (UTC, aware). The latest wins.
        certificate_until: End of its certificate (UTC, aware), if it has one.
        presence_since: Since when it has that presence (UTC, aware).
    """

    edge: str
    presence: Presence
    software: str
    target: str
    vocabulary: str
    at: datetime
    certificate_until: datetime | None = None
    presence_since: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTold:
    """A device's telemetry, as far as the log keeps it: what only the device itself knows.

    Attributes:
        device: Its name.
        at: When the edge heard it (UTC, aware). The latest wins.
        plan: How it writes now.
        round_trip_ms: From a draft to its verdict, smoothed.
        acceptance: Accepted of tested draft tokens since it started.
        draft_ms_per_token: Mean time of its draft model.
    """

    device: str
    at: datetime
    plan: str | None
    round_trip_ms: float | None
    acceptance: float | None
    draft_ms_per_token: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeLoad:
    """What an edge does, over the last seconds.

    Attributes:
        edge: Its name.
        at: When (UTC, aware). The latest wins.
        open_sessions: Sessions that are open.
        most_sessions: Sessions that may be.
        batch_sessions: Mean number of sessions verified in one step; None if there was none.
        step_ms: Mean time of a step; likewise.
        queue_ms: Mean wait of a draft for its step; likewise.
        tokens_per_s: Tokens committed each second.
        kv_usage: Of the memory for keys and values, the part in use, 0 to 1; None where nobody knows.
        spooled_records: Records of the session log that wait on disk.
    """

    edge: str
    at: datetime
    open_sessions: int
    most_sessions: int
    batch_sessions: float | None
    step_ms: float | None
    queue_ms: float | None
    tokens_per_s: float
    kv_usage: float | None
    spooled_records: int

"""Records: what an edge writes to the session log.

Every record is applied as a merge that is idempotent and commutes (see `merge`), so it can be spooled and replayed
freely: a counter is absolute, a state carries its time, a round has its key. All times are UTC and aware.

A session is identified by its id together with its device, so that no device can create, change or end another's
session. It has one *segment* for each time that an edge opened or resumed it. Counters belong to the segment; a
restarted edge starts a new one from zero, and totals are sums. A segment's number is the instant of its Open, in UTC
microseconds.
"""

import uuid
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Self

from fleet_edge.counters import SegmentCounters
from fleet_edge.store.event_codes import Severity, severity_of
from fleet_edge.store.periods import BEGINNING
from fleet_edge.store.views import QuarantineView, RoundView
from schemas.control import Presence
from schemas.policy import Mode
from schemas.reasons import EndReason

if TYPE_CHECKING:
    from schemas.messages import Close

ADMINISTRATOR: Final = "the administrator"
"""Author of a quarantine that no edge has imposed. No edge can have this name, because it contains spaces."""


SESSIONS_DAYS: Final = 365.0
"""Default retention of sessions, in days."""

_MICROSECOND: Final = timedelta(microseconds=1)


def segment_number(at: datetime) -> int:
    return (at - BEGINNING) // _MICROSECOND


def segment_time(segment: int) -> datetime:
    return BEGINNING + segment * _MICROSECOND


def minute_of(at: datetime) -> int:
    """Return the number of a time's minute since 1970."""
    return (at - BEGINNING) // timedelta(minutes=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCounters:
    """What the device itself counted over the whole session, all segments together, from its Close.

    Attributes:
        tested: Draft tokens accepted or rejected.
        uplink_bytes: Payload of all drafts sent, repeats included.
        downlink_bytes: Payload of all verdicts received, repeats included.
        unverified: Tokens at the end that do not follow the distribution of the target model that the request began
            with: of the device without an edge, of another target model, or after such tokens.
    """

    tokens: int
    rounds: int
    drafted: int
    tested: int
    accepted: int
    uplink_bytes: int
    downlink_bytes: int
    draft_ms: float
    wait_ms: float
    wall_ms: float
    quota_wait_ms: float
    unverified: int

    @classmethod
    def of(cls, close: "Close") -> Self:
        return cls(**{field.name: getattr(close, field.name) or 0 for field in fields(cls)})


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOpened:
    """An edge granted an Open or a resume: a segment begins.

    `session` is the 8-byte id in lower-case hexadecimal; `resumed_tokens` were committed before this segment.
    """

    session: str
    segment: int
    device: str
    edge: str
    draft_model: str
    quantization: str
    target: str
    target_id: str
    mode: Mode
    temperature: float
    top_k: int
    top_p: float
    seed: int
    prompt_tokens: int
    max_new_tokens: int
    resumed_tokens: int
    open_bytes: int
    at: datetime
    app: str | None = None


@dataclass(slots=True, kw_only=True, unsafe_hash=True)  # not changed once it is made, as all records
class SegmentProgress(SegmentCounters):
    """What the edge has counted in a segment so far. Absolute values that never fall.

    Times are None until measured: `first_token_ms` counts from the Open, `gap_p95_ms` needs two verdicts.
    """

    session: str
    segment: int
    device: str
    at: datetime
    first_token_ms: float | None = None
    gap_p95_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundJudged(RoundView):
    """One verdict."""

    session: str
    device: str


class LeaveReason(StrEnum):
    """Why a segment ended although its session did not."""

    HANDED_OVER = "handed-over"  # the edge shut down; the device resumes elsewhere, or here when the edge is back
    RESUMED = "resumed"  # the device has opened the session again


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentLeft:
    """A segment ended, and the session goes on: it stays open until a later segment closes it.

    If a segment has several ends, the latest `at` wins.
    """

    session: str
    segment: int
    device: str
    reason: LeaveReason
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionClosed:
    """A segment ended, and the session with it unless a later segment exists; if its device closed it, in any case.

    If a segment has several ends, the latest `at` wins.

    Attributes:
        tokens: Of the whole session, resumed ones included: as its device closed it, without what was verified beyond;
            without a Close, as the edge has committed it.
        counters: The device's own; None if no Close came (a lost device).
    """

    session: str
    segment: int
    device: str
    reason: EndReason
    tokens: int
    counters: DeviceCounters | None
    at: datetime
    code: str | None = None
    sentence: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseReported:
    """A device closed a session that the edge does not serve: the edge has restarted, or there never was one.

    It ends the device's session of that id for good, if one was granted. Until then it waits in a separate table and
    creates no session; only a sequence that the device generated without an edge is a session at once.

    Attributes:
        at: When the Close came, or when generation ended if the device reported that later. The latest wins.
    """

    session: str
    device: str
    reason: EndReason
    tokens: int
    counters: DeviceCounters
    at: datetime
    code: str | None = None
    sentence: str | None = None
    app: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSeen:
    """A device's state, as retained at the broker; the latest `at` wins.

    Attributes:
        certificate_until: End of its certificate, if the device reports one.
        presence_since: Start of that presence, if the edge has seen it change, or the device says since when it is
            connected.
    """

    device: str
    presence: Presence
    software: str
    draft_model: str
    quantization: str
    at: datetime
    certificate_until: datetime | None = None
    presence_since: datetime | None = None
    throttled: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeSeen:
    """An edge's state, as retained at the broker; the latest `at` wins."""

    edge: str
    presence: Presence
    software: str
    target: str
    target_id: str
    vocabulary: str
    at: datetime
    certificate_until: datetime | None = None
    presence_since: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryReported:
    """A device's telemetry, as far as the log keeps it; `views.DeviceColumns` describes the values."""

    device: str
    at: datetime
    plan: str | None
    round_trip_ms: float | None
    told_acceptance: float | None
    draft_ms_per_token: float | None
    plan_reason: str | None
    temperature_c: float | None = None
    joules_per_token: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReported:
    """An edge's load over the last seconds; `views.EdgeColumns` describes the values. None: nothing was measured.

    `memory_bytes` is resident in the edge's process. Connected devices may be idle; active ones are connected and were
    heard lately.
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
    memory_bytes: int | None = None
    devices_active: int | None = None
    devices_connected: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EventLogged:
    """Something worth a line, and how often it happened; `event_codes` lists all kinds and codes.

    Attributes:
        id: Unique for good, so that a replay adds nothing, e.g. a random UUID in hexadecimal. Records of one id differ
            only in `count` and `last_at`, of which the greatest count. All edges give what they all see the same id.
        session: The first session that it concerns.
        last_at: When it last happened; None: at `at`.
        severity: By default that of `event_codes`.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    edge: str = ADMINISTRATOR
    device: str | None = None
    session: str | None = None
    kind: str
    code: str
    sentence: str
    at: datetime
    count: int = 1
    last_at: datetime | None = None
    who: str | None = None
    severity: Severity | None = None

    def __post_init__(self) -> None:
        if self.severity is None:
            object.__setattr__(self, "severity", severity_of(self.kind, self.code))


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceQuarantined(QuarantineView):
    """A device was quarantined. The latest by one `by` counts; of several `by`, the one that ends last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineLifted:
    """All quarantines of a device, by any edge, that begin at `at` or before are over."""

    device: str
    by: str
    at: datetime


Record = (
    DeviceSeen
    | EdgeSeen
    | TelemetryReported
    | LoadReported
    | SessionOpened
    | SegmentProgress
    | RoundJudged
    | SegmentLeft
    | SessionClosed
    | CloseReported
    | EventLogged
    | DeviceQuarantined
    | QuarantineLifted
)

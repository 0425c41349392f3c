"""Views: what the queries return, with rates and states computed in one place.

`tables` takes columns from the `…Columns` classes; docs/administration.md describes each state.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final, NamedTuple

from fleet_edge.counters import SegmentCounters, share
from schemas.control import Presence

ACTIVE_WITHIN: Final = timedelta(minutes=5)
"""Time since the last message within which a device is active. An idle device sends nothing, and stays online."""

EDGE_SILENT_AFTER: Final = timedelta(minutes=1)
"""Time without a record of an edge after which it is silent; it writes its load every ten seconds."""


class MachineState(StrEnum):
    """State of a device or an edge, in the order in which an administrator wants to see them; only edges are silent."""

    ONLINE = "online"
    DRAINING = "draining"
    SILENT = "silent"
    QUARANTINED = "quarantined"
    OFFLINE = "offline"
    RETIRED = "retired"
    UNKNOWN = "unknown"


CONNECTED: Final = (MachineState.ONLINE, MachineState.DRAINING)
"""States of a device that is connected to the broker, and of an edge that writes to the log."""


def device_state(
    presence: str | None, *, quarantined: bool = False, retired: bool = False, observed: bool = True
) -> MachineState:
    """Return a device's state, which follows its connection alone: an idle device is online.

    Without an edge that observes the broker, a device that was connected is unknown.
    """
    if quarantined:
        return MachineState.QUARANTINED
    if retired:
        return MachineState.RETIRED
    return _gone(presence) or (_connected(presence) if observed else MachineState.UNKNOWN)


def is_active(since_last_sign: timedelta) -> bool:
    """A device is active if it was heard lately; that says nothing about its connection."""
    return since_last_sign <= ACTIVE_WITHIN


def edge_state(presence: str | None, *, since_last_sign: timedelta) -> MachineState:
    """Return an edge's state; its start is a sign, as are its loads and the sessions that it opens."""
    quiet = since_last_sign > EDGE_SILENT_AFTER
    return _gone(presence) or (MachineState.SILENT if quiet else _connected(presence))


def _gone(presence: str | None) -> MachineState | None:
    if presence is None:
        return MachineState.UNKNOWN
    return MachineState.OFFLINE if presence in {Presence.OFFLINE, Presence.CLOSED} else None


def _connected(presence: str | None) -> MachineState:
    # A presence that this version does not know takes no new sessions.
    return MachineState.ONLINE if presence == Presence.ONLINE else MachineState.DRAINING


@dataclass(slots=True, kw_only=True)
class Tally(SegmentCounters):
    """What the edges counted over some segments, summed. `duration_ms`: from Open to last record."""

    sessions: int
    segments: int
    duration_ms: float

    @property
    def tokens_per_s(self) -> float | None:
        """Committed tokens per second of open segment: what one session gets."""
        return share(1000.0 * self.tokens, self.duration_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceColumns:
    """A device as the log stores it.

    Attributes:
        certificate_until: End of its certificate, as the device reports it.
        round_trip_ms: From a draft to its verdict, smoothed.
        told_acceptance: Accepted of tested draft tokens since the device started.
        throttled: A sentence, while its processor is throttled.
    """

    device: str
    presence: str | None
    software: str | None
    draft_model: str | None
    quantization: str | None
    first_seen_at: datetime
    seen_at: datetime
    presence_since: datetime | None
    certificate_until: datetime | None
    telemetry_at: datetime | None
    plan: str | None
    round_trip_ms: float | None
    told_acceptance: float | None
    draft_ms_per_token: float | None
    plan_reason: str | None
    temperature_c: float | None
    joules_per_token: float | None
    throttled: str | None
    retired_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceView(DeviceColumns):
    """A device with its state and its sums.

    Attributes:
        state_since: Start of that state; None if it is not known.
        last_sign_at: Latest message or disconnection that an edge has recorded.
        sessions: Served by edges, purged ones included.
        last_verdict_at: When an edge last recorded a verdict or an end of a session.
        tokens_today: Committed in segments opened since midnight (UTC).
    """

    state: MachineState
    state_since: datetime | None
    last_sign_at: datetime
    labels: tuple[str, ...]
    sessions: int
    last_session_at: datetime | None
    last_edge: str | None
    last_verdict_at: datetime | None
    acceptance_1h: float | None
    acceptance_24h: float | None
    tokens_today: int

    @property
    def connected(self) -> bool:
        """Its last report is current only while it is connected."""
        return self.state in CONNECTED


class DeviceSigns(NamedTuple):
    """What alerts read of a device: a fraction of a `DeviceView`, since they read thousands often."""

    device: str
    offline: bool
    last_sign_at: datetime
    certificate_until: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionColumns:
    """A session as the log stores it; fields are None until the record that sets them arrives.

    `device_…`: what the device itself counted, as `records.DeviceCounters` describes it. `end_code` and `end_sentence`:
    the cause of the end, where there is more to say than `reason`.
    """

    session: str
    device: str
    app: str | None
    opened_at: datetime
    last_at: datetime
    draft_model: str | None
    quantization: str | None
    target: str | None
    target_id: str | None
    mode: str | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    prompt_tokens: int | None
    max_new_tokens: int | None
    reason: str | None
    closed_at: datetime | None
    device_tokens: int | None
    device_rounds: int | None
    device_drafted: int | None
    device_tested: int | None
    device_accepted: int | None
    device_uplink_bytes: int | None
    device_downlink_bytes: int | None
    device_draft_ms: float | None
    device_wait_ms: float | None
    device_wall_ms: float | None
    device_quota_wait_ms: float | None
    device_unverified: int | None
    end_code: str | None
    end_sentence: str | None
    edge: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionView(SessionColumns):
    """A session with the sums of its segments.

    Attributes:
        final_tokens: Tokens of the whole sequence at its end.
        first_token_ms: From the Open to the first committed token, at the edge; of the first segment that has one.
        gap_p95_ms: 95th percentile of the time between two tokens; of the segment with most tokens.
    """

    final_tokens: int | None
    counted: Tally
    first_token_ms: float | None
    gap_p95_ms: float | None

    @property
    def device_acceptance(self) -> float | None:
        return share(self.device_accepted or 0, self.device_tested or 0)

    @property
    def network_ms(self) -> float | None:
        """The part of the device's waiting that the edge does not account for."""
        if self.device_wait_ms is None:
            return None
        counted = self.counted
        return max(self.device_wait_ms - counted.queue_ms - counted.prefill_ms - counted.compute_ms, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentColumns:
    """One stay of a session at one edge, as the log stores it, without counters."""

    segment: int
    device: str
    edge: str | None
    draft_model: str | None
    quantization: str | None
    target: str | None
    target_id: str | None
    resumed_tokens: int | None
    open_bytes: int | None
    reason: str | None
    closed_at: datetime | None
    first_token_ms: float | None
    gap_p95_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentView(SegmentColumns):
    """One stay of a session at one edge."""

    opened_at: datetime
    counted: Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundView:
    """One verdict; with edge-only decoding, the first piece of each request.

    Attributes:
        base: Tokens committed before it.
        drafted: Tokens in the draft.
        tested: Of these, accepted or rejected.
        batch: Sessions verified in the same step, this one included.
        uplink_bytes: Payload of the draft.
        downlink_bytes: Payload of the verdict.
        form: Form of `next` in the verdict: `token`, `sparse`, `samples`, `dense`, None for nothing;
            `written` with edge-only decoding.
        queue_ms: From arrival to the step, less `prefill_ms`.
        compute_ms: Duration of the step.
        prefill_ms: From arrival to the step, spent in steps that computed the session's own prompt or sequence.
    """

    segment: int
    round: int
    base: int
    drafted: int
    tested: int
    accepted: int
    batch: int
    uplink_bytes: int
    downlink_bytes: int
    form: str | None
    queue_ms: float
    compute_ms: float
    at: datetime
    prefill_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EventView:
    """What happened within a minute, from `at` to `last_at`, `count` times; `who` is a person, if one did it."""

    id: str
    edge: str
    device: str | None
    session: str | None
    kind: str
    code: str
    sentence: str
    at: datetime
    count: int
    last_at: datetime
    who: str | None
    severity: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EventCount:
    """How often something happened; fields that the query does not group by are None."""

    kind: str | None
    code: str | None
    severity: str | None
    edge: str | None
    device: str | None
    day: str | None
    events: int
    times: int
    last_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeColumns:
    """An edge as the log stores it, with its latest load; None where the edge has not reported it.

    `vocabulary` shows size and head of the fingerprint. Times and sizes of batches are means over the last seconds
    before `load_at`; `kv_usage` is 0 to 1; `spooled_records` wait on disk.
    """

    edge: str
    presence: str | None
    software: str | None
    target: str | None
    target_id: str | None
    vocabulary: str | None
    first_seen_at: datetime
    seen_at: datetime
    presence_since: datetime | None
    certificate_until: datetime | None
    load_at: datetime | None
    open_sessions: int | None
    most_sessions: int | None
    batch_sessions: float | None
    step_ms: float | None
    queue_ms: float | None
    tokens_per_s: float | None
    kv_usage: float | None
    spooled_records: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeView(EdgeColumns):
    """An edge with its latest load and its state."""

    state: MachineState

    @property
    def state_since(self) -> datetime | None:
        """Start of the state; a silent edge has been so since its last sign."""
        return self.seen_at if self.state is MachineState.SILENT else self.presence_since

    @property
    def free_sessions(self) -> int | None:
        if self.most_sessions is None or self.open_sessions is None:
            return None
        return max(0, self.most_sessions - self.open_sessions)


@dataclass(frozen=True, slots=True)
class LoadView:
    """Means of an edge's loads over some time; None where the edge has not measured it."""

    open_sessions: float | None
    kv_usage: float | None
    memory_bytes: float | None
    devices_active: float | None
    devices_connected: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineView:
    """A quarantine: edges drop what the device sends.

    Attributes:
        until_at: End (UTC, aware); None: until it is lifted.
        strikes: Offences that led to it; 0 if none did.
        level: How often the duration has doubled.
    """

    device: str
    by: str
    since_at: datetime
    until_at: datetime | None
    reason: str
    strikes: int
    level: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageView:
    """Sum of the segments of a period that share these values; None: not grouped by, or not known.

    `counted.sessions` are those opened in the period, or that came to the edge within it.
    """

    start: datetime | None
    device: str | None
    edge: str | None
    app: str | None
    draft_model: str | None
    quantization: str | None
    target_id: str | None
    counted: Tally


# What administrators did and see


DONE: Final = "done"
"""Outcome of an action that was carried out; any other says what happened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One action.

    Attributes:
        who: User of the operating system, or account of the dashboard.
        action: `quarantine`, `set`, `command self-test`…
        source: The command line's machine, or the address of the dashboard's reader.
    """

    who: str
    action: str
    subject: str
    before: str | None = None
    after: str | None = None
    outcome: str = DONE
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditView(AuditEntry):
    """One action and its time."""

    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandView:
    """A command to one device; commands given together share a batch.

    `outcome` is `ok`, `failed`, `refused`, `silent`, or None while the command runs.
    """

    id: str
    batch: str
    device: str
    command: str
    who: str
    at: datetime
    deadline_at: datetime
    outcome: str | None
    sentence: str | None
    ended_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertView:
    """One alert.

    Attributes:
        id: Hexadecimal.
        subject: A device, an edge, or an edge and a code.
        severity: `warning` or `critical`.
        sentence: What is wrong, as seen last, and what to do.
        value: What was measured when the sentence last changed, if it is a number.
        last_at: When its rule last found it wrong.
        delivered: Its state as all receivers have accepted it last: `warning`, `critical` or `cleared`.
    """

    id: str
    rule: str
    subject: str
    device: str | None
    severity: str
    sentence: str
    value: float | None
    threshold: float | None
    since_at: datetime
    last_at: datetime
    cleared_at: datetime | None
    delivered: str | None

    @property
    def open(self) -> bool:
        return self.cleared_at is None

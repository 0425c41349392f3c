"""Views: what the queries return, with rates and states computed in one place.

`tables` takes columns from them: from the fields with a merge rule, or from all. docs/administration.md describes each
state.
"""

from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple, Self

from fleet_edge.session_log.counters import SegmentCounters, share
from fleet_edge.session_log.rules import GREATEST, KEY, LEAST, ONCE, first, latest, latest_known
from schemas.control import Presence

if TYPE_CHECKING:
    from schemas.messages import Close

ACTIVE_WITHIN: Final = timedelta(minutes=5)
"""Time since the last message within which a device is active. An idle device sends nothing, and stays online."""

EDGE_SILENT_AFTER: Final = timedelta(minutes=1)
"""Time without a record of an edge after which it is silent; it writes its load every ten seconds."""


class MachineState(StrEnum):
    """State of a device or an edge, in the order in which an administrator wants to see them."""

    ONLINE = "online"
    DRAINING = "draining"
    LOADING = "loading"
    SILENT = "silent"
    QUARANTINED = "quarantined"
    OFFLINE = "offline"
    RETIRED = "retired"
    UNKNOWN = "unknown"


EDGES_ALONE: Final = (MachineState.LOADING, MachineState.SILENT)
"""States that no device has."""

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


def edge_state(
    presence: str | None, *, since_last_sign: timedelta, since_loading: timedelta | None = None
) -> MachineState:
    """Return an edge's state; its start is a sign, as are its loads and the sessions that it opens."""
    if since_loading is not None and since_loading <= EDGE_SILENT_AFTER:
        return MachineState.LOADING
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
    """Sums of what the edges counted over some segments. `duration_ms`: from Open to last record."""

    sessions: int
    segments: int
    duration_ms: float

    @property
    def tokens_per_s(self) -> float | None:
        """Committed tokens per second of open segment: what one session gets."""
        return share(1000.0 * self.tokens, self.duration_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceView:
    """A device with its state and its sums; what it reports has the names of its messages (`schemas.control`).

    Attributes:
        certificate_until: End of its certificate, as the device reports it.
        round_trip_ms: From a draft to its verdict, smoothed.
        acceptance: Accepted of tested draft tokens since the device started.
        throttled: A sentence, while its processor is throttled.
        state_since: Start of that state; None if it is not known.
        last_sign_at: Latest message or disconnection that an edge has recorded.
        sessions: Served by edges, purged ones included.
        last_verdict_at: When an edge last recorded a verdict or an end of a session.
        tokens_today: Committed in segments opened since midnight (UTC).
    """

    device: Annotated[str, KEY]
    presence: Annotated[str | None, latest("state_at")]
    software: Annotated[str | None, latest("state_at")]
    draft_model: Annotated[str | None, latest("state_at")]
    quantization: Annotated[str | None, latest("state_at")]
    first_seen_at: Annotated[datetime, LEAST]
    seen_at: Annotated[datetime, GREATEST]
    presence_since: Annotated[datetime | None, GREATEST]
    certificate_until: Annotated[datetime | None, latest("state_at")]
    telemetry_at: Annotated[datetime | None, GREATEST]
    plan: Annotated[str | None, latest("telemetry_at")]
    round_trip_ms: Annotated[float | None, latest("telemetry_at")]
    acceptance: Annotated[float | None, latest("telemetry_at")]
    draft_ms_per_token: Annotated[float | None, latest("telemetry_at")]
    plan_reason: Annotated[str | None, latest("telemetry_at")]
    temperature_c: Annotated[float | None, latest("telemetry_at")]
    joules_per_token: Annotated[float | None, latest("telemetry_at")]
    throttled: Annotated[str | None, latest("state_at")]
    retired_at: Annotated[datetime | None, ONCE]
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


_END: Final = latest("end_segment", "closed_at")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionView:
    """A session with the sums of its segments; fields are None until the record that sets them arrives.

    Attributes:
        device_tokens: As all of `device_…`, what the device itself counted; `DeviceCounters` describes them.
        end_code: As `end_sentence`, the cause of the end where there is more to say than `reason`.
        final_tokens: Tokens of the whole sequence at its end.
        first_token_ms: From the Open to the first committed token, at the edge; of the first segment that has one.
        gap_p95_ms: 95th percentile of the time between two tokens; of the segment with most tokens.
    """

    session: Annotated[str, KEY]
    device: Annotated[str, KEY]
    app: Annotated[str | None, first("described_by")]
    opened_at: Annotated[datetime, LEAST]
    last_at: Annotated[datetime, GREATEST]
    draft_model: Annotated[str | None, first("described_by")]
    quantization: Annotated[str | None, first("described_by")]
    target: Annotated[str | None, first("described_by")]
    target_id: Annotated[str | None, first("described_by")]
    mode: Annotated[str | None, first("described_by")]
    temperature: Annotated[float | None, first("described_by")]
    top_k: Annotated[int | None, first("described_by")]
    top_p: Annotated[float | None, first("described_by")]
    seed: Annotated[int | None, first("described_by")]
    prompt_tokens: Annotated[int | None, first("described_by")]
    max_new_tokens: Annotated[int | None, first("described_by")]
    reason: Annotated[str | None, _END]
    closed_at: Annotated[datetime | None, _END]
    device_tokens: Annotated[int | None, _END]
    device_rounds: Annotated[int | None, _END]
    device_drafted: Annotated[int | None, _END]
    device_tested: Annotated[int | None, _END]
    device_accepted: Annotated[int | None, _END]
    device_uplink_bytes: Annotated[int | None, _END]
    device_downlink_bytes: Annotated[int | None, _END]
    device_draft_ms: Annotated[float | None, _END]
    device_wait_ms: Annotated[float | None, _END]
    device_wall_ms: Annotated[float | None, _END]
    device_quota_wait_ms: Annotated[float | None, _END]
    device_unverified: Annotated[int | None, _END]
    end_code: Annotated[str | None, _END]
    end_sentence: Annotated[str | None, _END]
    edge: Annotated[str | None, latest("edge_segment")]
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
class SegmentView:
    """One stay of a session at one edge. Latencies are those reported with most tokens."""

    segment: Annotated[int, KEY]
    device: Annotated[str, KEY]
    edge: Annotated[str | None, ONCE]
    draft_model: Annotated[str | None, ONCE]
    quantization: Annotated[str | None, ONCE]
    target: Annotated[str | None, ONCE]
    target_id: Annotated[str | None, ONCE]
    resumed_tokens: Annotated[int | None, ONCE]
    open_bytes: Annotated[int | None, ONCE]
    reason: Annotated[str | None, latest("closed_at")]
    closed_at: Annotated[datetime | None, GREATEST]
    first_token_ms: Annotated[float | None, ONCE]
    gap_p95_ms: Annotated[float | None, latest_known("tokens")]
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

    segment: Annotated[int, KEY]
    round: Annotated[int, KEY]
    base: Annotated[int, ONCE]
    drafted: Annotated[int, ONCE]
    tested: Annotated[int, ONCE]
    accepted: Annotated[int, ONCE]
    batch: Annotated[int, ONCE]
    uplink_bytes: Annotated[int, ONCE]
    downlink_bytes: Annotated[int, ONCE]
    form: Annotated[str | None, ONCE]
    queue_ms: Annotated[float, ONCE]
    compute_ms: Annotated[float, ONCE]
    at: Annotated[datetime, ONCE]
    prefill_ms: Annotated[float, ONCE]


@dataclass(frozen=True, slots=True, kw_only=True)
class EventView:
    """What happened within a minute, from `at` to `last_at`, `count` times; `who` is a person, if one did it."""

    id: Annotated[str, KEY]
    edge: Annotated[str, ONCE]
    device: Annotated[str | None, ONCE]
    session: Annotated[str | None, ONCE]
    kind: Annotated[str, ONCE]
    code: Annotated[str, ONCE]
    sentence: Annotated[str, ONCE]
    at: Annotated[datetime, ONCE]
    count: Annotated[int, GREATEST]
    last_at: Annotated[datetime, GREATEST]
    who: Annotated[str | None, ONCE]
    severity: Annotated[str, ONCE]


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
class EdgeView:
    """An edge with its state and its latest load; None where the edge has not reported it.

    `vocabulary` shows size and head of the fingerprint. Times and sizes of batches are means over the last seconds
    before `load_at`; `kv_usage` is 0 to 1; `spooled_records` wait on disk. `loading` is the percent of its target model
    that an edge has loaded which is not online yet.
    """

    edge: Annotated[str, KEY]
    presence: Annotated[str | None, latest("state_at")]
    software: Annotated[str | None, latest("state_at")]
    target: Annotated[str | None, latest("state_at")]
    target_id: Annotated[str | None, latest("state_at")]
    vocabulary: Annotated[str | None, latest("state_at")]
    first_seen_at: Annotated[datetime, LEAST]
    seen_at: Annotated[datetime, GREATEST]
    presence_since: Annotated[datetime | None, latest("state_at")]
    certificate_until: Annotated[datetime | None, latest("state_at")]
    loading: Annotated[int | None, latest("loading_at")]
    loading_at: Annotated[datetime | None, GREATEST]
    load_at: Annotated[datetime | None, GREATEST]
    open_sessions: Annotated[int | None, latest("load_at")]
    max_sessions: Annotated[int | None, latest("load_at")]
    batch_sessions: Annotated[float | None, latest("load_at")]
    step_ms: Annotated[float | None, latest("load_at")]
    queue_ms: Annotated[float | None, latest("load_at")]
    tokens_per_s: Annotated[float | None, latest("load_at")]
    kv_usage: Annotated[float | None, latest("load_at")]
    spooled_records: Annotated[int | None, latest("load_at")]
    state: MachineState

    @property
    def state_since(self) -> datetime | None:
        """Start of the state; a silent edge has been so since its last sign."""
        match self.state:
            case MachineState.SILENT:
                return self.seen_at
            case MachineState.LOADING:
                return None
        return self.presence_since

    @property
    def free_sessions(self) -> int | None:
        if self.max_sessions is None or self.open_sessions is None:
            return None
        return max(0, self.max_sessions - self.open_sessions)


@dataclass(frozen=True, slots=True)
class LoadView:
    """Load of an edge in a minute, or means over some time; None where the edge has not measured it.

    `memory_bytes` is resident in the edge's process. Connected devices may be idle; active ones were heard lately.
    """

    open_sessions: Annotated[float | None, latest("at")]
    kv_usage: Annotated[float | None, latest("at")]
    memory_bytes: Annotated[float | None, latest("at")]
    devices_active: Annotated[float | None, latest("at")]
    devices_connected: Annotated[float | None, latest("at")]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineView:
    """A quarantine: edges drop what the device sends.

    Attributes:
        until_at: End (UTC, aware); None: until it is lifted.
        strikes: Offences that led to it; 0 if none did.
        level: How often the duration has doubled.
    """

    device: Annotated[str, KEY]
    by: Annotated[str, KEY]
    since_at: Annotated[datetime, GREATEST]
    until_at: Annotated[datetime | None, latest("since_at")]
    reason: Annotated[str, latest("since_at")]
    strikes: Annotated[int, latest("since_at")]
    level: Annotated[int, latest("since_at")]


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


class AlertSeverity(StrEnum):
    WARNING = "warning"
    CRITICAL = "critical"


CLEARED: Final = "cleared"
"""State of an alert that is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertView:
    """One alert.

    Attributes:
        id: Hexadecimal.
        subject: A device, an edge, or an edge and a code.
        sentence: What is wrong, as seen last, and what to do.
        value: What was measured when the sentence last changed, if it is a number.
        last_at: When its rule last found it.
        delivered: Its state as all receivers have accepted it last.
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

    @property
    def state(self) -> str:
        """Its severity, or `CLEARED`."""
        return self.severity if self.open else CLEARED

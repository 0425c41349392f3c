"""Views: what the queries return, for people and for JSON, with the rates worked out in one place."""

from dataclasses import dataclass
from datetime import datetime

from fleet_edge.counters import SegmentCounters, share
from fleet_edge.store.states import MachineState


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally(SegmentCounters):
    """What the edges counted over some segments, summed.

    Attributes:
        sessions: Sessions that the segments belong to.
        segments: Number of segments.
        duration_ms: From Open to last record, summed over segments.
    """

    sessions: int
    segments: int
    duration_ms: float

    @property
    def tokens_per_s(self) -> float | None:
        """Committed tokens per second of open segment: what one session gets."""
        return share(1000.0 * self.tokens, self.duration_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceView:
    """A device.

    Attributes:
        presence: What it, or the broker in its place, has published last.
        state: What that and the time since its last sign come to.
        state_since: Since when it has that state; for a late or silent device, when something last came from it.
        last_sign_at: When something last came from it: its presence, its telemetry, or a draft.
        retired_at: Since when it is out of service.
        labels: Those that an administrator has given it.
        presence_since: Since when it has that presence, if an edge has seen it change.
        certificate_until: End of its certificate, as it says.
        telemetry_at: When it told what follows: `plan`, how it writes; `round_trip_ms`, from a draft to its verdict;
            `told_acceptance`, since it started; `draft_ms_per_token`, of its draft model.
        sessions: That edges have served, those included that are purged.
        last_session_at: When the latest of those that are kept was opened.
        last_edge: That has served this session last.
        last_verdict_at: When an edge last wrote of one of them: a verdict, or its end.
        acceptance_1h: Of the segments opened within the last hour.
        acceptance_24h: Of the segments opened within the last 24 hours.
        tokens_today: Committed in segments opened since midnight (UTC).
    """

    device: str
    presence: str | None
    state: MachineState
    state_since: datetime | None
    last_sign_at: datetime
    retired_at: datetime | None
    labels: tuple[str, ...]
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
    sessions: int
    last_session_at: datetime | None
    last_edge: str | None
    last_verdict_at: datetime | None
    acceptance_1h: float | None
    acceptance_24h: float | None
    tokens_today: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionView:
    """A session. Fields are None where the record that tells them has not come; `reason` None means open.

    Attributes:
        end_code: Why it ended so, as programs read it, where that is more than the reason says.
        end_sentence: The same for a person.
        first_token_ms: From the Open to the first committed token, at the edge; of the first segment that has one.
        gap_p95_ms: 95th percentile of the time between two tokens; of the segment with most tokens.
    """

    session: str
    device: str
    app: str | None
    edge: str | None
    draft_model: str | None
    quantization: str | None
    target: str | None
    mode: str | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    prompt_tokens: int | None
    max_new_tokens: int | None
    opened_at: datetime
    last_at: datetime
    closed_at: datetime | None
    reason: str | None
    final_tokens: int | None
    counted: Tally
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
    device_unverified: int | None
    end_code: str | None
    end_sentence: str | None
    first_token_ms: float | None
    gap_p95_ms: float | None

    @property
    def device_acceptance(self) -> float | None:
        """Accepted of tested draft tokens, as the device counted."""
        return share(self.device_accepted or 0, self.device_tested or 0)

    @property
    def network_ms(self) -> float | None:
        """What of the device's waiting the edge does not account for."""
        if self.device_wait_ms is None:
            return None
        counted = self.counted
        return max(self.device_wait_ms - counted.queue_ms - counted.prefill_ms - counted.compute_ms, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentView:
    """One stay of a session at one edge."""

    segment: int
    opened_at: datetime
    device: str
    edge: str | None
    draft_model: str | None
    quantization: str | None
    target: str | None
    resumed_tokens: int | None
    open_bytes: int | None
    reason: str | None
    closed_at: datetime | None
    first_token_ms: float | None
    gap_p95_ms: float | None
    counted: Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundView:
    """One verdict of a traced session."""

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
    prefill_ms: float
    compute_ms: float
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class EventView:
    """What happened within a minute, from `at` to `last_at`, `count` times; `who` is a person, if one did it."""

    id: str
    at: datetime
    last_at: datetime
    count: int
    edge: str
    device: str | None
    session: str | None
    kind: str
    code: str
    severity: str
    who: str | None
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EventCount:
    """How often something happened, by whatever was asked for; what was not asked for is None."""

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
    """An edge with its latest load, which is of `load_at`; None where it has not said so.

    Attributes:
        state: What its presence and the time since its last load come to.
        batch_sessions: Mean number of sessions verified in one step, over the last seconds.
        step_ms: Mean time of a step.
        queue_ms: Mean wait of a draft for its step.
        kv_usage: Of the memory for keys and values, the part in use, 0 to 1.
        spooled_records: Records of the session log that wait on disk.
    """

    edge: str
    presence: str | None
    state: MachineState
    presence_since: datetime | None
    software: str | None
    target: str | None
    vocabulary: str | None
    certificate_until: datetime | None
    first_seen_at: datetime
    seen_at: datetime
    load_at: datetime | None
    open_sessions: int | None
    most_sessions: int | None
    batch_sessions: float | None
    step_ms: float | None
    queue_ms: float | None
    tokens_per_s: float | None
    kv_usage: float | None
    spooled_records: int | None

    @property
    def free_sessions(self) -> int | None:
        """Sessions that it may still open."""
        if self.most_sessions is None or self.open_sessions is None:
            return None
        return max(0, self.most_sessions - self.open_sessions)


@dataclass(frozen=True, slots=True, kw_only=True)
class FenceView:
    """A fence in force. `until_at` None: until it is lifted; `level`: how often the time has doubled."""

    device: str
    since_at: datetime
    until_at: datetime | None
    by: str
    reason: str
    strikes: int
    level: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HourView:
    """What a device's segments of one hour came to."""

    hour: datetime
    counted: Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageView:
    """What the segments of a period came to that have some of this in common; None: not told apart, or not known.

    `counted.sessions` are those that were opened in the period, or that came to the edge then.
    """

    start: datetime | None
    device: str | None
    edge: str | None
    app: str | None
    draft_model: str | None
    quantization: str | None
    counted: Tally
